"""Behind station 8: what a replica tells whoever settles how many replicas there are (cluster/scaling.py), and back.

A report is a moment's figures and totals since the start; rates are the reader's, over whatever window it likes. Ray
Serve carries it as a dictionary of numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from ..runtime.stats import Stats

WINDOW_S = 15.0  # of first tokens
LOOK_S = 0.5  # a step's mean time is taken over so long, or over
LOOK_STEPS = 10  # so many steps
_MOST = 4096  # first tokens that are remembered


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """One replica at one moment.

    arrived, finished: generations ever taken in, and those of them that have ended. computed: tokens ever computed, of
    prompts and answers. steps, busy_s: ever made, and the seconds that they took. floor_s: what a step takes however
    few are in it, as far as this replica has seen. num_first, ttft_s: first tokens of the last `WINDOW_S`, and the time
    that nine of ten of them took; whoever still waits for one counts with what it has waited. leaving: takes no more.
    num_queued, queued_s: what waits for a place at all ingresses, before any replica, and how long the first of it has;
    these are the part's, and every replica of it says the same.
    """

    num_running: int = 0
    num_waiting: int = 0
    tokens_owed: int = 0
    prefill_owed: int = 0
    kv_usage: float = 0.0
    arrived: int = 0
    finished: int = 0
    computed: int = 0
    steps: int = 0
    busy_s: float = 0.0
    floor_s: float = 0.0
    num_first: int = 0
    ttft_s: float = 0.0
    leaving: bool = False
    num_queued: int = 0
    queued_s: float = 0.0

    @property
    def started(self) -> int:
        """Generations that wait no more."""
        return self.arrived - self.num_waiting

    @property
    def live(self) -> int:
        """Generations that have not ended."""
        return self.num_running + self.num_waiting

    def as_numbers(self) -> dict[str, float]:
        """As Serve takes it: names to numbers."""
        return {name: float(value) for name, value in msgspec.structs.asdict(self).items()}


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, for people and metrics: so many replicas of a part there are to be, and why (cluster/scaling.py).

    most, ttft_s: the bound and the objective. since, said_at: unix seconds, of the last change of number or reason, and
    of this word.
    """

    replicas: int
    reason: str
    words: str
    most: int
    ttft_s: float
    since: float
    said_at: float


def report_of(numbers: Mapping[str, float]) -> LoadReport:
    """The inverse of `as_numbers`; unknown names are left out, missing ones are 0."""
    fields = msgspec.structs.fields(LoadReport)
    return LoadReport(**{field.name: field.type(numbers[field.name]) for field in fields if field.name in numbers})


class LoadWatch:
    """Keeps what the engine's statistics lack: times to first tokens, and the cheapest step."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, float] = {}  # request -> when it came
        self._first: deque[tuple[float, float]] = deque(maxlen=_MOST)  # when, and how long it took
        self._floor_s = 0.0
        self._steps, self._busy_s = 0, 0.0  # at the last look

    @contextmanager
    def watching(self, request: str) -> Iterator[None]:
        """Meanwhile it is here."""
        self.came(request)
        try:
            yield
        finally:
            self._waiting.pop(request, None)

    def came(self, request: str) -> None:
        """It waits for its first token."""
        self._waiting[request] = self._clock()

    def spoke(self, request: str) -> None:
        """It has a token; the first one counts."""
        if (came := self._waiting.pop(request, None)) is not None:
            now = self._clock()
            self._first.append((now, now - came))

    def report(self, stats: Stats, *, leaving: bool = False, num_queued: int = 0, queued_s: float = 0.0) -> LoadReport:
        """How things stand now. num_queued, queued_s: as ingresses say."""
        now = self._clock()
        while self._first and self._first[0][0] < now - WINDOW_S:
            self._first.popleft()
        took = sorted([seconds for _, seconds in self._first] + [now - came for came in self._waiting.values()])
        self._look(stats)
        finished = sum(stats.finished.values())
        return LoadReport(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            tokens_owed=stats.tokens_owed,
            prefill_owed=stats.prefill_tokens_owed,
            kv_usage=stats.kv_usage,
            arrived=finished + stats.num_running + stats.num_waiting,
            finished=finished,
            computed=stats.prefix_query_tokens - stats.prefix_hit_tokens + stats.generation_tokens,
            steps=stats.steps,
            busy_s=stats.device_s,
            floor_s=self._floor_s,
            num_first=len(took),
            ttft_s=took[min(len(took) - 1, int(0.9 * len(took)))] if took else 0.0,
            leaving=leaving,
            num_queued=num_queued,
            queued_s=queued_s,
        )

    def _look(self, stats: Stats) -> None:
        """The lowest mean time of a step, over steps that came one after the other."""
        steps, busy_s = stats.steps - self._steps, stats.device_s - self._busy_s
        if steps < 0 or busy_s < 0:  # the ranks are new
            self._steps, self._busy_s = stats.steps, stats.device_s
        elif steps and (busy_s >= LOOK_S or steps >= LOOK_STEPS):
            mean_s = busy_s / steps
            self._floor_s = min(self._floor_s, mean_s) if self._floor_s else mean_s
            self._steps, self._busy_s = stats.steps, stats.device_s
