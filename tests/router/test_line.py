"""The line over real loopback sockets, without Ray: strangers, garbage, many streams, slow, dead and stopped peers."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import pytest

from shoal.router.backend import ModelInfo, ReplicaLost, Status
from shoal.router.line import (
    MAGIC,
    LineError,
    LineLimits,
    Queue,
    Submit,
    Welcome,
    ingress_handshake,
    replica_handshake,
)
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import MAX_STRANGERS, LineServer
from shoal.runtime import errors as e
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from shoal.runtime.stats import Stats

SECRET = b"s" * 32
INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260)
QUICK = LineLimits(handshake_s=0.5, beat_s=0.05, silence_s=0.6, max_frame=2**20)
PATIENT = msgspec.structs.replace(QUICK, silence_s=20.0)  # where silence is not the point: a loaded machine pauses, too
CUT = b""


class Source:
    """An engine's stand-in: counts from 0 to max_tokens, and knows who has left."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self.aborted: set[str] = set()
        self.delay_s = 0.0
        self.pad = 0  # log-probabilities an event, to make it long
        self.problem: str | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        self.live.add(request.id)
        ended = False
        try:
            if request.tenant == "refused":
                raise e.QueueFull("full", retry_after=2.5)
            for i in range(request.params.max_tokens or 0):
                await asyncio.sleep(self.delay_s)
                ended = i + 1 == request.params.max_tokens
                yield [self._event(request, i, FinishReason.LENGTH if ended else None)]
        finally:
            self.live.discard(request.id)
            if not ended:
                self.aborted.add(request.id)

    def _event(self, request: GenerationRequest, i: int, end: FinishReason | None) -> TokenEvent:
        logprobs = [TokenLogprob(0.0, 1, [(0, 0.0)] * self.pad)] if self.pad else None
        return TokenEvent(id=request.id, start=i, tokens=[request.seed + i], logprobs=logprobs, finish_reason=end)

    def status(self) -> Status:
        return Status(self.problem, Stats(num_running=len(self.live), tokens_owed=7))


class Line:
    """A server over a `Source` and a backend that finds it."""

    def __init__(self, limits: LineLimits) -> None:
        self.source = Source()
        self.limits = limits
        self.found: list[Address] = []
        self.backend = LineBackend(self.find, secret=SECRET, limits=limits)
        self.servers: list[LineServer] = []

    async def find(self) -> list[Address]:
        return self.found

    async def serve(self, replica: str = "r1") -> LineServer:
        welcome = Welcome(replica, INFO)
        server = LineServer(
            self.source.generate, secret=SECRET, welcome=welcome, status=self.source.status, limits=self.limits
        )
        self.found = [Address(replica, "127.0.0.1", await server.start("127.0.0.1"))]
        self.servers.append(server)
        return server

    @property
    def port(self) -> int:
        return self.found[0].port


@asynccontextmanager
async def connected(limits: LineLimits = PATIENT) -> AsyncIterator[Line]:
    line = Line(limits)
    await line.serve()
    line.backend.start()
    try:
        await until(line.backend.replicas)
        yield line
    finally:
        await line.backend.close()
        for server in line.servers:
            await server.close()


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario on the event loop that is everywhere, and on the one that Ray uses where it is installed."""
    new_loop = pytest.importorskip("uvloop").new_event_loop if request.param == "uvloop" else None

    def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(asyncio.wait_for(scenario(), 30))

    return run


def request(name: str = "a", num: int = 5, *, seed: int = 0, tenant: str = "", prompt: int = 2) -> GenerationRequest:
    params = SamplingParams(max_tokens=num)
    return GenerationRequest(id=name, prompt=[1] * prompt, params=params, seed=seed, tenant=tenant)


async def tokens(backend: LineBackend, asked: GenerationRequest) -> list[int]:
    return [token async for batch in backend.generate(asked) for event in batch for token in event.tokens]


async def to_its_end(stream: AsyncIterator[list[TokenEvent]]) -> None:
    async for _ in stream:
        pass


class Raw:
    """A peer that does as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.sent = 0

    @classmethod
    async def connect(cls, port: int, **options: Any) -> Raw:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return cls(*await asyncio.open_connection(sock=sock, limit=4096))

    async def prove(self, secret: bytes = SECRET) -> None:
        """Raises LineError, IncompleteReadError."""
        handshake = ingress_handshake(secret)
        out, wanted = next(handshake)
        try:
            while True:
                self.writer.write(out)
                out, wanted = handshake.send(await self.reader.readexactly(wanted))
        except StopIteration:
            return

    def frame(self, body: bytes, *, length: int | None = None) -> None:
        self.writer.write(struct.pack(">I", len(body) if length is None else length) + body)

    def submit(self, asked: GenerationRequest) -> None:
        self.sent += 1
        self.frame(msgspec.msgpack.encode(Submit(self.sent, msgspec.msgpack.encode(asked))))

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        out = b""
        try:
            while data := await self.reader.read(2**16):
                out += data
        except ConnectionError:
            pass
        return out


# Who is there


def shake(ours: bytes, theirs: bytes) -> None:
    replica, ingress = replica_handshake(ours), ingress_handshake(theirs)
    greeting, wanted = next(replica)
    _, also = next(ingress)
    assert also == len(greeting)
    answer, last = ingress.send(greeting)
    assert len(answer) == wanted
    with pytest.raises(StopIteration) as end:
        replica.send(answer)
    assert len(end.value.value) == last
    with pytest.raises(StopIteration):
        ingress.send(end.value.value)


def test_both_ends_prove_themselves() -> None:
    shake(SECRET, SECRET)
    with pytest.raises(LineError, match="does not know the secret"):
        shake(SECRET, b"t" * 32)


def test_a_replica_that_does_not_know_the_secret_is_told_nothing() -> None:
    for last in (b"\0" * 32, None):  # a guess, and our own proof sent back
        ingress = ingress_handshake(SECRET)
        next(ingress)
        answer, wanted = ingress.send(MAGIC + b"n" * 32)
        with pytest.raises(LineError, match="does not know the secret"):
            ingress.send(last or answer[-wanted:])


@pytest.mark.parametrize(
    "said", [b"x" * 200, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 4, MAGIC + b"\0" * 64, b"\x80\x04pickle" * 20]
)
def test_garbage_is_refused_before_it_is_read(run: Run, said: bytes) -> None:
    async def scenario() -> None:
        async with connected() as line:
            raw = await Raw.connect(line.port)
            raw.writer.write(said)
            heard = await raw.rest()
            assert len(heard) <= len(MAGIC) + 32, "more than a greeting"
            assert await tokens(line.backend, request()) == list(range(5))

    run(scenario)


def test_a_wrong_secret_is_refused(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            raw = await Raw.connect(line.port)
            raw.writer.write(b"")
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await raw.prove(b"t" * 32)
            stranger = LineBackend(line.find, secret=b"t" * 32, limits=PATIENT)
            stranger.start()
            await asyncio.sleep(0.3)
            with pytest.raises(e.Unavailable, match="no replica is connected"):
                await stranger.ready()
            await stranger.close()
            assert not line.source.live

    run(scenario)


def test_who_says_nothing_is_cut(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            silent = await Raw.connect(line.port)
            assert len(await asyncio.wait_for(silent.rest(), 5)) <= len(MAGIC) + 32

    run(scenario)


def test_a_crowd_of_strangers_keeps_nobody_out(run: Run) -> None:
    async def scenario() -> None:
        async with connected(msgspec.structs.replace(QUICK, handshake_s=20.0)) as line:
            crowd = [await Raw.connect(line.port) for _ in range(MAX_STRANGERS + 10)]
            await asyncio.wait_for(crowd[0].rest(), 5)
            late = LineBackend(line.find, secret=SECRET, limits=PATIENT)
            late.start()
            await until(late.replicas)
            await late.close()
            for raw in crowd:
                raw.writer.close()

    run(scenario)


@pytest.mark.parametrize("body", [b"\xc1", b"\x93\xa6submit\x01", b"\x92\xa5beats\x01", b"\x92\xa5abort\xa1x", b""])
def test_known_peers_that_talk_nonsense_are_cut(run: Run, body: bytes) -> None:
    async def scenario() -> None:
        async with connected() as line:
            raw = await Raw.connect(line.port)
            await raw.prove()
            raw.submit(request("mine", 10_000_000))
            await until(lambda: "mine" in line.source.live)
            raw.frame(body)
            await raw.rest()
            await until(lambda: "mine" in line.source.aborted)
            assert await tokens(line.backend, request()) == list(range(5))

    run(scenario)


def test_an_oversized_frame_is_cut_before_it_is_there(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            raw = await Raw.connect(line.port)
            await raw.prove()
            raw.frame(b"x", length=QUICK.max_frame + 1)
            await raw.rest()
            assert await tokens(line.backend, request()) == list(range(5))

    run(scenario)


# What crosses


def test_many_streams_each_in_order(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            asked = [request(f"r{i}", 40, seed=1000 * i) for i in range(200)]
            answers = await asyncio.gather(*(tokens(line.backend, one) for one in asked))
            assert answers == [list(range(1000 * i, 1000 * i + 40)) for i in range(200)]
            assert line.backend.replicas()["r1"].in_flight == 0

    run(scenario)


def test_leaving_aborts(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            stream = line.backend.generate(request("left", 10_000_000))
            await anext(stream)
            await stream.aclose()
            await until(lambda: line.source.aborted == {"left"}, 2)
            assert await tokens(line.backend, request()) == list(range(5))

    run(scenario)


def test_refusals_arrive_as_what_they_were(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            with pytest.raises(e.QueueFull, match="full") as caught:
                await tokens(line.backend, request(tenant="refused"))
            assert caught.value.retry_after == 2.5

    run(scenario)


def test_an_unreadable_request_fails_alone(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            raw = await Raw.connect(line.port)
            await raw.prove()
            raw.submit(request("good", 10_000_000))
            raw.frame(msgspec.msgpack.encode(Submit(2, b"\xc1")))
            found = b""
            while b"cannot read the request" not in found:
                found = found[-200:] + await raw.reader.readexactly(100)
            assert line.source.live == {"good"}

    run(scenario)


def test_what_is_too_large_fails_alone(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            with pytest.raises(e.TooLarge, match="1048576"):
                await tokens(line.backend, request(prompt=2 * 10**6))
            line.source.pad = 200_000
            with pytest.raises(e.EngineError, match="too large"):
                await tokens(line.backend, request())
            line.source.pad = 0
            assert await tokens(line.backend, request()) == list(range(5))

    run(scenario)


@pytest.mark.parametrize(
    "limits", [QUICK, msgspec.structs.replace(PATIENT, max_backlog=10**6)], ids=["silence", "backlog"]
)
def test_a_peer_that_reads_nothing_holds_up_nobody_and_is_cut(run: Run, limits: LineLimits) -> None:
    async def scenario() -> None:
        async with connected(limits) as line:
            line.source.pad, line.source.delay_s = 100, 0.005
            raw = await Raw.connect(line.port)
            await raw.prove()
            for i in range(20):
                raw.submit(request(f"slow{i}", 10_000_000))
            await until(lambda: len(line.source.live) == 20)
            assert await tokens(line.backend, request("a", 50)) == list(range(50))
            await until(lambda: len(line.source.aborted) == 20)
            raw.writer.close()

    run(scenario)


def test_heartbeats_carry_statistics_and_readiness(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            await line.backend.ready()
            assert await line.backend.info() == INFO
            line.source.delay_s = 0.01
            stream = line.backend.generate(request("a", 1000, prompt=30))
            pending = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            state = line.backend.replicas()["r1"]
            assert (state.in_flight, state.tokens_sent, state.tokens_owed) == (1, 1030, 1037)
            await pending
            await until(lambda: line.backend.replicas()["r1"].tokens_sent == 0)
            assert (await line.backend.stats())["r1"].num_running == 1
            line.source.problem = "the engine has stopped making steps"
            await until(lambda: line.backend.replicas()["r1"].problem)
            with pytest.raises(e.Unavailable, match="stopped making steps"):
                await line.backend.ready()
            await stream.aclose()

    run(scenario)


def test_a_replica_knows_what_waits_at_all_ingresses(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            other = LineBackend(line.find, secret=SECRET, limits=PATIENT)
            other.start()
            line.backend.queue = lambda: Queue(3, 1.5)
            other.queue = lambda: Queue(4, 0.5)
            await until(lambda: line.servers[0].queue == Queue(7, 1.5))
            line.backend.queue = Queue
            await until(lambda: line.servers[0].queue == Queue(4, 0.5))
            await other.close()
            await until(lambda: line.servers[0].queue == Queue())

    run(scenario)


def test_goodbye_lets_what_runs_end(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            line.source.delay_s = 0.002
            running = asyncio.create_task(tokens(line.backend, request("a", 50)))
            await until(lambda: line.source.live)
            line.servers[0].goodbye()
            await line.serve("r2")
            await until(lambda: "draining" in str(line.backend.replicas()["r1"].problem))
            await line.servers[0].released()
            assert await running == list(range(50))
            await line.servers[0].close()
            await until(lambda: set(line.backend.replicas()) == {"r2"})
            await line.backend.ready()

    run(scenario)


def test_nothing_new_goes_to_one_that_leaves(run: Run) -> None:
    """Not even where the others are in trouble: they queue what comes, it will not come to it."""

    async def scenario() -> None:
        line = Line(PATIENT)
        await line.serve("r1")
        found = line.found
        await line.serve("r2")
        line.found = [*found, *line.found]
        line.source.problem = "restarting the ranks"
        line.backend.start()
        await until(lambda: len(line.backend.replicas()) == 2)
        line.servers[0].goodbye()
        await until(lambda: line.backend.replicas()["r1"].is_leaving)
        line.source.delay_s = 0.05
        running = [asyncio.create_task(tokens(line.backend, request(f"a{i}", 2))) for i in range(10)]
        await until(lambda: len(line.source.live) == 10)
        assert line.backend.replicas()["r1"].in_flight == 0
        await asyncio.gather(*running)
        await line.backend.close()
        for server in line.servers:
            await server.close()

    run(scenario)


def test_listens_on_the_given_address_alone(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.2", line.port), timeout=1).close()

    run(scenario)


def test_unavailable_without_a_replica(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as line:
            nobody = LineBackend(line.find, secret=SECRET)
            for ask in (nobody.info(), nobody.ready(), tokens(nobody, request())):
                with pytest.raises(e.Unavailable, match="no replica is connected"):
                    await ask
            with pytest.raises(e.Unavailable, match="gone before it began"):
                await anext(line.backend.generate(request(), "gone"))

    run(scenario)


def test_a_machine_that_stood_still_loses_no_replica(run: Run) -> None:
    async def scenario() -> None:
        async with connected(QUICK) as line:
            line.found = []  # lost is lost
            await asyncio.sleep(0.1)
            time.sleep(QUICK.silence_s + 0.3)
            await asyncio.sleep(0.1)
            await line.backend.ready()

    run(scenario)


# Processes that die and stop

CHILD = textwrap.dedent("""
    import asyncio, sys
    from shoal.router.backend import ModelInfo, Status
    from shoal.router.line import LineLimits, Welcome
    from shoal.router.line_server import MAX_STRANGERS, LineServer
    from shoal.runtime.generation import TokenEvent
    from shoal.runtime.stats import Stats

    async def generate(request):
        for i in range(10**9):
            await asyncio.sleep(0.01)
            yield [TokenEvent(id=request.id, start=i, tokens=[i])]

    async def main():
        welcome = Welcome(sys.argv[1], ModelInfo(model="tiny", max_model_len=512, vocab_size=260))
        limits = LineLimits(beat_s=0.05)
        status = Status(None, Stats())
        server = LineServer(generate, secret=b"s" * 32, welcome=welcome, status=lambda: status, limits=limits)
        print(await server.start("127.0.0.1"), flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
""")


@contextmanager
def child(replica: str) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, replica], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Address(replica, "127.0.0.1", int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


def test_a_killed_replica_is_lost_at_once_and_its_successor_found(run: Run) -> None:
    async def scenario() -> None:
        line = Line(PATIENT)
        with child("r1") as (process, address), child("r2") as (_, successor):
            line.found = [address]
            line.backend.start()
            await until(line.backend.replicas)
            streams = [line.backend.generate(request(f"s{i}", 10**6)) for i in range(3)]
            for stream in streams:
                await anext(stream)
            line.found = [address, successor]
            process.kill()
            for stream in streams:
                with pytest.raises(ReplicaLost):
                    await asyncio.wait_for(to_its_end(stream), 5)
            await until(lambda: set(line.backend.replicas()) == {"r2"}, 3)  # sooner than the next search without cause
            assert (await anext(line.backend.generate(request())))[0].tokens == [0]
            await line.backend.close()

    run(scenario)


def test_a_stopped_replica_is_lost_after_its_silence_and_found_again(run: Run) -> None:
    async def scenario() -> None:
        line = Line(QUICK)
        with child("r1") as (process, address):
            line.found = [address]
            line.backend.start()
            await until(line.backend.replicas)
            stream = line.backend.generate(request("a", 10**6))
            await anext(stream)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(ReplicaLost):
                await to_its_end(stream)
            with pytest.raises(e.Unavailable):
                await line.backend.ready()
            process.send_signal(signal.SIGCONT)
            await until(line.backend.replicas)
            await line.backend.ready()
            await line.backend.close()

    run(scenario)
