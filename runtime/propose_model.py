"""Guesses by a smaller model of the same vocabulary, which lives in the driver.

It draws with the noise of the very places that the model draws for, so sampled guesses are right about as often as
greedy ones. Its cache has the scheduler's own block tables: what is cached, shared, preempted or cut into chunks for
the model is so for it, too. It follows every step behind the model, and what it has not computed yet of a sequence it
computes with its first guess.

Masks and penalties it knows nothing of: it is wrong more often then. And where a sequence ends while other plans are in
flight, a block's next holder may find its keys overwritten once: guesses get worse, answers do not.
"""

from __future__ import annotations

import torch

from ..kernels.ops import Ops
from .batch import SequenceTable
from .plan import Slice, StepPlan, StepResult, drawn_by
from .propose import Ask
from .runner import Runner


class DraftModel:
    """A `Proposer`. `_computed` is how many tokens of each slot have their keys in its own cache."""

    def __init__(
        self, runner: Runner, table: SequenceTable, ops: Ops, *, block_size: int, num_threads: int | None = None
    ) -> None:
        """num_threads: see `ModelWorker`; None leaves them as they are."""
        self._runner = runner
        self._table = table
        self._ops = ops
        self._block_size = block_size
        self._num_threads = num_threads
        self._computed: dict[int, int] = {}

    @torch.inference_mode()
    def propose(self, asks: list[Ask]) -> list[list[int]]:
        """One step a guess for all of them together; the first computes what was left undone."""
        guesses: dict[int, list[int]] = {ask.slot: [] for ask in asks}
        parts = []
        for ask in asks:
            self._table.foresee(ask.slot, ask.blocks)
            start = self._computed[ask.slot]
            parts.append(Slice(ask.slot, start, len(ask.tokens) - start, True))
        most = {ask.slot: ask.most for ask in asks}
        while parts:
            drawn = self._compute(parts)
            for slot, token in drawn.items():
                if token >= 0:
                    guesses[slot].append(token)
            parts = [
                Slice(part.slot, self._computed[part.slot], 1, True)
                for part in parts
                if drawn[part.slot] >= 0 and len(guesses[part.slot]) < most[part.slot]
            ]
        return list(guesses.values())

    @torch.inference_mode()
    def follow(self, plan: StepPlan, result: StepResult) -> None:
        """Take over what the step brought. Blocks that are full are computed at once: they may be found by others."""
        self._table.apply(plan)
        admitted = {admission.slot for admission in plan.admissions}
        owed = []
        for part, (drawn, _) in zip(plan.slices, drawn_by(plan, result), strict=True):
            slot = part.slot
            if slot in admitted:
                self._computed[slot] = part.start
            known = part.start + part.count - len(plan.drafts.get(slot, ()))
            self._table.tokens[slot, known : known + len(drawn)] = [max(token, 0) for token in drawn]
            end = known + max(0, len(drawn) - 1)  # what the model has computed
            start = self._computed[slot] = min(self._computed[slot], end)
            if start // self._block_size < end // self._block_size:
                owed.append(Slice(slot, start, end - start, False))
        if owed:
            self._compute(owed)

    def _compute(self, parts: list[Slice]) -> dict[int, int]:
        """Keys and values of these tokens, and what is drawn behind them; -1 where nothing can be."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            self._num_threads = None
        batch = self._runner.upload(self._table.batch(sorted(parts, key=lambda part: part.count > 1)))
        hidden_TD = self._runner.layers(self._runner.embed(batch), batch)
        self._computed.update((part.slot, part.start + part.count) for part in parts)
        if not batch.slots:
            return {}
        logits_RV = self._runner.logits(hidden_TD[batch.rows_R])
        tokens_R = self._ops.sample(logits_RV, batch.sampling)
        self._table.append(batch.slots, batch.next_positions, tokens_R.clamp(min=0).cpu().numpy())
        return dict(zip(batch.slots, tokens_R.tolist(), strict=True))
