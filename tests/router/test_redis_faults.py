"""How each failure of Redis ends at the store, how long that takes, and that Redis is found again."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.router.store import StoreDown

from ..redis_servers import RedisServer, free_port, needs_redis
from .redis_stores import ADD, Liar, fails, lines, open_breaker, opened, until, use

pytestmark = needs_redis


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may break."""
    with RedisServer(tmp_path) as running:
        yield running


# How it fails, and that it comes back


def test_down_and_up_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path)

    async def scenario() -> None:
        async with opened(server.url) as o:
            await open_breaker(o.store)
            assert o.value("redis_errors_total", kind="connection") == 3
            assert o.value("redis_available") == 0
            for _ in range(50):
                await fails(o.store.get(b"k"))
            await asyncio.sleep(0.6)  # a probe fails, too
            assert len(lines(caplog)) == 1
            assert "does not answer" in lines(caplog)[0]
            assert "Connect call failed" in lines(caplog)[0] or "refused" in lines(caplog)[0]
            await asyncio.to_thread(server.start)
            await until(lambda: o.store.available, "the store to be back")
            await use(o.store)
            assert o.value("redis_available") == 1
            assert [line.rpartition("answers ")[2] for line in lines(caplog)[1:]] == ["again"]

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_a_restart_between_two_calls_goes_unnoticed(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server.url) as o:
            await asyncio.gather(*(o.store.get(b"k") for _ in range(10)))
            await asyncio.to_thread(own_server.stop)
            await asyncio.to_thread(own_server.start)
            for _ in range(10):
                assert await o.store.get(b"k") is None

    asyncio.run(scenario())


def test_hung(own_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with opened(own_server.url, timeout_s=0.05) as o:
            await o.store.set(b"k", b"v", ttl_s=60)
            own_server.pause()
            burst = await asyncio.wait_for(
                asyncio.gather(*(o.store.get(b"k") for _ in range(200)), return_exceptions=True), 3
            )
            assert all(isinstance(answer, StoreDown) for answer in burst)
            assert not o.store.available
            start = time.monotonic()
            for _ in range(1000):
                await fails(o.store.get(b"k"))
            assert time.monotonic() - start < 1.0, "none added once the breaker is open"
            own_server.resume()
            await until(lambda: o.store.available, "the store to be back")
            assert len(lines(caplog)) == 2

        async with opened(own_server.url) as o:
            assert await o.store.get(b"k") == b"v"

    asyncio.run(scenario())


def test_a_read_of_a_hung_server_ends(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server.url, timeout_s=0.05) as o:
            own_server.pause()
            assert "timeout" in await fails(o.store.read(b"s", after=0, wait_s=0.2), within_s=5)
            own_server.resume()

    asyncio.run(scenario())


def test_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: RedisServer) -> None:
        async with opened(server.url) as o:
            await o.store.set(b"k", b"v", ttl_s=60)
            server.ask("CONFIG", "SET", "maxmemory", 1)
            assert "full" in await fails(o.store.set(b"new", b"v", ttl_s=60))
            assert "full" in await fails(o.store.run(ADD, [b"s"], [1, b"v"]))
            assert "full" in await fails(o.store.set(b"new", b"v", ttl_s=60))
            assert not o.is_writable
            assert o.store.available
            assert await o.store.get(b"k") == b"v"
            assert await o.store.read(b"s", after=0, wait_s=0) == []
            server.ask("CONFIG", "SET", "maxmemory", 0)
            await until(lambda: o.is_writable, "the store to be written again")
            await use(o.store)
            assert len(lines(caplog)) == 2

    with RedisServer(tmp_path, {"maxmemory-policy": "noeviction"}) as server:
        asyncio.run(scenario(server))


def test_evicting_is_no_failure(tmp_path: Path) -> None:
    async def scenario(server: RedisServer) -> None:
        async with opened(server.url, timeout_s=2) as o:
            for i in range(400):
                await o.store.set(b"e%d" % i, bytes(20_000), ttl_s=60)
            assert await o.store.get(b"e399") is not None
            assert server.ask("DBSIZE") < 400
            assert o.store.available
            assert o.is_writable

    with RedisServer(tmp_path, {"maxmemory": "4mb", "maxmemory-policy": "allkeys-lru"}) as server:
        asyncio.run(scenario(server))


def test_read_only_behind_a_failover(own_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with opened(own_server.url) as o:
            await o.store.set(b"k", b"v", ttl_s=60)
            own_server.ask("REPLICAOF", "127.0.0.1", free_port())
            assert "readonly" in await fails(o.store.set(b"new", b"v", ttl_s=60))
            assert "readonly" in await fails(o.store.run(ADD, [b"s"], [1, b"v"]))
            assert "readonly" in await fails(o.store.delete(b"k"))
            assert await o.store.get(b"k") == b"v", "what is cached is still served"
            assert "was not asked" in await fails(o.store.set(b"new", b"v", ttl_s=60))
            own_server.ask("REPLICAOF", "NO", "ONE")
            await until(lambda: o.is_writable, "the store to be written again")
            await use(o.store)
            assert [line.rpartition(" ")[2] for line in lines(caplog)] == ["(readonly)", "again"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("login", "heal"),
    [
        ("", "CONFIG SET requirepass ''"),
        (":wrong-geheim@", "CONFIG SET requirepass wrong-geheim"),
        ("nobody:wrong-geheim@", "ACL SETUSER nobody on >wrong-geheim allkeys +@all"),
    ],
)
def test_login_refused(tmp_path: Path, login: str, heal: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: RedisServer) -> None:
        async with opened(f"redis://{login}127.0.0.1:{server.port}") as o:
            for _ in range(3):
                reason = await fails(o.store.get(b"k"))
                assert "auth" in reason
                assert "geheim" not in reason
            assert not o.store.available
            server.ask(*shlex.split(heal))
            await until(lambda: o.store.available, "the store to be back")
            assert "geheim" not in caplog.text

    with RedisServer(tmp_path, password="right-geheim") as server:
        asyncio.run(scenario(server))


def test_a_call_that_is_wrong_in_itself_fails_alone(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with opened(server.url) as o:
            await o.store.set(b"secret-key", b"v", ttl_s=60)
            for _ in range(5):
                reason = await fails(o.store.run(ADD, [b"secret-key"], [1, b"v"]))
                assert "script" in reason
                assert "secret" not in reason
            assert o.store.available
            assert o.is_writable
            assert len(lines(caplog)) == 1
            assert "secret" not in caplog.text

    asyncio.run(scenario())


# Lies

NONSENSE = {
    "hangs up": None,
    "silence": b"",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a number": b":5\r\n",
    "a length that is none": b"$many\r\n",
    "a length that never comes": b"$99999999999\r\nx",
    "no end of line": b"x" * 300_000,
    "zeros": bytes(70_000),
    "depth": b"*1\r\n" * 20_000,
    "width": b"*1000000000\r\n:1\r\n",
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense(answer: bytes | None) -> None:
    async def scenario() -> None:
        async with Liar(answer) as liar, opened(liar.url, timeout_s=0.2) as o:
            for _ in range(3):
                await fails(o.store.get(b"k"), within_s=2)
            assert not o.store.available
            callers = liar.callers
            for _ in range(100):
                await fails(o.store.get(b"k"))
            assert liar.callers == callers, "an open breaker asks nobody"
            liar.answer = b"$-1\r\n"
            await until(lambda: o.store.available, "the store to be back")
            assert await o.store.get(b"k") is None

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [b"", b"*1\r\n$1\r\nk\r\n", b"+OK\r\n", b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n:1\r\n"])
def test_a_stream_of_nonsense(answer: bytes) -> None:
    async def scenario() -> None:
        async with Liar(answer) as liar, opened(liar.url, timeout_s=0.1) as o:
            await fails(o.store.read(b"s", after=0, wait_s=0.1), within_s=3)

    asyncio.run(scenario())


SCRIPT_6 = "ERR Error running script (call to f_abc): @user_script:1: @user_script: 1: -"


@pytest.mark.parametrize(
    ("error", "kind", "available", "writable"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading", False, True),
        ("BUSY Redis is busy running a script", "busy", False, True),
        ("NOAUTH Authentication required.", "auth", False, True),
        ("ERR Protocol error: unauthenticated multibulk length", "auth", False, True),
        ("CLUSTERDOWN The cluster is down", "cluster", False, True),
        ("MASTERDOWN Link with MASTER is down", "cluster", False, True),
        ("MOVED 3999 127.0.0.1:6381", "cluster", False, True),
        ("READONLY You can't write against a read only replica.", "readonly", True, False),
        (f"{SCRIPT_6}READONLY You can't write against a read only replica.", "readonly", True, False),
        ("OOM command not allowed when used memory > 'maxmemory'.", "full", True, False),
        (f"{SCRIPT_6}OOM command not allowed when used memory > 'maxmemory'.", "full", True, False),
        ("MISCONF Redis is configured to save RDB snapshots", "misconf", True, False),
        ("NOREPLICAS Not enough good replicas to write.", "misconf", True, False),
        ("NOPERM this user has no permissions to run the 'set' command", "denied", True, False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "script", True, True),
        ("ERR user_script:1: OOMPH is not a code", "script", True, True),
    ],
)
def test_what_each_error_closes(error: str, kind: str, available: bool, writable: bool) -> None:
    async def scenario() -> None:
        async with Liar(f"-{error}\r\n".encode()) as liar, opened(liar.url) as o:
            for _ in range(3):
                assert f"({kind})" in await fails(o.store.set(b"k", b"v", ttl_s=1))
            assert (o.store.available, o.is_writable) == (available, writable)
            assert o.value("redis_errors_total", kind=kind) == 3

    asyncio.run(scenario())
