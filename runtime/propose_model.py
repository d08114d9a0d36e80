"""Guesses by a smaller model of the same vocabulary, which lives in the driver.

It draws with the noise of the very places that the model draws for, so sampled guesses are right about as often as
greedy ones. Its cache has the scheduler's own block tables: what is cached, shared, preempted or cut into chunks for
the model is so for it, too. It follows every step behind the model, and what it has not computed yet of a sequence it
computes with its first guess.

Its logits are adjusted as the model's are, by mask, bias, minimum length and penalties: what the model may not draw is
not guessed. Where a sequence ends while other plans are in flight, a block's next holder may find its keys overwritten
once: guesses get worse, answers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..kernels.ops import Ops
from .adjust import Adjustments
from .batch import SequenceTable
from .errors import RowFailed
from .plan import Slice, StepPlan, StepResult, drawn_by
from .propose import Ask
from .runner import Runner


@dataclass(slots=True)
class _Line:
    """What has been guessed behind one sequence, and what may come next."""

    ask: Ask
    mask: bytes | None
    guesses: list[int] = field(default_factory=list)

    def goes_on(self, token: int) -> bool:
        """Take a drawn token, -1 for none, as a guess. Whether another may follow it."""
        if token < 0:
            return False
        self.guesses.append(token)
        if len(self.guesses) == self.ask.most:
            return False
        if self.mask is None:
            return True
        try:
            masks = self.ask.constraint.look_ahead(self.guesses)
        except RowFailed:
            return False
        self.mask = masks[-1] if masks else None
        return len(masks) == len(self.guesses)  # else the last one ends the log


class DraftModel:
    """A `Proposer`. `_computed` is how many tokens of each slot have their keys in its own cache."""

    def __init__(
        self,
        runner: Runner,
        table: SequenceTable,
        ops: Ops,
        *,
        vocab_size: int,
        block_size: int,
        num_threads: int | None = None,
    ) -> None:
        """num_threads: see `ModelWorker`; None leaves them as they are."""
        self._runner = runner
        self._table = table
        self._ops = ops
        self._adjustments = Adjustments(slice(0, vocab_size), ops.device)
        self._block_size = block_size
        self._num_threads = num_threads
        self._computed: dict[int, int] = {}

    @torch.inference_mode()
    def propose(self, asks: list[Ask]) -> list[list[int]]:
        """One step a guess for all of them together; the first computes what was left undone."""
        lines = {ask.slot: _Line(ask, ask.mask) for ask in asks}
        parts = []
        for ask in asks:
            self._table.foresee(ask.slot, ask.blocks)
            start = self._computed[ask.slot]
            parts.append(Slice(ask.slot, start, len(ask.tokens) - start, True))
        while parts:
            drawn = self._compute(parts, lines)
            going_on = [slot for slot, token in drawn.items() if lines[slot].goes_on(token)]
            parts = [Slice(slot, self._computed[slot], 1, True) for slot in going_on]
        return [line.guesses for line in lines.values()]

    @torch.inference_mode()
    def follow(self, plan: StepPlan, result: StepResult) -> None:
        """Take over what the step brought. Blocks that are full are computed at once: they may be found by others."""
        self._table.apply(plan)
        for admission in plan.admissions:
            self._adjustments.admit(admission)
        admitted = {admission.slot for admission in plan.admissions}
        owed = []
        for part, (drawn, _) in zip(plan.slices, drawn_by(plan, result), strict=True):
            slot = part.slot
            if slot in admitted:
                self._computed[slot] = part.start
            known = part.start + part.count - len(plan.drafts.get(slot, ()))
            self._table.tokens[slot, known : known + len(drawn)] = [max(token, 0) for token in drawn]
            self._adjustments.say(slot, drawn)
            end = known + max(0, len(drawn) - 1)  # what the model has computed
            start = self._computed[slot] = min(self._computed[slot], end)
            if start // self._block_size < end // self._block_size:
                owed.append(Slice(slot, start, end - start, False))
        if owed:
            self._compute(owed, {})

    def _compute(self, parts: list[Slice], lines: Mapping[int, _Line]) -> dict[int, int]:
        """Keys and values of these tokens, and what is drawn behind them; -1 where nothing can be.

        lines: by slot, of those that draw.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            self._num_threads = None
        batch = self._runner.upload(self._table.batch(sorted(parts, key=lambda part: part.count > 1)))
        hidden_TD = self._runner.layers(self._runner.embed(batch), batch)
        self._computed.update((part.slot, part.start + part.count) for part in parts)
        if not batch.slots:
            return {}
        logits_RV = self._runner.logits(hidden_TD[batch.rows_R])
        for row, slot in enumerate(batch.slots):
            line, position = lines[slot], int(batch.next_positions[row])
            self._adjustments.apply(
                logits_RV[row : row + 1], slot, position=position, mask=line.mask, guesses=line.guesses
            )
        tokens_R = self._ops.sample(logits_RV, batch.sampling)
        self._table.append(batch.slots, batch.next_positions, tokens_R.clamp(min=0).cpu().numpy())
        return dict(zip(batch.slots, tokens_R.tolist(), strict=True))
