"""The store on real servers: one, one behind Sentinels, a cluster."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from shoal.router.store import StoreDown

from ..redis_servers import Guarded, RedisServer, cluster_server, free_port, guarded_servers, needs_redis, tls_server
from .redis_stores import ADD, ECHO, Liar, fails, opened, until, use

pytestmark = needs_redis


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


def test_over_tcp(server: RedisServer) -> None:
    asyncio.run(_use(server.url))


def test_over_a_unix_socket(server: RedisServer) -> None:
    asyncio.run(_use(server.unix_url))


def test_with_a_password(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password="geheim") as guarded:
        asyncio.run(_use(guarded.url))
        asyncio.run(_use(guarded.unix_url))


def test_over_tls(tmp_path: Path) -> None:
    with tls_server(tmp_path) as (_, url):
        asyncio.run(_use(url))


async def _use(url: str) -> None:
    async with opened(url) as o:
        await use(o.store)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    async def scenario(url: str) -> None:
        async with opened(url) as o:
            assert "connection" in await fails(o.store.get(b"k"), within_s=5)

    with tls_server(tmp_path) as (_, url):
        asyncio.run(scenario(url.partition("?")[0]))


def test_what_is_set_expires(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url) as o:
            await o.store.set(b"brief", b"v", ttl_s=0.02)
            await o.store.set(b"long", b"v", ttl_s=3600)
            await asyncio.sleep(0.1)
            assert await o.store.get(b"brief") is None
            assert 3500 < server.ask("TTL", "long") <= 3600

    asyncio.run(scenario())


def test_a_script_is_sent_again_where_redis_has_forgotten_it(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url) as o:
            for _ in range(2):
                assert (await o.store.run(ECHO, [b"k"], [1]))[0] == b"k"
                server.ask("SCRIPT", "FLUSH")
            assert (await o.store.run(ECHO, [b"k"], [1]))[0] == b"k"
            assert o.value("redis_errors_total", kind="script") == 0

    asyncio.run(scenario())


def test_a_read_waits_for_the_first_entry_and_no_longer_than_told(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url, timeout_s=0.3) as o:
            await o.store.run(ADD, [b"grows"], [1, b"one"])
            reading = asyncio.create_task(o.store.read(b"grows", after=1, wait_s=30))
            await asyncio.sleep(0.7)  # longer than a call may take
            assert not reading.done()
            await o.store.run(ADD, [b"grows"], [2, b"two"])
            assert [(e.position, e.value) for e in await asyncio.wait_for(reading, 5)] == [(2, b"two")]
            assert await asyncio.wait_for(o.store.read(b"grows", after=2, wait_s=0.5), 5) == []
            assert o.store.available

    asyncio.run(scenario())


def test_waiting_reads_take_nothing_from_short_calls(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url, timeout_s=2) as o:
            reads = [asyncio.create_task(o.store.read(b"quiet%d" % i, after=0, wait_s=30)) for i in range(100)]
            await until(lambda: b"blocked_clients:100" in server_info(server), "100 readers to wait")
            await asyncio.gather(*(o.store.set(b"n%d" % i, b"%d" % i, ttl_s=60) for i in range(200)))
            values = await asyncio.gather(*(o.store.get(b"n%d" % i) for i in range(200)))
            assert values == [b"%d" % i for i in range(200)]
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    asyncio.run(scenario())


def server_info(server: RedisServer) -> bytes:
    """Redis-py makes a dictionary of INFO; one field's line is enough here."""
    return "\n".join(f"{name}:{value}" for name, value in server.ask("INFO").items()).encode()


def test_calls_that_are_cancelled_leave_no_answer_to_another(server: RedisServer) -> None:
    async def scenario() -> None:
        rng = random.Random(1)
        async with opened(server.url, timeout_s=5) as o:
            for i in range(40):
                await o.store.set(b"c%d" % i, b"%d" % i, ttl_s=60)
            for _ in range(10):
                tasks = [asyncio.create_task(o.store.get(b"c%d" % i)) for i in range(40)]
                for task in rng.sample(tasks, 25):
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    task.cancel()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                for i, answer in enumerate(answers):
                    assert answer == b"%d" % i or isinstance(answer, asyncio.CancelledError)
            assert o.store.available

    asyncio.run(scenario())


def test_a_busy_loop_is_not_taken_for_a_slow_redis(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url, timeout_s=0.05) as o:

            async def get() -> bytes | None:
                return await o.store.get(b"none")

            for _ in range(4):
                call = asyncio.create_task(get())
                await asyncio.sleep(0)
                time.sleep(0.2)  # this is the point
                assert await call is None
            assert o.store.available

    asyncio.run(scenario())


def test_a_closed_store_is_never_asked_again(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.url) as o:
            waiting = asyncio.create_task(o.store.read(b"quiet", after=0, wait_s=30))
            await o.store.set(b"k", b"v", ttl_s=60)
            await asyncio.sleep(0.05)
            await o.store.close()
            await o.store.close()
            await fails(asyncio.wait_for(waiting, 5))
            await fails(o.store.get(b"k"))
            assert not o.store.available

    asyncio.run(scenario())


# Sentinels and clusters


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_servers(tmp_path_factory.mktemp("guarded")) as servers:
        yield servers


def test_the_master_that_a_sentinel_names(guarded: Guarded) -> None:
    guarded.promote(guarded.first)
    asyncio.run(_use(guarded.url))
    dead = free_port()
    asyncio.run(_use(guarded.url.replace("127.0.0.1", f"127.0.0.1:{dead},127.0.0.1", 1)))


def test_the_new_master_is_found_behind_a_failover(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with opened(guarded.url) as o:
            await asyncio.gather(*(o.store.set(b"k%d" % i, b"v", ttl_s=60) for i in range(20)))
            await asyncio.to_thread(guarded.promote, guarded.second)
            assert await o.store.get(b"k1") == b"v", "the old master may still be read"
            deadline = time.monotonic() + 20
            while True:
                with suppress(StoreDown):
                    await o.store.set(b"new", b"v", ttl_s=60)
                    break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert guarded.second.ask("GET", "new") == b"v"
            await until(lambda: o.is_writable, "the new master")
            for i in range(20):  # over every connection there is
                await o.store.set(b"new%d" % i, b"v", ttl_s=60)

    guarded.promote(guarded.first)
    asyncio.run(scenario())


def test_a_service_that_no_sentinel_knows(guarded: Guarded) -> None:
    async def scenario() -> None:
        async with opened(guarded.url.replace("shoal", "other")) as o:
            assert "cluster" in await fails(o.store.get(b"k"))

    asyncio.run(scenario())


def test_a_cluster(tmp_path: Path) -> None:
    async def scenario(server: RedisServer) -> None:
        await _use(f"redis+cluster://127.0.0.1:{server.port}")
        async with AsyncExitStack() as stack:
            # The second host is none: the map comes from the other.
            hosts = f"127.0.0.1:{free_port()},127.0.0.1:{server.port}"
            o = await stack.enter_async_context(opened(f"redis+cluster://{hosts}"))
            plain = await stack.enter_async_context(opened(server.url))
            await use(o.store)
            await plain.store.set(b"k", b"v", ttl_s=60)
            assert await o.store.get(b"k") == b"v"
            server.ask("CLUSTER", "DELSLOTS", 0)
            await until(lambda: "cluster_state:fail" in info(server), "the cluster to fail")
            for _ in range(3):
                assert "cluster" in await fails(o.store.get(b"k"))
            assert not o.store.available
            server.ask("CLUSTER", "ADDSLOTS", 0)
            await until(lambda: o.store.available, "the store to be back")
            assert await o.store.get(b"k") == b"v"

    with cluster_server(tmp_path) as server:
        asyncio.run(scenario(server))


def test_a_cluster_on_the_move(server: RedisServer) -> None:
    """A slot that has moved is asked for where it is from then on, one that is moving is asked for there once."""

    async def scenario() -> None:
        async with Liar(None) as old, Liar(None) as new, opened(f"redis+cluster://127.0.0.1:{old.port}") as o:
            slots = f"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:{old.port}\r\n$2\r\nid\r\n".encode()
            redirects = [f"-ASK 12182 127.0.0.1:{new.port}\r\n", f"-MOVED 12182 127.0.0.1:{server.port}\r\n"]
            told: list[bytes] = []

            def answer(data: bytes) -> bytes:
                return slots if b"CLUSTER" in data else redirects.pop(0).encode()

            def asked(data: bytes) -> bytes:
                told.append(data)
                return b"+OK\r\n" if b"ASKING" in data else b"$3\r\nnew\r\n"

            old.answer, new.answer = answer, asked
            server.ask("SET", "foo", "moved")
            assert await o.store.get(b"foo") == b"new"
            assert b"ASKING" in told[0]
            for _ in range(3):
                assert await o.store.get(b"foo") == b"moved"

    asyncio.run(scenario())


def info(server: RedisServer) -> str:
    answer = server.ask("CLUSTER", "INFO")
    return "\n".join(f"{k}:{v}" for k, v in answer.items()) if isinstance(answer, dict) else answer.decode()
