"""Replicas in process, on a virtual clock, that are killed, stopped and drained: a `Backend` that loses them.

Each replica is the real engine and scheduler over a fake rank (tests/runtime/fakes.py), so its tokens are a hash of all
that was before and its cache knows who wrote what. It ends its streams as the line does: all at once where it breaks,
after `SILENCE_S` where it is stopped, and after `DRAIN_S` with an abort where it drains.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from shoal.parallel.group import RankInfo
from shoal.router.backend import Backend, ModelInfo, ReplicaLost, ReplicaState, Status
from shoal.router.line import Welcome
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import LineServer
from shoal.runtime.blocks import BlockPool
from shoal.runtime.engine import Engine
from shoal.runtime.errors import ShoalError, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent
from shoal.runtime.grammar import FREE, Constraint
from shoal.runtime.plan import Admission, StepPlan, StepResult
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.stats import Stats

from ..runtime.fakes import FakeWorker, Outcome, Stepwise, isolated
from ..tiny import EOS
from .fakes import INFO, MAX_MODEL_LEN, SECRET, VOCAB_SIZE

STEP_S = 0.02
RESTART_S = 3.0
DOUBT_S = 2.0  # without a heartbeat: then it is no longer chosen,
SILENCE_S = 10.0  # and then it is lost
DRAIN_S = 0.5
LIMITS = Limits(
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=32,
    max_num_batched_tokens=256,
    max_queued=64,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset([EOS]),
)


Kills = Callable[[GenerationRequest, int], bool]


def constraint_of(request: GenerationRequest) -> Constraint:
    """Whatever regex is asked for stands for one that is easy to check."""
    if request.params.structured_outputs is None:
        return FREE
    return Stepwise(period=3, length=30, vocab=VOCAB_SIZE).after(request.tokens)


def undisturbed(request: GenerationRequest) -> Outcome:
    """What the log comes to if nothing happens to it."""
    return isolated(request, constraint_of(request), limits=LIMITS)


class _Group:
    """A `WorkerGroup` of one fake rank that never fails: it lives and dies with its replica."""

    depth = 2

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._results.append(self._worker.execute(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def check(self) -> None: ...

    def restart(self) -> None: ...

    def ranks(self) -> list[RankInfo]:
        return []

    def close(self) -> None: ...


class _Stream:
    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.error: ShoalError | None = None
        self.arrived = asyncio.Event()

    def push(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.arrived.set()

    def fail(self, error: ShoalError) -> None:
        self.error = error
        self.arrived.set()

    async def take(self) -> list[TokenEvent]:
        await self.arrived.wait()
        self.arrived.clear()
        if not self.events and self.error is not None:
            raise self.error
        events, self.events = self.events, []
        if self.error is not None:
            self.arrived.set()
        return events


class FakeReplica:
    """One engine, a step every `STEP_S`. kills: see `Fleet`; then `on_death` is called."""

    def __init__(self, name: str, *, kills: Kills, on_death: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.problem: str | None = None
        self.stopped = False
        self.streams: dict[str, _Stream] = {}
        self.pool = BlockPool(2000, block_size=8)
        self._requests: dict[str, GenerationRequest] = {}
        self._lengths: Counter[str] = Counter()
        self._kills = kills
        self._on_death = on_death
        scheduler = Scheduler(LIMITS, pool=self.pool, policy=FirstCome(), clock=loop.time, secret=b"secret")
        worker = FakeWorker(block_size=8, vocab=VOCAB_SIZE, owner_of=_tenant_is_not_told)
        self.engine = Engine(scheduler, _Group(worker), clock=loop.time)
        self._has_work = asyncio.Event()
        self._stepping = loop.create_task(self._step())

    def open(self, request: GenerationRequest) -> _Stream:
        """Raises what the engine raises."""
        self.engine.add(request, constraint_of(request))
        self._requests[request.id] = request
        self._lengths[request.id] = len(request.tokens)
        stream = self.streams[request.id] = _Stream()
        self._has_work.set()
        return stream

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """As `Backend.generate`."""
        stream = self.open(request)
        try:
            while True:
                events = await stream.take()
                yield events
                if events[-1].finish_reason is not None:
                    return
        finally:
            self.leave(request.id)

    def leave(self, id: str) -> None:
        if self.streams.pop(id, None) is not None:
            self.engine.abort(id)

    def end(self) -> None:
        self._stepping.cancel()

    async def _step(self) -> None:
        while True:
            await self._has_work.wait()
            await asyncio.sleep(STEP_S)
            if self.stopped:
                continue
            events = self.engine.step()
            live = [event for event in events if event.id in self.streams]
            if any(self._kills(self._requests[e.id], self._lengths[e.id] + len(e.tokens)) for e in live):
                self._on_death(self.name)
                return
            self.deliver(live)
            if not self.engine.has_work:
                self._has_work.clear()

    def deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            stream = self.streams.get(event.id)
            if stream is not None:
                self._lengths[event.id] += len(event.tokens)
                stream.push(event)
                if event.finish_reason is not None:
                    del self.streams[event.id]


def _tenant_is_not_told(_: Admission) -> None:
    return None


class Fleet:
    """A `Backend` over so many replicas, and what may happen to them. One that ends is replaced after `RESTART_S`.

    kills: whether a log that comes to so many tokens ends the replica that computes it.
    """

    def __init__(self, size: int, *, kills: Kills = lambda request, length: False) -> None:
        self.up: dict[str, FakeReplica] = {}
        self.gone: list[FakeReplica] = []
        self.asked: list[tuple[str, GenerationRequest]] = []  # replica and request, of every attempt
        self.went_to: defaultdict[str, list[str]] = defaultdict(list)  # a log's id -> the replicas that were asked
        self.num_deaths = 0
        self.stopped: set[str] = set()
        self._kills = kills
        self._num_made = 0
        self._tasks: set[asyncio.Task[None]] = set()
        for _ in range(size):
            self.start()

    @property
    def backend(self) -> Backend:
        """What an ingress sees of it."""
        return self

    async def open(self) -> None:
        """Returns when the ingress knows all replicas."""

    def note(self, replica: str, request: GenerationRequest) -> None:
        self.asked.append((replica, request))
        self.went_to[request.id.partition("~")[0]].append(replica)

    # What happens

    def start(self) -> FakeReplica:
        self._num_made += 1
        replica = FakeReplica(f"r{self._num_made}", kills=self._kills, on_death=self.kill)
        self.up[replica.name] = replica
        return replica

    def kill(self, name: str) -> None:
        """Its process is gone without a word."""
        self.num_deaths += 1
        self._lose(self.up[name])

    def stop(self, name: str) -> None:
        """It stands still, and is lost after its silence."""
        self.stopped.add(name)
        self._spawn(self._fall_silent(self.up[name]))

    def drain(self, name: str) -> None:
        """It says goodbye, and hands over what it has not finished by its deadline."""
        self._spawn(self._say_goodbye(self.up[name]))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for replica in list(self.up.values()):
            self._end(replica)
        await asyncio.sleep(0)

    def _lose(self, replica: FakeReplica) -> None:
        for stream in replica.streams.values():
            stream.fail(ReplicaLost("the replica was lost before the answer's end"))
        replica.streams.clear()
        self._end(replica)
        self._spawn(self._come_back())

    def _end(self, replica: FakeReplica) -> None:
        replica.end()
        self.gone.append(self.up.pop(replica.name))

    async def _come_back(self) -> None:
        await asyncio.sleep(RESTART_S)
        self.start()

    async def _fall_silent(self, replica: FakeReplica) -> None:
        replica.stopped = True
        await asyncio.sleep(DOUBT_S)
        replica.problem = "the replica does not answer"
        await asyncio.sleep(SILENCE_S - DOUBT_S)
        if replica.name in self.up:
            self._lose(replica)

    async def _say_goodbye(self, replica: FakeReplica) -> None:
        replica.problem = "the replica is draining"
        await asyncio.sleep(DRAIN_S)
        if replica.name in self.up:
            replica.deliver(replica.engine.end_all(FinishReason.ABORT, error="the engine is shutting down"))
            self._end(replica)
            self._spawn(self._come_back())

    def _spawn(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Backend

    async def generate(
        self, request: GenerationRequest, replica: str | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        if replica is None:
            replica = next((name for name, each in self.up.items() if each.problem is None), None)
        if replica not in self.up:
            raise Unavailable("the replica was gone before it began")
        here = self.up[replica]
        if here.problem is not None:
            raise Unavailable(here.problem)
        self.note(replica, request)
        async with aclosing(here.generate(request)) as batches:
            async for batch in batches:
                yield batch

    async def info(self) -> ModelInfo:
        return INFO

    async def ready(self) -> None:
        if all(replica.problem for replica in self.up.values()):
            raise Unavailable("not ready: no replica is connected")

    async def stats(self) -> Mapping[str, Stats]:
        return {name: replica.engine.stats() for name, replica in self.up.items()}

    def replicas(self) -> Mapping[str, ReplicaState]:
        return {
            name: ReplicaState(
                problem=replica.problem,
                stats=replica.engine.stats(),
                ranks=[],
                in_flight=len(replica.streams),
                tokens_sent=0,
            )
            for name, replica in self.up.items()
        }

    async def check_at_rest(self) -> None:
        """After all is answered: no replica holds anything once the steps in flight are over."""
        await asyncio.sleep(3 * STEP_S)
        for replica in self.up.values():
            assert not replica.streams, "a stream that nobody follows"
            assert not replica.engine.has_work or replica.stopped, "a generation that nobody asked for"
            assert replica.pool.num_free == replica.pool.num_blocks, "blocks are held at rest"


class LinedFleet(Fleet):
    """The same behind the real line: real sockets on loopback, and whatever a link says of a replica that is gone."""

    def __init__(self, size: int, *, kills: Kills = lambda request, length: False) -> None:
        self._servers: dict[str, LineServer] = {}
        self._addresses: dict[str, Address] = {}
        super().__init__(size, kills=kills)
        self.line = LineBackend(self._find, secret=SECRET, rng=random.Random(0))

    @property
    def backend(self) -> Backend:
        return self.line

    def start(self) -> FakeReplica:
        replica = super().start()

        def generate(request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
            self.note(replica.name, request)
            return replica.generate(request)

        def status() -> Status:
            if replica.stopped:
                raise asyncio.CancelledError  # no heartbeat any more
            return Status(replica.problem, replica.engine.stats())

        server = LineServer(generate, secret=SECRET, welcome=Welcome(replica.name, INFO), status=status)
        self._servers[replica.name] = server
        self._spawn(self._listen(replica.name, server))
        return replica

    async def open(self) -> None:
        self.line.start()
        while len(self.line.replicas()) < len(self.up):
            await asyncio.sleep(STEP_S)

    async def close(self) -> None:
        await self.line.close()
        for server in self._servers.values():
            await server.close()
        await super().close()
        await asyncio.sleep(1.0)  # for connections to close

    async def _listen(self, name: str, server: LineServer) -> None:
        self._addresses[name] = Address(name, "127.0.0.1", await server.start("127.0.0.1"))

    async def _find(self) -> list[Address]:
        return [address for name, address in self._addresses.items() if name in self.up and name not in self.stopped]

    def _lose(self, replica: FakeReplica) -> None:
        self._spawn(self._servers[replica.name].close())  # whose end is all that the ingress hears
        self._end(replica)
        self._spawn(self._come_back())

    async def _say_goodbye(self, replica: FakeReplica) -> None:
        self._servers[replica.name].goodbye()
        await super()._say_goodbye(replica)
        await self._servers[replica.name].close(grace_s=1.0)
