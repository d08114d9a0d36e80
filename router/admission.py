"""Station 3: who may come in. A pure class: no I/O, no waiting, the clock is handed in.

There is one queue, the engine's; the router only caps how many generations are admitted and unfinished, so that a
refusal leaves at once and says when to come back. Invariant: `in_flight` is the sum of the weights of open tickets.
"""

from __future__ import annotations

from collections.abc import Callable

from ..runtime.errors import QueueFull, Unavailable

_SMOOTHING = 0.1  # weight of the newest gap between two ends in the mean
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 30.0


class Ticket:
    """Leave to run `weight` generations; closing it twice is closing it once."""

    def __init__(self, admission: Admission, weight: int) -> None:
        self._admission: Admission | None = admission
        self.weight = weight

    def close(self) -> None:
        if self._admission is not None:
            self._admission._leave(self.weight)
            self._admission = None


class Admission:
    """Caps the generations in flight; refuses all once draining."""

    def __init__(self, max_in_flight: int, *, clock: Callable[[], float]) -> None:
        self.in_flight = 0
        self.draining = False
        self._max = max_in_flight
        self._clock = clock
        self._mean_gap_s: float | None = None  # between two ends, smoothed
        self._since = 0.0  # the last end, or when the first one came in after an idle time

    def check(self) -> None:
        """Refuse before the body is read: cheap, so that refusals under overload cost next to nothing.

        Raises:
            Unavailable: draining. QueueFull: no room for even one generation.
        """
        if self.draining:
            raise Unavailable("the server is draining and takes no new requests", retry_after=1.0)
        if self.in_flight >= self._max:
            raise self._full(1)

    def enter(self, weight: int) -> Ticket:
        """Admit `weight` generations, all or none. Raises as `check` does."""
        self.check()
        if self.in_flight and self.in_flight + weight > self._max:  # one too big for the cap runs when it is alone
            raise self._full(weight)
        if not self.in_flight:
            self._since = self._clock()  # a quiet night is no pace
        self.in_flight += weight
        return Ticket(self, weight)

    def drain(self) -> None:
        self.draining = True

    def _leave(self, weight: int) -> None:
        now = self._clock()
        self.in_flight -= weight
        gap = (now - self._since) / weight
        mean = gap if self._mean_gap_s is None else self._mean_gap_s
        self._mean_gap_s = mean + _SMOOTHING * (gap - mean)
        self._since = now

    def _full(self, weight: int) -> QueueFull:
        over = self.in_flight + weight - self._max
        wait = min(_MAX_RETRY_S, max(_MIN_RETRY_S, over * (self._mean_gap_s or 1.0)))
        return QueueFull(
            f"{self.in_flight} generations are in flight and {weight} more were asked for; "
            f"at most {self._max} are admitted (max_in_flight)",
            retry_after=wait,
        )
