"""A whole grid of ranks in one process, each a thread: for tests, and to look at what the others do over sockets.

What ranks say to each other goes through memory, in the very order and shapes that it takes between processes. Torch
releases the interpreter's lock inside operations only, so this shows that a grid is right, never that it is fast.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from .comm import Comm, SoloComm
from .grid import Grid, Place
from .group import GroupFailure, GroupStartError, Plan, RankInfo, Result, Worker
from .ring import Ring
from .tensors import fold

DEADLINE_S = 60.0

WorkerFactory = Callable[[Place, Comm, Ring], Worker[Plan, Result]]


class _Meeting:
    """What the shards of one stage share: whoever calls waits for all."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=DEADLINE_S)
        self._given: list[Tensor | None] = [None] * size

    def exchange(self, shard: int, x: Tensor) -> list[Tensor]:
        """What every shard gave, by shard."""
        self._given[shard] = x.clone()
        self.barrier.wait()
        given = [part for part in self._given if part is not None]
        self.barrier.wait()
        return given


class ThreadComm:
    """A `Comm` over a meeting in memory."""

    def __init__(self, meeting: _Meeting, shard: int) -> None:
        self._meeting = meeting
        self.shard = shard
        self.size = meeting.barrier.parties

    def all_reduce(self, x: Tensor) -> Tensor:
        return fold(torch.add, self._meeting.exchange(self.shard, x), out=x)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return fold(torch.maximum, self._meeting.exchange(self.shard, x), out=x)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self.shard, x))


class ThreadRing:
    """A `Ring` of queues."""

    def __init__(self, inbound: "queue.Queue[Tensor | None]", outbound: "queue.Queue[Tensor | None]") -> None:
        self._inbound = inbound
        self._outbound = outbound

    def send(self, x: Tensor) -> None:
        self._outbound.put(x.clone())

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = self._inbound.get(timeout=DEADLINE_S)
        if x is None:
            raise ConnectionError("the ring was closed")
        assert (tuple(x.shape), x.dtype) == (shape, dtype), "sender and receiver disagree about the plan"
        return x


def thread_comms(size: int) -> list[Comm]:
    """The shards of one stage."""
    if size == 1:
        return [SoloComm()]
    meeting = _Meeting(size)
    return [ThreadComm(meeting, shard) for shard in range(size)]


@dataclass(slots=True)
class _Life(Generic[Plan, Result]):
    """The threads between two restarts, and what they share."""

    plans: list["queue.Queue[Plan | None]"]
    results: "queue.Queue[Result | GroupFailure]" = field(default_factory=queue.Queue)
    lines: list["queue.Queue[Tensor | None]"] = field(default_factory=list)
    meetings: list[_Meeting] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    is_over: bool = False


class ThreadGroup(Generic[Plan, Result]):
    """A `WorkerGroup` of threads. A rank that raises fails the group, as a process that dies does."""

    def __init__(self, grid: Grid, factory: WorkerFactory[Plan, Result], *, depth: int | None = None) -> None:
        """Returns when every rank is built; `factory` is called in the rank's own thread."""
        self.depth = grid.pp + 1 if depth is None else depth
        self._grid = grid
        self._factory = factory
        self._life = self._start()

    def _start(self) -> _Life[Plan, Result]:
        grid = self._grid
        life: _Life[Plan, Result] = _Life([queue.Queue() for _ in grid])
        life.lines = [queue.Queue() for _ in grid]  # by the rank that reads
        life.meetings = [_Meeting(grid.tp) for _ in range(grid.pp)]
        came_up: queue.Queue[BaseException | None] = queue.Queue()
        for place in grid:
            comm: Comm = SoloComm() if grid.tp == 1 else ThreadComm(life.meetings[place.stage], place.shard)
            ring = ThreadRing(life.lines[place.rank], life.lines[place.next_rank])
            target = (life, place, comm, ring, came_up)
            life.threads.append(threading.Thread(target=self._run, args=target, daemon=True))
            life.threads[-1].start()
        problems = [problem for problem in (came_up.get(timeout=DEADLINE_S) for _ in grid) if problem is not None]
        if problems:
            self._end(life)
            raise GroupStartError(str(problems[0]), kind=type(problems[0]).__name__)
        return life

    def _run(
        self,
        life: _Life[Plan, Result],
        place: Place,
        comm: Comm,
        ring: ThreadRing,
        came_up: "queue.Queue[BaseException | None]",
    ) -> None:
        try:
            worker = self._factory(place, comm, ring)
        except Exception as problem:  # noqa: BLE001 - told to whoever started the group
            came_up.put(problem)
            return
        came_up.put(None)
        while (plan := life.plans[place.rank].get()) is not None:
            try:
                result = worker.begin(plan).result()
            except Exception as problem:  # noqa: BLE001 - told to whoever collects
                if not life.is_over:
                    text = f"{place}: {type(problem).__name__}: {problem}"
                    life.results.put(GroupFailure(text, rank=place.rank, station="step", cause="exception"))
                return
            if place.answers:
                life.results.put(result)

    def submit(self, plan: Plan) -> None:
        for line in self._life.plans:
            line.put(plan)

    def collect(self) -> Result:
        result = self._life.results.get(timeout=DEADLINE_S)
        if isinstance(result, GroupFailure):
            self._end(self._life)
            raise result
        return result

    def check(self) -> None:
        pass

    def restart(self) -> None:
        self._end(self._life)
        self._life = self._start()

    def ranks(self) -> list[RankInfo]:
        return [RankInfo(rank=place.rank, stage=place.stage, shard=place.shard) for place in self._grid]

    def close(self) -> None:
        self._end(self._life)

    def _end(self, life: _Life[Plan, Result]) -> None:
        life.is_over = True
        for meeting in life.meetings:
            meeting.barrier.abort()
        for line in life.plans:
            line.put(None)
        for lines in life.lines:
            lines.put(None)
        for thread in life.threads:
            thread.join(DEADLINE_S)
