"""Beside the stations: what each of many speakers said last, whoever heard it.

Totals outlive who counted them, and whoever is asked for a sum must give the same one. So those who heard tell each
other all they heard; of two words of one speaker the newer counts, in whatever order they come. A speaker that was
silent for `GRACE_S` has departed: until then it may only be late, and its totals stay under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import msgspec

GRACE_S = 300.0
FORGOTTEN = "forgotten"  # under which name the sum of all who are no longer known one by one is told
T = TypeVar("T")


class Word(msgspec.Struct, Generic[T], frozen=True, array_like=True):
    """at: when it was said, in unix seconds."""

    at: float
    said: T


class LastWords(Generic[T]):
    """Bounded: of the departed the last `keep` are known one by one, the others are added up, once and for all.

    That sum is a word like the others, so who comes later hears it: of two the one that reaches further counts. now:
    unix seconds. Invariant: no word is both kept and in the sum, and none is twice in it.
    """

    def __init__(self, *, keep: int, add: Callable[[T, T], T], now: Callable[[], float]) -> None:
        self.words: dict[str, Word[T]] = {}
        self._keep = keep
        self._add = add
        self._now = now

    def say(self, speaker: str, said: T) -> None:
        self.hear({speaker: Word(self._now(), said)})

    def hear(self, words: Mapping[str, Word[T]]) -> None:
        theirs = words.get(FORGOTTEN)
        if theirs is not None and theirs.at > self._forgotten_until:
            self.words = {s: word for s, word in self.words.items() if word.at > theirs.at} | {FORGOTTEN: theirs}
        for speaker, word in words.items():
            known = self.words.get(speaker)
            if word.at > self._forgotten_until and (known is None or word.at >= known.at):
                self.words[speaker] = word
        departed = sorted((s for s in self.words.keys() - {FORGOTTEN} if self._has_departed(s)), key=self._at)
        if len(departed) > self._keep:
            until = self._at(departed[-self._keep - 1])
            for speaker in (s for s in departed if self._at(s) <= until):
                self._put_to_sum(self.words.pop(speaker))

    def recent(self) -> dict[str, T]:
        """Of those who have not departed."""
        return {s: word.said for s, word in self.words.items() if not self._has_departed(s)}

    def departed(self) -> list[T]:
        """Of all others; the sum of the forgotten is one of them."""
        return [word.said for s, word in self.words.items() if self._has_departed(s)]

    @property
    def _forgotten_until(self) -> float:
        forgotten = self.words.get(FORGOTTEN)
        return 0.0 if forgotten is None else forgotten.at

    def _put_to_sum(self, word: Word[T]) -> None:
        forgotten = self.words.get(FORGOTTEN)
        said = word.said if forgotten is None else self._add(forgotten.said, word.said)
        self.words[FORGOTTEN] = Word(word.at, said)

    def _at(self, speaker: str) -> float:
        return self.words[speaker].at

    def _has_departed(self, speaker: str) -> bool:
        return self._now() - self._at(speaker) > GRACE_S
