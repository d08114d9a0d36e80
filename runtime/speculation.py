"""Whose next tokens are guessed, how many, and whether it pays: what the scheduler knows of speculative decoding.

Guesses are computed behind a sequence's known tokens and count for nothing until the model has drawn the same ones:
not as known, not as computed, not in a block's name. What they take, the budget and the blocks, is what others leave.
"""

from __future__ import annotations

from itertools import takewhile

from .blocks import BlockPool
from .errors import RowFailed
from .outline import Outline
from .plan import StepPlan, StepResult
from .propose import Ask, NoProposer, Proposer
from .sequence import Sequence
from .stats import Counters

WORTHWHILE = 0.2  # share of its guesses that must be right, lately, for a sequence to be guessed at
REST = 32  # tokens that it says by itself before it gets another chance
_WEIGHT = 0.25  # of the last step in that share


class Speculation:
    """Puts guesses into plans, and learns how many were right."""

    def __init__(self, proposer: Proposer, *, num_tokens: int, max_batch: int) -> None:
        """num_tokens: guesses a row at most. max_batch: with more sequences running nobody is guessed at."""
        self.num_tokens = num_tokens
        self._proposer = proposer
        self._max_batch = max_batch

    def wants(self, seq: Sequence, num_running: int) -> bool:
        """Whether the sequence is to be guessed at, so that its rows wait until its last token is known."""
        return num_running <= self._max_batch and len(seq.tokens) >= seq.rests_until

    def extend(self, outline: Outline, pool: BlockPool, *, num_running: int) -> None:
        """Put guesses behind the single rows that are planned."""
        if num_running > self._max_batch:
            return
        asks, indexes, budget = [], [], outline.budget
        for index, (seq, _) in enumerate(outline.single_rows):
            if not self.wants(seq, num_running) or not _is_ready(seq):
                continue
            most = min(self.num_tokens, seq.limit - len(seq.tokens) - 1, budget)
            most = _room(outline, seq, most, pool=pool, reserve=num_running)
            if most > 0:
                budget -= most
                indexes.append(index)
                asks.append(Ask(seq.slot, seq.tokens, seq.blocks, most, seq.mask, seq.constraint))
        for index, drafts in zip(indexes, self._proposer.propose(asks) if asks else (), strict=True):
            drafts, masks = _allowed(outline.single_rows[index][0], drafts)
            if drafts:
                outline.guess(index, drafts, masks)

    def learn(self, seq: Sequence, counters: Counters, *, num_right: int) -> None:
        """The result of a step with guesses is back, and so many of them have been said."""
        counters.spec_drafts += 1
        counters.spec_drafted_tokens += seq.num_guesses
        counters.spec_accepted_tokens += num_right
        seq.luck += _WEIGHT * (num_right / seq.num_guesses - seq.luck)
        seq.num_guesses = 0
        if seq.luck < WORTHWHILE:
            seq.luck = WORTHWHILE
            seq.rests_until = len(seq.tokens) + REST

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        """See `Proposer.follow`."""
        self._proposer.follow(plan, result)


NO_SPECULATION = Speculation(NoProposer(), num_tokens=0, max_batch=0)


def _is_ready(seq: Sequence) -> bool:
    """Whether all is known that decides the sequence's next token: nothing of it is in flight, and it has its mask."""
    return seq.has_taken and seq.num_pending == 1 and (seq.free or seq.mask is not None)


def _room(outline: Outline, seq: Sequence, most: int, *, pool: BlockPool, reserve: int) -> int:
    """For how many guesses there are blocks. It takes what nobody needs and drives nobody out."""
    known, size = len(seq.tokens), pool.block_size
    short = pool.blocks_for(known + most) - len(seq.blocks)
    if most > 0 and 0 < short <= pool.num_free - reserve:
        grown = pool.allocate(short)
        seq.blocks += grown
        outline.blocks.append((seq.slot, grown))
    return min(most, len(seq.blocks) * size - known)


def _allowed(seq: Sequence, drafts: list[int]) -> tuple[list[int], list[bytes]]:
    """The guesses up to the first that ends the log or breaks its grammar, and the masks behind them if it has one."""
    drafts = list(takewhile(lambda token: token not in seq.stop_ids, drafts))
    if seq.free or not drafts:
        return drafts, []
    try:
        masks = seq.constraint.look_ahead(drafts)
    except RowFailed:
        return [], []
    return drafts[: len(masks)], masks
