"""One replica's loop, one step a call: plan, submit, collect, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ..parallel.group import WorkerGroup
from .errors import EngineDead
from .generation import FinishReason, GenerationRequest, TokenEvent
from .grammar import FREE, Constraint
from .plan import StepPlan, StepResult
from .scheduler import Scheduler
from .sequence import Ending
from .stats import Stats


class Engine:
    """Logs go in, events come out. Not thread-safe: `AsyncEngine` gives it a thread of its own.

    Up to `group.depth` plans are in flight, so that with a depth of 2 the host plans while the ranks compute.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup[StepPlan, StepResult],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`clock` measures the host's share of a step; it decides nothing."""
        self._scheduler = scheduler
        self._group = group
        self._clock = clock
        self._in_flight: deque[StepPlan] = deque()
        self._death: EngineDead | None = None
        self._num_steps = 0
        self._host_s = 0.0
        self._device_s = 0.0

    def add(self, request: GenerationRequest, constraint: Constraint = FREE) -> None:
        """Take in a log; its events come from `step`. `constraint` stands behind `request.tokens`.

        Raises:
            InvalidRequest, ContextTooLong, QueueFull, RowFailed: nothing was taken in. EngineDead: see `step`.
        """
        self._check_alive()
        self._scheduler.add(request, constraint)

    def check_queue(self, num_coming: int = 0) -> None:
        """Raise QueueFull if one more request, behind `num_coming` others, would be refused. Any thread may ask."""
        self._scheduler.check_queue(num_coming)

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a log; gives its terminal event, or None if it is not live. Its slot and blocks are free at once."""
        return self._scheduler.abort(request_id)

    def end_all(self, reason: FinishReason, *, error: str | None = None) -> list[TokenEvent]:
        """End every live log; gives their terminal events, and whatever was not delivered before."""
        return self._scheduler.end_all(Ending(reason, error=error))

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._scheduler.has_work

    def step(self) -> list[TokenEvent]:
        """Fill the pipeline, wait for its oldest step, and give what came of it.

        Raises:
            EngineDead: a rank, or the host's own code, failed. No live log has ended: `end_all` does that.
        """
        self._check_alive()
        try:
            return self._step()
        except Exception as error:
            self._death = EngineDead(f"the engine has stopped: {type(error).__name__}: {error}")
            raise self._death from error

    def _step(self) -> list[TokenEvent]:
        while len(self._in_flight) < self._group.depth:
            began = self._clock()
            plan = self._scheduler.schedule()
            self._host_s += self._clock() - began
            if plan is None:
                break
            self._group.submit(plan)
            self._in_flight.append(plan)
        if not self._in_flight:
            events = self._scheduler.take_events()
            assert events or not self._scheduler.has_work, "there is work, and none of it can be planned"
            return events
        result = self._group.collect()
        began = self._clock()
        events = self._scheduler.update(self._in_flight.popleft(), result)
        self._host_s += self._clock() - began
        self._device_s += result.device_s
        self._num_steps += 1
        return events

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(str(self._death)) from self._death

    def stats(self) -> Stats:
        """How things stand. O(live generations)."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_blocks_held=scheduler.pool.num_blocks - scheduler.pool.num_free,
            tokens_owed=scheduler.tokens_owed(),
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            preemptions=counters.preemptions,
            finished=dict(counters.finished),
            steps=self._num_steps,
            host_s=self._host_s,
            device_s=self._device_s,
        )

    def close(self) -> None:
        """End the ranks. Idempotent."""
        self._death = self._death or EngineDead("the engine was closed")
        self._group.close()
