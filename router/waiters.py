"""Beside the stations: those that wait for the same thing, how many they are and how long the first of them has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waiters:
    """Belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[object, float] = {}  # in the order in which they came

    def __len__(self) -> int:
        return len(self._since)

    @property
    def longest_s(self) -> float:
        """Of those that wait now; 0 where nobody does."""
        return self._clock() - next(iter(self._since.values())) if self._since else 0.0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Meanwhile somebody waits."""
        waiter = object()
        self._since[waiter] = self._clock()
        try:
            yield
        finally:
            del self._since[waiter]
