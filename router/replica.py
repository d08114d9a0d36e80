"""Station 8: the Serve deployment around one `AsyncEngine`, and how an ingress finds its replicas.

Serve places, watches and restarts replicas; generations reach them over the line (line_server.py), never through Serve.
Ray is imported only where it is called: the router's tests run without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..parallel.group import RankInfo
from ..runtime.blocks import Changes
from ..runtime.errors import EngineDead, Unavailable
from ..runtime.generation import FinishReason, GenerationRequest, StructuredOutputs, TokenEvent
from ..runtime.grammar import FREE, Constraint
from ..runtime.stats import Stats
from .backend import ModelInfo, Status
from .line import LineLimits, Welcome
from .line_client import Address
from .line_server import LineServer
from .load_report import LoadWatch

LAST_EVENTS_S = 1.0  # for the last events of a closed engine to reach the line
TURN_S = 10.0  # at least, for ingresses to turn to a replacement: until then it takes what is new
LOOK_S = 0.05  # between two looks whether all has ended
MARGIN_S = 3.0  # before a machine goes: what is left is handed over then


class Engine(Protocol):
    """What a replica needs of `runtime.async_engine.AsyncEngine`."""

    @property
    def healthy(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def state(self) -> str: ...

    def generate(
        self, request: GenerationRequest, constraint: Constraint = ...
    ) -> AsyncGenerator[list[TokenEvent], None]: ...

    def stats(self) -> Stats: ...

    def ranks(self) -> list[RankInfo]: ...

    async def drain(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Grammars(Protocol):
    """What a replica needs of `runtime.grammar.GrammarCompiler`."""

    async def acheck(self, spec: StructuredOutputs) -> None: ...

    def constraint(self, spec: StructuredOutputs, tokens: list[int] | None = None) -> Constraint: ...

    def close(self) -> None: ...


Depart = Callable[[float | None], Awaitable[None]]
"""Told the seconds that are left until a machine with a part of the replica goes; None: nobody says when."""


async def no_notice(depart: Depart) -> None:
    """Nobody takes machines away."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a replica is made of; built in its own process by a factory that `cluster/app.py` binds.

    drain_timeout_s: for what runs when the replica is to go; then it is handed over. watch: runs while the replica
    does, and says when its machine is about to be taken away.
    """

    engine: Engine
    grammars: Grammars
    info: ModelInfo
    changes: Callable[[], list[Changes]] = list  # what the cache has gained and lost since they were last asked for
    drain_timeout_s: float = 10.0
    watch: Callable[[Depart], Coroutine[None, None, None]] = no_notice


class Replica:
    """One engine behind a line. All methods but `close` run on one event loop."""

    def __init__(self, build: Callable[[], Parts], secret: bytes, *, limits: LineLimits | None = None) -> None:
        """secret: what the line's peers prove to know."""
        self._parts = build()
        self._secret = secret
        self._limits = limits
        self._load = LoadWatch()
        self.sleeps = False  # its part may have no replica: who comes then is held, and one is started
        self._line: LineServer | None = None
        self._watch: asyncio.Task[None] | None = None
        self._has_left = False
        self._port = asyncio.Lock()  # of `listen`: asked by several ingresses at once
        self._address: Address | None = None
        self.__del__ = self.shutdown  # what Serve awaits last; the interpreter looks at the class and finds none

    async def address(self) -> Address:
        """Where this replica listens: on the node's own address, from the first call on."""
        return await self.listen(_replica_id(), _node_address())

    async def listen(self, replica: str, host: str) -> Address:
        """The same without Ray. Listens once, whoever asks."""
        async with self._port:
            if self._address is None:
                welcome = Welcome(replica, self._parts.info)
                self._line = LineServer(
                    self.generate,
                    secret=self._secret,
                    welcome=welcome,
                    status=self.status,
                    changes=self._parts.changes,
                    limits=self._limits,
                )
                self._address = Address(replica, host, await self._line.start(host))
                self._watch = asyncio.create_task(self._parts.watch(self.depart))
            return self._address

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """One log's events. Closing or cancelling aborts the generation within a step.

        Raises:
            EngineDead: the engine died under the log. Unavailable: it takes no more, dead before or draining.
            ShoalError: as the engine raised it.
        """
        constraint = await self._constraint(request)
        if not self._parts.engine.healthy:
            raise Unavailable(f"the replica takes no more: {self._parts.engine.state}")
        with self._load.watching(request.id):
            async with aclosing(self._parts.engine.generate(request, constraint)) as batches:
                async for batch in batches:
                    self._load.spoke(request.id)
                    if batch[-1].finish_reason is FinishReason.ERROR and not self._parts.engine.healthy:
                        # Not this log's fault: the engine died under it, so another one may go on.
                        if rest := [event for event in batch if event.finish_reason is None]:
                            yield rest
                        raise EngineDead(batch[-1].error or "the engine died")
                    yield batch

    def status(self) -> Status:
        """How things stand."""
        engine = self._parts.engine
        return Status(None if engine.ready else engine.state, engine.stats(), engine.ranks())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this every second where a policy settles how many replicas there are (cluster/autoscale.py)."""
        stats = self._parts.engine.stats()
        if self._line is None:
            return self._load.report(stats).as_numbers()
        queue, leaving = self._line.queue, self._line.is_leaving
        report = self._load.report(stats, leaving=leaving, num_queued=queue.count, queued_s=queue.longest_s)
        return report.as_numbers()

    async def check_health(self) -> None:
        """Serve calls this and replaces the replica when it raises. A process that makes no step is dead."""
        if not self._parts.engine.healthy:
            raise EngineDead("the engine has stopped making steps")
        if self._has_left:
            raise EngineDead("the replica has handed everything over: its machine is taken away")

    async def depart(self, left_s: float | None) -> None:
        """A machine goes in `left_s` seconds: other replicas are preferred at once, and shortly before that what still
        runs is handed over. Serve brings a replacement, and may shut this replica down sooner."""
        assert self._line is not None, "it is watched from its first address on"
        self._line.goodbye()
        if left_s is None:
            return
        await asyncio.sleep(left_s - MARGIN_S)
        self._line.release()
        await self._parts.engine.drain(0.0)
        self._has_left = True

    async def shutdown(self) -> None:
        """Leave to others what is new, as soon as there are others; hand over what still runs at the deadline, or where
        nobody could go on with it, let it end by its own."""
        now = asyncio.get_running_loop().time
        deadline = now() + self._parts.drain_timeout_s
        if self._line is not None:
            self._line.lingers = not self.sleeps
            self._line.goodbye()
            if not self._parts.engine.healthy:
                self._line.release()  # it takes nothing more, and what it holds is wanted by the next one
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(deadline, now() + TURN_S)):
                    await self._line.released()
            while self._line.holds_last or (self._line.is_busy and now() < deadline):
                await asyncio.sleep(LOOK_S)
        await self._parts.engine.drain(max(0.0, deadline - now()))
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self.close)
        if self._line is not None:
            await self._line.close(LAST_EVENTS_S)

    def close(self) -> None:
        """End the engine and the grammar processes. Idempotent."""
        self._parts.engine.close()
        self._parts.grammars.close()

    async def _constraint(self, request: GenerationRequest) -> Constraint:
        """Behind the log's tokens. Checked in a process that may be killed, made in a thread: nobody waits for it."""
        spec = request.params.structured_outputs
        if spec is None:
            return FREE
        grammars = self._parts.grammars
        await grammars.acheck(spec)
        return await asyncio.to_thread(grammars.constraint, spec, request.tokens)


class ServeDirectory:
    """Where a Serve deployment's replicas listen. `handle`: a DeploymentHandle to `Replica`s."""

    def __init__(self, handle: Any, *, timeout_s: float = 1.0) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def __call__(self) -> list[Address]:
        """Those that answer. Raises whatever Serve raises where none can."""
        try:
            answers = await self._handle.broadcast("address").results_async(
                timeout_s=self._timeout_s, return_exceptions=True
            )
        except TimeoutError:
            # One that hangs holds up the answer of all: ask one that Serve thinks well of.
            async with asyncio.timeout(self._timeout_s):
                answers = [await self._handle.address.remote()]
        return [answer for answer in answers if isinstance(answer, Address)]

    async def wake(self) -> None:
        """Returns when a replica is there: meanwhile Serve counts a request that waits for one, and starts it."""
        await self._handle.address.remote()


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
