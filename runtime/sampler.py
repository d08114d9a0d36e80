"""From logits to tokens on the last stage's ranks: masks, biases and penalties row by row, then the fused draw.

Rows are independent: what one row asks for changes no other row's result. Most rows ask for nothing, so the work
below the fused `sample` is a loop over the few that do. A rank adjusts the columns of the vocabulary that it holds (V
here is their number); ranks that share one come to the same tokens (`parallel/vocab.py`). The order is vLLM's: grammar
mask, logit bias, min_tokens, penalties, then temperature, min-p, top-k, top-p and the draw. Log-probabilities are the
raw distribution's.
"""

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from ..kernels.ops import Ops
from ..parallel.comm import Comm, SoloComm
from ..parallel.partition import cut_vocab
from ..parallel.vocab import VocabOps, vocab_ops
from .adjust import Adjustments
from .batch import StepBatch
from .generation import TokenLogprob
from .plan import Admission, StepPlan, num_accepted


@dataclass(slots=True)
class Sampled:
    """What a step drew: one entry for each row of the batch."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None


class Sampler:
    """Holds per-slot state for the rows that need any. Every rank that holds a part of the vocabulary has one."""

    def __init__(self, ops: Ops, vocab_size: int, *, comm: Comm | None = None) -> None:
        """comm: the ranks that share the vocabulary; default: this one holds it alone."""
        comm = SoloComm() if comm is None else comm
        self.ops: VocabOps = vocab_ops(ops, vocab_size=vocab_size, comm=comm)
        self._adjustments = Adjustments(cut_vocab(vocab_size, shard=comm.shard, size=comm.size), ops.device)
        self._num_logprobs: dict[int, int] = {}

    def admit(self, admission: Admission) -> None:
        """Set up a slot from its log, forgetting whoever held it before."""
        slot, params = admission.slot, admission.params
        self._adjustments.admit(admission)
        self._num_logprobs.pop(slot, None)
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs

    def is_plain(self, batch: StepBatch, plan: StepPlan) -> bool:
        """Whether all rows are drawn from their logits as they are, and nobody asks for logprobs."""
        special = self._adjustments.slots | self._num_logprobs.keys() | plan.masks.keys()
        return special.isdisjoint(batch.slots)

    def sample(self, logits_RV: Tensor, batch: StepBatch, plan: StepPlan) -> Sampled:
        """Draw one token a row; -1 for a row whose logits are not finite.

        Penalties, min_tokens and masks of a row behind guesses are those of the log with the guesses said.
        logits_RV: this rank's columns, float32; overwritten. The result is the same on every rank that shares them.
        """
        wants = [self._num_logprobs.get(slot) for slot in batch.slots]
        asked = [row for row, num in enumerate(wants) if num is not None]
        raw = logits_RV[asked] if asked else None
        adjusted = self._adjustments.slots
        special = _special_rows(batch, plan, adjusted) if plan.masks or adjusted else []
        for slot, row in special:
            guesses = plan.drafts.get(slot, [])
            self._adjustments.apply(
                logits_RV[row : row + 1 + len(guesses)],
                slot,
                position=int(batch.next_positions[row]),
                mask=plan.masks.get(slot),
                guesses=guesses,
            )
        tokens_R = self.ops.sample(logits_RV, batch.sampling)
        tokens: list[int] = tokens_R.tolist()
        for slot, row in special:
            num_said = 1 + num_accepted(plan.drafts.get(slot, []), tokens[row:])
            self._adjustments.say(slot, tokens[row : row + num_said])
        if raw is None:
            return Sampled(tokens)
        return Sampled(tokens, self._logprobs(raw, tokens_R[asked], asked, wants))

    def _logprobs(
        self, raw_QV: Tensor, tokens_Q: Tensor, asked: list[int], wants: list[int | None]
    ) -> list[TokenLogprob | None]:
        entries: list[TokenLogprob | None] = [None] * len(wants)
        most = max(want for want in wants if want is not None)
        for row, entry in zip(asked, token_logprobs(self.ops, raw_QV, tokens_Q, most), strict=True):
            entries[row] = TokenLogprob(entry.logprob, entry.rank, entry.top[: wants[row]])
        return entries


def _special_rows(batch: StepBatch, plan: StepPlan, adjusted: Container[int]) -> list[tuple[int, int]]:
    """Slots that have a mask or are among the adjusted, each with its first row."""
    special, before = [], -1
    for row, slot in enumerate(batch.slots):
        if slot != before and (slot in plan.masks or slot in adjusted):
            special.append((slot, row))
        before = slot
    return special


def token_logprobs(ops: VocabOps, logits_QV: Tensor, tokens_Q: Tensor, num: int) -> list[TokenLogprob]:
    """One entry for each (row, token), with the `num` most likely alternatives. logits_QV: this rank's columns."""
    # A failed row's token is -1; its log ends with an error, so what stands here is never seen.
    found = ops.logprobs(logits_QV, tokens_Q.clamp(min=0), num)
    chosen, ranks = found.chosen_R.tolist(), found.rank_R.tolist()
    ids, values = found.top_ids_RL.tolist(), found.top_logprobs_RL.tolist()
    return [
        TokenLogprob(chosen[row], ranks[row], list(zip(ids[row], values[row], strict=True)))
        for row in range(len(chosen))
    ]
