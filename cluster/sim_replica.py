"""One replica on the virtual clock: its scheduler, its step times, and what its clients get of it."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from ..runtime.blocks import BlockPool, Changes
from ..runtime.engine import stats_of
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.plan import StepPlan
from ..runtime.policy import FirstCome
from ..runtime.sequence import Limits
from ..runtime.stats import Counters, Stats
from .sim_config import SimConfig, StepCosts
from .sim_load import SECRET, VOCAB, Script
from .sim_scheduler import LeapingScheduler, Stretch

_NEVER = float("inf")


@dataclass(slots=True)
class Gaps:
    """Times between two tokens of one stream: so long, so many of them."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("q"))

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds.append(seconds)
        self.counts.append(count)


class SimReplica:
    """Steps follow each other while there is work; whoever arrives in the middle of one waits for the next.

    The host's work is part of a step's time, and one plan is in flight. Either a step is under way or a stretch of
    steps (`sim_scheduler.py`), taken when it is over or when somebody wants to know. `wakes_at` is the end of it.
    """

    def __init__(
        self, name: str, config: SimConfig, costs: StepCosts, *, clock: Callable[[], float], gaps: Gaps
    ) -> None:
        self.name = name
        self.born_at = clock()
        self.wakes_at = _NEVER
        self.num_steps = 0
        self.busy_s = 0.0
        self._costs = costs
        self._clock = clock
        self._gaps = gaps
        self._scheduler = LeapingScheduler(
            Limits(
                max_model_len=config.max_model_len,
                max_num_seqs=costs.max_num_seqs,
                max_num_batched_tokens=costs.max_num_batched_tokens,
                max_queued=config.max_queued,
                vocab_size=VOCAB,
            ),
            pool=BlockPool(costs.kv_tokens // costs.block_size, block_size=costs.block_size),
            policy=FirstCome(),
            clock=clock,
            secret=SECRET,
        )
        self._step: tuple[StepPlan, float] | None = None  # and its seconds
        self._stretch: Stretch | None = None
        self._begins: list[float] = []  # of the stretch's steps, and the end of the last
        self._silent: dict[str, float] = {}  # a log that has lost its slot, or came with tokens -> its last token

    # What comes in

    def take(self, request: GenerationRequest, script: Script, *, spoke_at: float | None = None) -> None:
        """A log arrives, which had its last token at `spoke_at`. Raises QueueFull."""
        self._scheduler.take(request, script)
        if spoke_at is not None:
            self._silent[request.id] = spoke_at
        if self.wakes_at == _NEVER:
            self._begin()
        else:
            self._cut_short()

    def wake(self) -> list[TokenEvent]:
        """The step or the stretch is over: gives first tokens and ends, and goes on. Other tokens are only counted."""
        if self._step is None:
            self._leap(len(self._begins) - 1)
            self._begin()
            return []
        plan, seconds = self._step
        events = self._scheduler.update(plan, self._scheduler.draw(plan))
        self.num_steps += 1
        self.busy_s += seconds
        notable = [event for event in events if event.start == 0 or event.finish_reason is not None]
        num_gaps = len(events) - sum(event.start == 0 for event in events)
        if self._silent:
            num_gaps -= self._speak(events)
        if num_gaps:
            self._gaps.add(seconds, num_gaps)
        for event in notable:
            if event.finish_reason is not None:
                self._scheduler.drop(event.id)
        self._begin()
        return notable

    def stats(self) -> Stats:
        """How things stand, as an engine would report it."""
        self._catch_up()
        return msgspec.structs.replace(stats_of(self._scheduler), steps=self.num_steps, device_s=self.busy_s)

    def changes(self) -> Changes:
        """What became of the cached blocks since this was asked last."""
        return self._scheduler.pool.take_changes()

    def logs(self) -> Mapping[str, list[int]]:
        """What every live log's answer has come to."""
        self._catch_up()
        return self._scheduler.logs()

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    def check(self) -> None:
        """Assert the scheduler's invariants. For tests."""
        self._scheduler.check()

    # Steps

    def _begin(self) -> None:
        """Plan what comes next, from now on."""
        now, costs = self._clock(), self._costs
        self._step = None
        self._stretch = stretch = self._scheduler.stretch()
        if stretch is not None:
            steps, rows, context = stretch
            self._begins = begins = [now]
            for step in range(steps):
                now += costs.step_s(0, rows, context + step * rows)
                begins.append(now)
            self.wakes_at = now
            return
        plan = self._scheduler.schedule()
        if self._scheduler.preempted:
            self._silent.update(dict.fromkeys(self._scheduler.preempted, now))
            self._scheduler.preempted.clear()
        if plan is None:
            self.wakes_at = _NEVER
            return
        seconds = self._seconds(plan)
        self._step = plan, seconds
        self.wakes_at = now + seconds

    def _seconds(self, plan: StepPlan) -> float:
        prefill = rows = context = 0
        for part in plan.slices:
            count = part.count
            context += part.start + count
            if count == 1:
                rows += 1
            else:
                prefill += count
        return self._costs.step_s(prefill, rows, context)

    def _catch_up(self) -> None:
        """Take the steps of a stretch that are over; the one under way and those behind it are yet to be taken."""
        if self._stretch is not None:
            self._leap(min(bisect_right(self._begins, self._clock()), len(self._begins) - 1) - 1)

    def _cut_short(self) -> None:
        """End a stretch with the step that is under way."""
        if self._stretch is not None and len(self._begins) > 2:
            steps = max(1, bisect_left(self._begins, self._clock()))
            del self._begins[steps + 1 :]
            self.wakes_at = self._begins[-1]

    def _leap(self, steps: int) -> None:
        """Take the first steps of the stretch."""
        if steps < 1:
            return
        assert self._stretch is not None, "only stretches are leapt over"
        begins, rows = self._begins, self._stretch.rows
        self._scheduler.leap(steps)
        for began, ended in pairwise(begins[: steps + 1]):
            self._gaps.add(ended - began, rows)
        self.num_steps += steps
        self.busy_s += begins[steps] - begins[0]
        del begins[:steps]

    def _speak(self, events: list[TokenEvent]) -> int:
        """Gaps of those that were silent for longer than this step; gives their number."""
        now, silent = self._clock(), self._silent
        spoken = [event for event in events if event.id in silent]
        for event in spoken:
            since = silent.pop(event.id)
            if event.start:
                self._gaps.add(now - since)
        return sum(event.start > 0 for event in spoken)
