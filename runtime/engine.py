"""Station 9: one replica's loop, one step a call: plan, submit, collect, update. It outlives its ranks."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from ..parallel.group import GroupFailure, GroupStartError, RankInfo, WorkerGroup
from .blocks import Changes
from .errors import EngineDead
from .generation import FinishReason, GenerationRequest, TokenEvent
from .grammar import FREE, Constraint
from .plan import StepPlan, StepResult
from .scheduler import Scheduler
from .sequence import Ending
from .stats import Stats

log = logging.getLogger(__name__)

GOOD_STEPS = 100  # so many without a failure, and the ones before count no more


class Engine:
    """Logs go in, events come out. Not thread-safe: `AsyncEngine` gives it a thread of its own.

    Up to `group.depth` plans are in flight, so that with a depth of 2 the host plans while the ranks compute.

    When a rank fails, the step in which that is seen judges whose fault it was (`quarantine.py`), and the next one
    starts all ranks anew; live logs then go on from their tokens.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup[StepPlan, StepResult],
        *,
        clock: Callable[[], float] = time.perf_counter,
        max_restarts: int = 5,
    ) -> None:
        """`clock` measures the host's share of a step; it decides nothing.

        max_restarts: of the ranks in a row. One that ended the request which had caused it is forgotten with the first
        step that succeeds, any other after `GOOD_STEPS`.
        """
        self._scheduler = scheduler
        self._group = group
        self._clock = clock
        self._in_flight: deque[StepPlan] = deque()
        self._death: EngineDead | None = None
        self._failure: GroupFailure | None = None  # of the ranks, which are to start anew
        self._max_restarts = max_restarts
        self._num_in_a_row = 0
        self._good_steps_due = 0  # before the restarts in a row are forgotten
        self._num_restarts = 0
        self._rank_failures: Counter[str] = Counter()
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
        return self._failure is not None or self._scheduler.has_work

    @property
    def restarting(self) -> str | None:
        """Why the next step starts all ranks anew, in words; None if it does not."""
        return None if self._failure is None else f"restarting the ranks after: {self._failure}"

    def step(self) -> list[TokenEvent]:
        """Fill the pipeline, wait for its oldest step, and give what came of it. After a failure: restart the ranks.

        Raises:
            EngineDead: the ranks cannot be restarted, or the host's own code failed. No live log has ended: `end_all`
                does that.
        """
        self._check_alive()
        try:
            return self._step() if self._failure is None else self._restart(self._failure)
        except Exception as error:
            words = str(error) if isinstance(error, GroupStartError) else f"{type(error).__name__}: {error}"
            self._death = EngineDead(f"the engine has stopped: {words}")
            raise self._death from error

    def _step(self) -> list[TokenEvent]:
        try:
            return self._turn()
        except GroupFailure as failure:
            return self._recover(failure)

    def _turn(self) -> list[TokenEvent]:
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
        if self._good_steps_due:
            self._good_steps_due -= 1
            if not self._good_steps_due:
                self._num_in_a_row = 0
        return events

    def _recover(self, failure: GroupFailure) -> list[TokenEvent]:
        """Count what was in flight as lost. The restart is the next step's, so that events get out before it."""
        self._in_flight.clear()
        self._failure = failure
        self._rank_failures[f"{failure.cause},{failure.rank},{failure.station}"] += 1
        verdict = self._scheduler.recover(is_suspect=failure.is_suspect, slots=failure.slots)
        self._good_steps_due = 1 if verdict.guilty else GOOD_STEPS
        log.warning(
            "the ranks failed: %s (rank %s, station %r); %d generations go on, %d of them alone first; %d ended",
            failure,
            "unknown" if failure.rank is None else failure.rank,
            failure.station,
            self._scheduler.num_waiting,
            self._scheduler.quarantine.num_suspects,
            len(verdict.guilty),
        )
        return self._scheduler.take_events()

    def _restart(self, failure: GroupFailure) -> list[TokenEvent]:
        if self._num_in_a_row >= self._max_restarts:
            raise GroupStartError(f"{self._num_in_a_row} restarts in a row did not help; the last failure: {failure}")
        self._num_in_a_row += 1
        try:
            self._group.restart()
        except (GroupFailure, GroupStartError) as error:
            raise GroupStartError(f"{failure}; the ranks did not come back: {error}") from error
        if self._death is not None:  # closed meanwhile, maybe too early for the new ranks
            self._group.close()
        self._failure = None
        self._num_restarts += 1
        return self._scheduler.take_events()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(str(self._death)) from self._death

    def check(self) -> None:
        """See, while there is no work, whether the ranks are well: if not, there is work."""
        if self._failure is None:
            try:
                self._group.check()
            except GroupFailure as failure:
                self._recover(failure)

    def stats(self) -> Stats:
        """How things stand. O(live generations)."""
        return msgspec.structs.replace(
            stats_of(self._scheduler),
            restarts=self._num_restarts,
            rank_failures=dict(self._rank_failures),
            steps=self._num_steps,
            host_s=self._host_s,
            device_s=self._device_s,
        )

    def take_cache_changes(self) -> Changes:
        """What the cache has gained and lost since the last call."""
        return self._scheduler.pool.take_changes()

    def ranks(self) -> list[RankInfo]:
        """The grid as it stands. Any thread may ask."""
        return self._group.ranks()

    def close(self) -> None:
        """End the ranks. Idempotent."""
        self._death = self._death or EngineDead("the engine was closed")
        self._group.close()


def stats_of(scheduler: Scheduler) -> Stats:
    """What a scheduler knows of how things stand; nothing of ranks and steps. O(live generations)."""
    pool, counters = scheduler.pool, scheduler.counters
    return Stats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_blocks=pool.num_blocks,
        num_blocks_held=pool.num_blocks - pool.num_free,
        block_size=pool.block_size,
        tokens_owed=scheduler.tokens_owed(),
        prefill_tokens_owed=scheduler.prefill_owed(),
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        prefix_query_tokens=counters.prefix_query_tokens,
        prefix_hit_tokens=counters.prefix_hit_tokens,
        preemptions=counters.preemptions,
        quarantined=counters.quarantined,
        poisoned=counters.poisoned,
        spec_drafts=counters.spec_drafts,
        spec_drafted_tokens=counters.spec_drafted_tokens,
        spec_accepted_tokens=counters.spec_accepted_tokens,
        finished=dict(counters.finished),
    )
