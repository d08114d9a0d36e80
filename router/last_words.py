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
T = TypeVar("T")


class Word(msgspec.Struct, Generic[T], frozen=True, array_like=True):
    """at: when it was said, in unix seconds."""

    at: float
    said: T


class LastWords(Generic[T]):
    """Bounded: of the departed the last `keep` are known one by one, the others are given to `forget` once and for all.

    now: unix seconds. Invariant: no word is both kept and forgotten, and none is forgotten twice.
    """

    def __init__(self, *, keep: int, forget: Callable[[T], None], now: Callable[[], float]) -> None:
        self.words: dict[str, Word[T]] = {}
        self._keep = keep
        self._forget = forget
        self._now = now
        self._forgotten_until = 0.0

    def say(self, speaker: str, said: T) -> None:
        self.hear({speaker: Word(self._now(), said)})

    def hear(self, words: Mapping[str, Word[T]]) -> None:
        for speaker, word in words.items():
            known = self.words.get(speaker)
            if word.at > self._forgotten_until and (known is None or word.at >= known.at):
                self.words[speaker] = word
        departed = sorted((s for s in self.words if self._has_departed(s)), key=lambda s: self.words[s].at)
        for speaker in departed[: max(0, len(departed) - self._keep)]:
            word = self.words.pop(speaker)
            self._forgotten_until = max(self._forgotten_until, word.at)
            self._forget(word.said)

    def recent(self) -> dict[str, T]:
        """Of those who have not departed."""
        return {s: word.said for s, word in self.words.items() if not self._has_departed(s)}

    def departed(self) -> list[T]:
        return [word.said for s, word in self.words.items() if self._has_departed(s)]

    def _has_departed(self, speaker: str) -> bool:
        return self._now() - self.words[speaker].at > GRACE_S
