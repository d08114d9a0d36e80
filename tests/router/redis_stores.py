"""A store to try, and a server that answers whatever it is told to."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shoal.router.meters import StoreMeter
from shoal.router.redis_store import RedisStore
from shoal.router.redis_url import parse_redis_url
from shoal.router.store import Script, StoreDown

ADD = Script(source="return redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'v', ARGV[2])")
ECHO = Script(source="return {KEYS[1], ARGV[1], 7, false}")


class Opened:
    """A store and what it counts."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.registry = CollectorRegistry()
        self.store = RedisStore(
            parse_redis_url(url), StoreMeter(self.registry), timeout_s=timeout_s, rng=random.Random(0)
        )

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"shoal_{name}", labels) or 0.0

    @property
    def is_writable(self) -> bool:
        return self.value("redis_writable") == 1.0


@asynccontextmanager
async def opened(url: str, *, timeout_s: float = 1.0) -> AsyncIterator[Opened]:
    """The timeout is generous, where it is not what is tested: these cores are shared."""
    what = Opened(url, timeout_s)
    try:
        yield what
    finally:
        await what.store.close()


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.01)


async def fails(call: Coroutine[Any, Any, Any], *, within_s: float = 1.0) -> str:
    """The reason, as given."""
    start = time.monotonic()
    with pytest.raises(StoreDown) as down:
        await call
    assert time.monotonic() - start < within_s
    return str(down.value)


async def open_breaker(store: RedisStore) -> None:
    for _ in range(3):
        await fails(store.get(b"k"))
    assert not store.available


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "shoal.router"]


async def use(store: RedisStore) -> None:
    value = bytes(range(256)) * 300
    assert await store.get(b"{a}k") is None
    await store.set(b"{a}k", value, ttl_s=60)
    assert await store.get(b"{a}k") == value
    assert await store.run(ECHO, [b"{a}k"], [b"\xff\r\n"]) == [b"{a}k", b"\xff\r\n", 7, None]
    await store.run(ADD, [b"{a}s"], [1, b"one"])
    await store.run(ADD, [b"{a}s"], [3, b"three"])
    assert [(e.position, e.value) for e in await store.read(b"{a}s", after=0, wait_s=5)] == [(1, b"one"), (3, b"three")]
    assert [e.position for e in await store.read(b"{a}s", after=1, wait_s=0)] == [3]
    assert await store.read(b"{a}s", after=3, wait_s=0) == []
    await store.delete(b"{a}k", b"{a}s")
    assert await store.get(b"{a}k") is None
    assert store.available


class Liar:
    """Says `answer` to everything, or what that makes of it; hangs up at once where it is None. Counts its callers."""

    def __init__(self, answer: bytes | Callable[[bytes], bytes] | None) -> None:
        self.answer = answer
        self.callers = 0
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Liar:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._open:
            writer.close()
        await asyncio.gather(*self._open.values())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.callers += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[writer] = task
        with suppress(ConnectionError):
            while self.answer is not None and (data := await reader.read(65536)):
                writer.write(self.answer if isinstance(self.answer, bytes) else self.answer(data))
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
