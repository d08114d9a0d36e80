"""Guesses by looking back: what followed the last words where they were said before (prompt lookup).

Costs nothing but a dictionary, and is right where an answer repeats its prompt: summaries, edits, code, extraction.
The idea is A. Saxena's (prompt-lookup-decoding, 2023); the index is that of LZ77 compressors, a chain of the places
where the same pair of tokens stands.
"""

from __future__ import annotations

from .plan import StepPlan, StepResult
from .propose import Ask

SHORTEST, LONGEST = 2, 4  # tokens that must have been said before, and that are compared at most
_CANDIDATES = 8  # places that are compared, the latest first


class NgramProposer:
    """One index a slot, made when it is first asked for and extended as the log grows: O(1) a token."""

    def __init__(self) -> None:
        self._indexes: dict[int, PairIndex] = {}

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        return [self._indexes.setdefault(ask.slot, PairIndex()).guess(ask.tokens, ask.most) for ask in asks]

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        for admission in plan.admissions:
            self._indexes.pop(admission.slot, None)


class PairIndex:
    """Where each pair of tokens ends in one log."""

    __slots__ = ("_before", "_latest")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._before = [-1]  # for each place, where the pair that ends there had ended before

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What stood behind the latest of the places that agree longest with the log's end, `SHORTEST` tokens at least.

        tokens: the log given last, or that with more behind it. Where the place overlaps the end the log goes in
        circles, and so does the guess.
        """
        self._extend(tokens)
        last = len(tokens) - 1
        best, length, place = -1, 0, self._before[last]
        for _ in range(_CANDIDATES):
            if place < 0 or length == LONGEST:
                break
            agrees = SHORTEST
            while agrees < LONGEST and agrees <= place and tokens[place - agrees] == tokens[last - agrees]:
                agrees += 1
            if agrees > length:
                best, length = place, agrees
            place = self._before[place]
        if best < 0:
            return []
        found = tokens[best + 1 : best + 1 + most]
        while len(found) < most:
            found += found[: most - len(found)]
        return found

    def _extend(self, tokens: list[int]) -> None:
        latest, before = self._latest, self._before
        for place in range(len(before), len(tokens)):
            pair = (tokens[place - 1], tokens[place])
            before.append(latest.get(pair, -1))
            latest[pair] = place
