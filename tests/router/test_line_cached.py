"""What replicas have cached, over real loopback sockets: told to who comes late, kept up, missed, and of the dead."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from shoal.parallel.group import LocalGroup
from shoal.router.backend import ModelInfo, Status
from shoal.router.balance import PrefixAffinity
from shoal.router.line import Cached, FromReplica, LineLimits, Welcome
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import LineServer
from shoal.router.prefix_index import Catalogue, PrefixIndex, split
from shoal.router.replica import Parts, Replica
from shoal.runtime.async_engine import AsyncEngine
from shoal.runtime.blocks import SHORT, BlockPool, Changes
from shoal.runtime.engine import Engine
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.stats import Stats

from ..runtime.fakes import VOCAB, FakeWorker
from .test_replica import FakeGrammars

LINE_SECRET, SECRET = b"s" * 32, b"secret"
SIZE = 16
INFO = ModelInfo(model="tiny", max_model_len=4096, vocab_size=VOCAB, block_size=SIZE)
QUICK = LineLimits(beat_s=0.02)
NONE: frozenset[str] = frozenset()


def request(id: str, *, num: int = 200, first: int = 2, max_tokens: int = 4) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(id=id, prompt=[first, *[2 + i % 20 for i in range(num - 1)]], params=params, seed=1)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def names_of(index: PrefixIndex) -> set[bytes]:
    return set(index._masks)


class Source:
    """A replica's cache without a replica: what it has gained and lost is put into `changes`."""

    def __init__(self) -> None:
        self.changes: list[Changes] = []
        self.late = asyncio.Event()

    def take(self) -> list[Changes]:
        taken, self.changes = self.changes, []
        return taken

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        await self.late.wait()
        yield [TokenEvent(id=request.id, start=0, tokens=[1], finish_reason=FinishReason.STOP)]


class Line:
    """A server, and ingresses that find it."""

    def __init__(self) -> None:
        self.source = Source()
        self.server = LineServer(
            self.source.generate,
            secret=LINE_SECRET,
            welcome=Welcome("r1", INFO),
            status=lambda: Status(None, Stats()),
            changes=self.source.take,
            limits=QUICK,
        )
        self.backends: list[LineBackend] = []
        self._port = 0

    async def find(self) -> list[Address]:
        self._port = self._port or await self.server.start("127.0.0.1")
        return [Address("r1", "127.0.0.1", self._port)]

    async def ingress(self) -> tuple[LineBackend, PrefixIndex]:
        index = PrefixIndex(secret=SECRET)
        backend = LineBackend(self.find, secret=LINE_SECRET, limits=QUICK, index=index)
        self.backends.append(backend)
        backend.start()
        await until(backend.replicas)
        return backend, index


@asynccontextmanager
async def a_line() -> AsyncIterator[Line]:
    line = Line()
    try:
        yield line
    finally:
        for backend in line.backends:
            await backend.close()
        await line.server.close()


def run(scenario: Callable[[Line], Any]) -> None:
    async def main() -> None:
        async with a_line() as line:
            await scenario(line)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_who_is_there_hears_what_is_new_and_who_comes_late_hears_all() -> None:
    rng = random.Random(3)
    rows = [rng.randbytes(SHORT * 40_000), rng.randbytes(SHORT * 3)]

    async def scenario(line: Line) -> None:
        _, early = await line.ingress()
        line.source.changes = [Changes(True, rows[0], b""), Changes(False, rows[1], rows[0][: SHORT * 5])]
        expected = set(split(rows[0][SHORT * 5 :] + rows[1]))
        await until(lambda: names_of(early) == expected)
        _, late = await line.ingress()
        await until(lambda: names_of(late) == expected)
        line.source.changes = [Changes(True, rows[1], b"")]
        await until(lambda: names_of(early) == names_of(late) == set(split(rows[1])))

    run(scenario)


def test_a_message_that_was_missed_brings_all_of_it_again() -> None:
    first, missed, next_one = (bytes([i]) * SHORT for i in (1, 2, 3))

    async def scenario(line: Line) -> None:
        _, index = await line.ingress()
        line.source.changes = [Changes(False, first, b"")]
        await until(lambda: names_of(index) == {first})
        (peer,) = line.server._peers
        line.server.catalogue.hear(Changes(False, missed, first))
        peer._num_told += 1
        line.source.changes = [Changes(False, next_one, b"")]
        await until(lambda: names_of(index) == {missed, next_one})

    run(scenario)


def test_the_names_of_a_replica_that_is_gone_are_gone() -> None:
    async def scenario(line: Line) -> None:
        _, index = await line.ingress()
        line.source.changes = [Changes(False, b"x" * SHORT, b"")]
        await until(lambda: names_of(index))
        line.server.catalogue = Catalogue()  # it starts again from nothing
        for peer in list(line.server._peers):
            peer.wire.cut("the test")
        await until(lambda: not names_of(index))

    run(scenario)


def test_half_a_name_is_refused_where_it_is_read() -> None:
    said = msgspec.msgpack.encode(Cached(1, Changes(False, b"x" * SHORT, b"")))
    assert msgspec.msgpack.decode(said, type=FromReplica) == Cached(1, Changes(False, b"x" * SHORT, b""))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(said.replace(b"\xc4\x08" + b"x" * 8, b"\xc4\x07" + b"x" * 7), type=FromReplica)


def test_what_is_sent_and_not_answered_is_owed_and_on_its_way() -> None:
    async def scenario(line: Line) -> None:
        backend, index = await line.ingress()
        log = request("a")

        async def follow() -> None:
            async for _ in backend.generate(log, "r1"):
                pass

        following = asyncio.create_task(follow())
        await until(lambda: backend.replicas()["r1"].num_sent == 0 and line.server._peers)
        await until(lambda: backend.replicas()["r1"].prefill_unanswered == 200)
        assert backend.replicas()["r1"].prefill_tokens_owed == 200, "though the replica says that it owes nothing"
        assert index.match(request("b", num=100)) == {"r1": 6}
        line.source.late.set()
        await following
        await until(lambda: backend.replicas()["r1"].prefill_tokens_owed == 0)
        await until(lambda: not index.match(log))

    run(scenario)


class RealReplica:
    """A replica whose engine is real but for the rank's arithmetic."""

    def __init__(self, name: str, *, num_blocks: int) -> None:
        self.name = name
        limits = Limits(max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=64, max_queued=100, vocab_size=VOCAB)
        self.pool = BlockPool(num_blocks, block_size=SIZE)
        scheduler = Scheduler(limits, pool=self.pool, policy=FirstCome(), clock=lambda: 0.0, secret=SECRET)
        self.worker = FakeWorker(block_size=SIZE)
        engine = AsyncEngine(Engine(scheduler, LocalGroup(self.worker)))
        parts = Parts(engine, FakeGrammars(), INFO, changes=engine.take_cache_changes)
        self.replica = Replica(lambda: parts, LINE_SECRET, limits=QUICK)

    def names(self) -> set[bytes]:
        return {name[:SHORT] for name in self.pool._by_digest}


@pytest.mark.parametrize("num_blocks", [64, 400])
def test_an_index_follows_the_pools_of_real_engines(num_blocks: int) -> None:
    """Whatever was computed, found and evicted: at rest the index is the pools' names, and nothing is promised."""

    async def scenario() -> None:
        replicas = [RealReplica(name, num_blocks=num_blocks) for name in ("r1", "r2")]

        async def find() -> list[Address]:
            return [await one.replica.listen(one.name, "127.0.0.1") for one in replicas]

        index = PrefixIndex(secret=SECRET)
        backend = LineBackend(find, secret=LINE_SECRET, limits=QUICK, index=index)
        backend.start()
        await until(lambda: len(backend.replicas()) == 2)
        balancer = PrefixAffinity(backend.replicas, index, rng=random.Random(1))

        async def ask(n: int) -> None:
            log = request(str(n), first=2 + n % 9, num=150 + n)
            async for _ in backend.generate(log, balancer.choose(log, lost=NONE)):
                pass

        for start in range(0, 40, 8):
            await asyncio.gather(*(ask(n) for n in range(start, start + 8)))
        expected = replicas[0].names() | replicas[1].names()
        await until(lambda: names_of(index) == expected and not any(index._promised.values()))
        index.check()
        found = index.match(request("x", first=2 + 39 % 9, num=190))
        assert max(found.values(), default=0) >= 189 // SIZE, "the last prompt is still there, and found"
        await backend.close()
        for one in replicas:
            await one.replica.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 60))
