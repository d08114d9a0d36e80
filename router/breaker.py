"""Beside station 5: whether it is worth asking something that has failed. Pure: its clock and its dice are given.

    closed      everybody may ask; so many failures in a row open it
    open        nobody may, for a while that doubles each time, with jitter, up to a limit
    half-open   behind that while one may, its probe: success closes, failure opens for longer

It stays wary: one that opens again soon after it closed goes on with the while it had, so what comes and goes is asked
ever less often. (M. Nygard, Release It!, "Circuit Breaker"; the jitter keeps many ingresses from asking at once.)
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Breaker:
    """Who asks takes a ticket, and tells with it what became of the call.

    A ticket counts while the breaker is in the state that gave it out: how a call ends that began before says nothing
    of now. Invariants: while it is open no ticket is out but one probe's; `failures` failures without a success
    between them open it, fewer never do; it closes by a probe's success alone.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        cool_s: float = 0.5,
        max_cool_s: float = 30.0,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """failures: in a row, to open. cool_s, max_cool_s: the first and the longest while that it stays open."""
        self._limit = failures
        self._first_s = cool_s
        self._longest_s = max_cool_s
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._cool_s = 0.0  # of the last opening; 0 once it has been forgotten
        self._probe_at: float | None = None  # None: closed
        self._probing = False
        self._closed_at = clock()
        self._epoch = 0

    @property
    def is_open(self) -> bool:
        """Half-open, too: then nobody but the probe is let through."""
        return self._probe_at is not None

    @property
    def probe_in_s(self) -> float:
        """Seconds until a probe may go; 0.0 where one may now, or where none is needed."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    def enter(self) -> int | None:
        """A ticket for one call; None where it must not be made."""
        if self._probe_at is not None:
            if self._probing or self._clock() < self._probe_at:
                return None
            self._probing = True
            self._epoch += 1
        return self._epoch

    def succeeded(self, ticket: int) -> None:
        """The call was answered."""
        if ticket != self._epoch:
            return
        self._failures = 0
        now = self._clock()
        if self._probe_at is not None:
            self._probe_at, self._probing, self._closed_at = None, False, now
            self._epoch += 1
        elif now - self._closed_at >= self._cool_s:
            self._cool_s = 0.0

    def failed(self, ticket: int) -> None:
        """The call was not answered."""
        if ticket != self._epoch:
            return
        self._failures += 1
        if self._probing or self._failures >= self._limit:
            self._open()

    def left(self, ticket: int) -> None:
        """The call was given up by its caller: that says nothing, and a probe's place is free again."""
        if ticket == self._epoch:
            self._probing = False

    def _open(self) -> None:
        self._cool_s = min(self._longest_s, 2 * self._cool_s or self._first_s)
        self._probe_at = self._clock() + self._cool_s * self._rng.uniform(0.5, 1.0)
        self._failures, self._probing = 0, False
        self._epoch += 1
