"""From logits to tokens on the last stage's ranks: masks, biases and penalties row by row, then the fused draw.

Rows are independent: what one row asks for changes no other row's result. Most rows ask for nothing, so the work
below the fused `sample` is a loop over the few that do. A rank adjusts the columns of the vocabulary that it holds (V
here is their number); ranks that share one come to the same tokens (`parallel/vocab.py`). The order is vLLM's: grammar
mask, logit bias, min_tokens, penalties, then temperature, min-p, top-k, top-p and the draw. Log-probabilities are the
raw distribution's.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..parallel.comm import Comm, SoloComm
from ..parallel.partition import cut_vocab, length
from ..parallel.vocab import VocabOps, vocab_ops
from .batch import StepBatch
from .generation import TokenLogprob
from .plan import Admission, StepPlan, num_accepted

NEG_INF = float("-inf")


@dataclass(slots=True)
class _Adjustment:
    """What one sequence asks for beyond the fused draw; kept while it holds its slot, rebuilt from the log.

    Ids count from the first of this rank's.
    """

    bias_ids: Tensor | None = None
    bias: Tensor | None = None
    stop_ids: Tensor | None = None
    stop_allowed_from: int = 0  # position of the first token that may be a stop token
    seen_V: Tensor | None = None  # bool: in the prompt or in the output
    output_counts_V: Tensor | None = None  # float32
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def copy(self) -> "_Adjustment":
        """One that can count on its own."""
        assert self.seen_V is not None
        assert self.output_counts_V is not None
        return replace(self, seen_V=self.seen_V.clone(), output_counts_V=self.output_counts_V.clone())

    def penalise(self, logits_V: Tensor) -> None:
        """Repetition (Keskar et al., arXiv:1909.05858), frequency and presence penalties, in place."""
        if self.seen_V is not None and self.repetition != 1.0:
            scaled = torch.where(logits_V > 0, logits_V / self.repetition, logits_V * self.repetition)
            torch.where(self.seen_V, scaled, logits_V, out=logits_V)
        if self.output_counts_V is not None:
            logits_V.sub_(self.output_counts_V, alpha=self.frequency)
            logits_V.sub_((self.output_counts_V > 0).to(logits_V.dtype), alpha=self.presence)


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
        self._device = ops.device
        self._mine = cut_vocab(vocab_size, shard=comm.shard, size=comm.size)
        self._adjustments: dict[int, _Adjustment] = {}
        self._num_logprobs: dict[int, int] = {}

    def admit(self, admission: Admission) -> None:
        """Set up a slot from its log, forgetting whoever held it before."""
        slot, params = admission.slot, admission.params
        self._adjustments.pop(slot, None)
        self._num_logprobs.pop(slot, None)
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty != 0 or params.frequency_penalty != 0
        if not (params.logit_bias or penalised or (params.min_tokens and admission.stop_token_ids)):
            return
        adjustment = _Adjustment(
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
        if params.logit_bias:
            mine = self._columns(params.logit_bias)
            adjustment.bias_ids = self._tensor(mine, torch.int64)
            biases = [params.logit_bias[self._mine.start + column] for column in mine]
            adjustment.bias = self._tensor(biases, torch.float32)
        if params.min_tokens and admission.stop_token_ids:
            adjustment.stop_ids = self._tensor(self._columns(admission.stop_token_ids), torch.int64)
            adjustment.stop_allowed_from = admission.prompt_len + params.min_tokens
        if penalised:
            self._count(adjustment, admission)
        self._adjustments[slot] = adjustment

    def _count(self, adjustment: _Adjustment, admission: Admission) -> None:
        width = length(self._mine)
        adjustment.seen_V = torch.zeros(width, dtype=torch.bool, device=self._device)
        adjustment.seen_V[self._tensor(self._columns(admission.tokens), torch.int64)] = True
        output = self._tensor(self._columns(admission.tokens[admission.prompt_len :]), torch.int64)
        adjustment.output_counts_V = torch.zeros(width, dtype=torch.float32, device=self._device)
        adjustment.output_counts_V.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))

    def _columns(self, ids: Iterable[int]) -> list[int]:
        """Where those of these ids that are this rank's stand in its logits."""
        first, stop = self._mine.start, self._mine.stop
        return [token - first for token in ids if first <= token < stop]

    def is_plain(self, batch: StepBatch, plan: StepPlan) -> bool:
        """Whether all rows are drawn from their logits as they are, and nobody asks for logprobs."""
        special = self._adjustments.keys() | self._num_logprobs.keys() | plan.masks.keys()
        return special.isdisjoint(batch.slots)

    def sample(self, logits_RV: Tensor, batch: StepBatch, plan: StepPlan) -> Sampled:
        """Draw one token a row; -1 for a row whose logits are not finite.

        Penalties, min_tokens and masks of a row behind guesses are those of the log with the guesses said.
        logits_RV: this rank's columns, float32; overwritten. The result is the same on every rank that shares them.
        """
        wants = [self._num_logprobs.get(slot) for slot in batch.slots]
        asked = [row for row, num in enumerate(wants) if num is not None]
        raw = logits_RV[asked] if asked else None
        special = _special_rows(batch, plan, self._adjustments) if plan.masks or self._adjustments else []
        for slot, row in special:
            drafts = plan.drafts.get(slot, [])
            if slot in plan.masks:
                hidden_QV = ~self._unpack(plan.masks[slot], 1 + len(drafts))
                logits_RV[row : row + 1 + len(drafts)].masked_fill_(hidden_QV, NEG_INF)
            if slot in self._adjustments:
                self._adjust(logits_RV[row:], slot, drafts, int(batch.next_positions[row]))
        tokens_R = self.ops.sample(logits_RV, batch.sampling)
        tokens: list[int] = tokens_R.tolist()
        for slot, row in special:
            if slot in self._adjustments:
                drafts = plan.drafts.get(slot, [])
                for token in tokens[row : row + 1 + num_accepted(drafts, tokens[row:])]:
                    self._say(self._adjustments[slot], token)
        if raw is None:
            return Sampled(tokens)
        return Sampled(tokens, self._logprobs(raw, tokens_R[asked], asked, wants))

    def _adjust(self, logits_QV: Tensor, slot: int, drafts: list[int], position: int) -> None:
        """The slot's rows, the first ones of these: each as if the guesses before it had been said."""
        adjustment = self._adjustments[slot]
        if drafts and adjustment.seen_V is not None:
            adjustment = adjustment.copy()
        for ahead, logits_V in enumerate(logits_QV[: 1 + len(drafts)]):
            if ahead:
                self._say(adjustment, drafts[ahead - 1])
            if adjustment.bias_ids is not None and adjustment.bias is not None:
                logits_V.index_add_(0, adjustment.bias_ids, adjustment.bias)
            if adjustment.stop_ids is not None and position + ahead < adjustment.stop_allowed_from:
                logits_V[adjustment.stop_ids] = NEG_INF
            adjustment.penalise(logits_V)

    def _say(self, adjustment: _Adjustment, token: int) -> None:
        """Count a token of the output, where tokens are counted."""
        if adjustment.seen_V is not None and token >= 0:
            assert adjustment.output_counts_V is not None
            for column in self._columns([token]):
                adjustment.seen_V[column] = True
                adjustment.output_counts_V[column] += 1

    def _unpack(self, masks: bytes, num: int) -> Tensor:
        """[num, V] bool."""
        first, stop = self._mine.start, self._mine.stop
        packed = np.frombuffer(masks, np.uint8).reshape(num, -1)[:, first // 8 : -(-stop // 8)]
        bits = np.unpackbits(packed, axis=1, bitorder="little")[:, first % 8 :][:, : stop - first]
        return torch.from_numpy(bits).to(self._device, torch.bool)

    def _logprobs(
        self, raw_QV: Tensor, tokens_Q: Tensor, asked: list[int], wants: list[int | None]
    ) -> list[TokenLogprob | None]:
        entries: list[TokenLogprob | None] = [None] * len(wants)
        most = max(want for want in wants if want is not None)
        for row, entry in zip(asked, token_logprobs(self.ops, raw_QV, tokens_Q, most), strict=True):
            entries[row] = TokenLogprob(entry.logprob, entry.rank, entry.top[: wants[row]])
        return entries

    def _tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


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
