"""What the line says of a replica that is gone: lost, silent or left. Real sockets, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shoal.router.backend import ModelInfo, ReplicaLost, Status
from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.line import LineLimits, Welcome
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import LineServer
from shoal.router.meters import ResumeMeter
from shoal.router.resume import Resume
from shoal.runtime.errors import Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from shoal.runtime.stats import Stats

from . import virtual_time
from .fakes import SECRET

LIMITS = LineLimits()
TOKEN_S = 0.5
NUM_TOKENS = 40


class Far:
    """A replica at the other end of a line: counts, a token every `TOKEN_S`; mute, it does and says nothing more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mute = False
        self.server = LineServer(
            self.generate,
            secret=SECRET,
            welcome=Welcome(name, ModelInfo(model="tiny", max_model_len=512, vocab_size=260)),
            status=self.status,
            limits=LIMITS,
        )

    async def listen(self) -> Address:
        return Address(self.name, "127.0.0.1", await self.server.start("127.0.0.1"))

    def status(self) -> Status:
        if self.mute:
            raise asyncio.CancelledError  # no heartbeat any more
        return Status(None, Stats())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        for i in range(len(request.tokens), NUM_TOKENS):
            await asyncio.sleep(10_000 if self.mute else TOKEN_S)
            end = FinishReason.LENGTH if i + 1 == NUM_TOKENS else None
            yield [TokenEvent(id=request.id, start=i, tokens=[i], finish_reason=end)]


class Line:
    """Replicas a and b, an ingress's line to both, and who was reported as silent."""

    def __init__(self) -> None:
        self.replicas = {name: Far(name) for name in "ab"}
        self.found: list[Address] = []
        self.silent: list[str] = []
        self.backend = LineBackend(
            self.find, secret=SECRET, limits=LIMITS, rng=random.Random(0), on_silent=self.silent.append
        )

    async def find(self) -> list[Address]:
        return [address for address in self.found if not self.replicas[address.replica].mute]


@asynccontextmanager
async def connected() -> AsyncIterator[Line]:
    line = Line()
    line.found = [await replica.listen() for replica in line.replicas.values()]
    line.backend.start()
    try:
        while len(line.backend.replicas()) < 2:
            await asyncio.sleep(0.01)
        yield line
    finally:
        await line.backend.close()
        for replica in line.replicas.values():
            await replica.server.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(scenario, timeout_s=1000)


def request(*, trial: int = 0) -> GenerationRequest:
    params = SamplingParams(max_tokens=NUM_TOKENS)
    return GenerationRequest(id="g", prompt=[1, 2], params=params, seed=1, trial=trial)


async def to_its_end(backend: LineBackend, replica: str, *, trial: int = 0) -> list[float]:
    """When its batches came."""
    clock = asyncio.get_running_loop().time
    return [clock() async for _ in backend.generate(request(trial=trial), replica)]


@asynccontextmanager
async def second_ingress(line: Line) -> AsyncIterator[LineBackend]:
    backend = LineBackend(line.find, secret=SECRET, limits=LIMITS, rng=random.Random(1))
    backend.start()
    try:
        while len(backend.replicas()) < 2:
            await asyncio.sleep(0.01)
        yield backend
    finally:
        await backend.close()


def test_a_silent_replica_is_lost_and_reported() -> None:
    async def scenario() -> None:
        async with connected() as line:
            stream = asyncio.create_task(to_its_end(line.backend, "a"))
            await asyncio.sleep(2)
            line.replicas["a"].mute = True
            began = asyncio.get_running_loop().time()
            with pytest.raises(ReplicaLost):
                await stream
            silence = asyncio.get_running_loop().time() - began
            assert LIMITS.silence_s - LIMITS.beat_s <= silence <= LIMITS.silence_s + 2 * LIMITS.beat_s
            assert line.silent == ["a"]
            assert set(line.backend.replicas()) == {"b"}

    run(scenario)


def test_a_replica_that_breaks_off_is_lost_and_not_silent() -> None:
    async def scenario() -> None:
        async with connected() as line:
            stream = asyncio.create_task(to_its_end(line.backend, "a"))
            await asyncio.sleep(2)
            await line.replicas["a"].server.close()
            with pytest.raises(ReplicaLost):
                await stream
            assert line.silent == []

    run(scenario)


def test_a_replica_that_said_goodbye_has_left() -> None:
    async def scenario() -> None:
        async with connected() as line:
            stream = asyncio.create_task(to_its_end(line.backend, "a"))
            await asyncio.sleep(2)
            line.replicas["a"].server.goodbye()
            await line.replicas["a"].server.close(grace_s=1.0)
            with pytest.raises(Unavailable, match="left"):
                await stream
            assert line.silent == []

    run(scenario)


@pytest.mark.parametrize("how", ["breaks", "leaves", "falls silent"])
def test_a_log_goes_on_over_the_line(how: str) -> None:
    async def scenario() -> None:
        async with connected() as line:
            registry = CollectorRegistry()
            clock = asyncio.get_running_loop().time
            resume = Resume(
                line.backend,
                LeastLoaded(line.backend.replicas, rng=random.Random(0)),
                config=RouterConfig(),
                meter=ResumeMeter(registry),
                clock=clock,
            )
            tokens: list[int] = []
            async for batch in resume.follow(request()):
                tokens += [token for event in batch for token in event.tokens]
                if len(tokens) == 5:
                    here = next(name for name, state in line.backend.replicas().items() if state.in_flight)
                    if how == "falls silent":
                        line.replicas[here].mute = True
                    else:
                        if how == "leaves":
                            line.replicas[here].server.goodbye()
                        await line.replicas[here].server.close()
            assert tokens == list(range(NUM_TOKENS))
            lost = registry.get_sample_value("shoal_generations_interrupted_total", {"cause": "replica_lost"})
            assert lost == (None if how == "leaves" else 1)
            assert (line.silent != []) == (how == "falls silent")

    run(scenario)


def test_suspects_of_two_ingresses_are_tried_one_behind_the_other() -> None:
    async def scenario() -> None:
        async with connected() as line, second_ingress(line) as other:
            first = asyncio.create_task(to_its_end(line.backend, "a", trial=2))
            await asyncio.sleep(TOKEN_S / 2)
            second = asyncio.create_task(to_its_end(other, "a", trial=2))
            others = asyncio.create_task(to_its_end(other, "a"))
            ours, theirs = await first, await second
            assert ours[1] + 0.9 * TOKEN_S <= theirs[0] <= ours[1] + 1.1 * TOKEN_S  # and then beside each other
            assert (await others)[0] < ours[1], "who is no suspect waits for nobody"

    run(scenario)


def test_who_waits_for_its_trial_is_not_to_blame() -> None:
    """The suspect of another ingress ended the replica."""

    async def scenario() -> None:
        async with connected() as line, second_ingress(line) as other:
            tried = asyncio.create_task(to_its_end(line.backend, "a", trial=2))
            await asyncio.sleep(TOKEN_S / 2)
            waiting = asyncio.create_task(to_its_end(other, "a", trial=2))
            await asyncio.sleep(TOKEN_S)
            await line.replicas["a"].server.close()
            with pytest.raises(ReplicaLost):
                await tried
            with pytest.raises(Unavailable, match="before it began"):
                await waiting

    run(scenario)


def test_a_suspect_that_is_left_makes_room_for_the_next() -> None:
    async def scenario() -> None:
        async with connected() as line, second_ingress(line) as other:
            tried = asyncio.create_task(to_its_end(line.backend, "a", trial=2))
            await asyncio.sleep(TOKEN_S / 2)
            waiting = asyncio.create_task(to_its_end(other, "a", trial=2))
            await asyncio.sleep(TOKEN_S / 10)
            tried.cancel()
            assert len(await waiting) == NUM_TOKENS

    run(scenario)
