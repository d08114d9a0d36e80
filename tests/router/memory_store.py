"""Redis in memory, as far as the response cache uses it: no threads, no clock but the loop's or the one it is given.

`MemoryRedis` is the server, with what it holds. A `MemoryStore` is one ingress's way to it, with faults of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from shoal.router.log_store import APPEND, FOLLOW, OPEN
from shoal.router.store import Entry, Script, StoreDown

Procedure = Callable[["MemoryRedis", Sequence[bytes], Sequence[bytes | int]], Any]


class MemoryRedis:
    """Keys with a time to live. clock: seconds; default: the running loop's. scripts: what Lua does, in Python."""

    def __init__(
        self, *, clock: Callable[[], float] | None = None, scripts: dict[Script, Procedure] | None = None
    ) -> None:
        self.scripts = {OPEN: _open, APPEND: _append, FOLLOW: _follow} | (scripts or {})
        self._clock = clock
        self._values: dict[bytes, bytes] = {}
        self._streams: dict[bytes, list[tuple[int, bytes]]] = {}
        self._ends: dict[bytes, float] = {}
        self._waiters: set[asyncio.Future[None]] = set()

    def now(self) -> float:
        return asyncio.get_running_loop().time() if self._clock is None else self._clock()

    def held(self) -> set[bytes]:
        for key in [*self._ends]:
            self._expire(key)
        return {*self._values, *self._streams}

    def flush(self) -> None:
        """All is forgotten, as by a restart."""
        for held in (self._values, self._streams, self._ends):
            held.clear()

    def get(self, key: bytes) -> bytes | None:
        self._expire(key)
        return self._values.get(key)

    def set(self, key: bytes, value: bytes, ttl_s: float) -> None:
        self._values[key] = value
        self._ends[key] = self.now() + ttl_s

    def delete(self, *keys: bytes) -> None:
        for key in keys:
            for held in (self._values, self._streams, self._ends):
                held.pop(key, None)  # type: ignore[attr-defined]

    def expire(self, key: bytes, ttl_s: float) -> None:
        if key in self._values or key in self._streams:
            self._ends[key] = self.now() + ttl_s

    def add(self, stream: bytes, number: int, value: bytes) -> None:
        entries = self._streams.setdefault(stream, [])
        assert number > (entries[-1][0] if entries else 0), "XADD: the ID is equal or smaller than the last one"
        entries.append((number, value))
        self.wake()

    def wake(self) -> None:
        """All who wait look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def entries(self, stream: bytes, after: int = 0) -> list[tuple[int, bytes]]:
        self._expire(stream)
        return [entry for entry in self._streams.get(stream, ()) if entry[0] > after]

    def last(self, stream: bytes) -> int:
        entries = self.entries(stream)
        return entries[-1][0] if entries else 0

    async def added(self, wait_s: float) -> None:
        """Until something is added to some stream, or for so long."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(wait_s):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)

    def _expire(self, key: bytes) -> None:
        if self._ends.get(key, self.now() + 1) <= self.now():
            self.delete(key)


class MemoryStore:
    """A `Store`. down: every call fails, waiting reads too. fails, loses: asked before each call, before its answer.

    delay_s: what each call takes. calls: what was asked.
    """

    def __init__(self, redis: MemoryRedis | None = None) -> None:
        self.redis = redis or MemoryRedis()
        self.delay_s = 0.0
        self.fails: Callable[[], bool] = lambda: False
        self.loses: Callable[[], bool] = lambda: False
        self.calls: Counter[str] = Counter()
        self._is_down = False

    @property
    def available(self) -> bool:
        return not self._is_down

    @property
    def down(self) -> bool:
        return self._is_down

    @down.setter
    def down(self, value: bool) -> None:
        self._is_down = value
        self.redis.wake()

    async def get(self, key: bytes) -> bytes | None:
        return await self._call("get", lambda: self.redis.get(key))  # type: ignore[no-any-return]

    async def set(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        await self._call("set", lambda: self.redis.set(key, value, ttl_s))

    async def delete(self, *keys: bytes) -> None:
        await self._call("delete", lambda: self.redis.delete(*keys))

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        procedure = self.redis.scripts[script]
        return await self._call(procedure.__name__.strip("_"), lambda: procedure(self.redis, keys, args))

    async def read(self, stream: bytes, *, after: int, wait_s: float) -> list[Entry]:
        end = self.redis.now() + wait_s
        while True:
            entries = await self._call("read", lambda: self.redis.entries(stream, after))
            left_s = end - self.redis.now()
            if entries or left_s <= 0:
                return [Entry(*entry) for entry in entries]
            await self.redis.added(left_s)

    async def close(self) -> None:
        return

    async def _call(self, name: str, action: Callable[[], Any]) -> Any:
        self.calls[name] += 1
        await asyncio.sleep(self.delay_s)
        if self._is_down or self.fails():
            raise StoreDown("it was made to fail")
        answer = action()
        if self.loses():
            raise StoreDown("it was made to lose its answer")
        return answer


# What the scripts do, line by line.


def _open(redis: MemoryRedis, keys: Sequence[bytes], args: Sequence[Any]) -> list[Any]:
    value_key, stream, lease, followers = keys
    me, lease_ms, keep_ms, follow_ms, head, after, only_if_there = args
    value = redis.get(value_key)
    if value is not None:
        return [b"value", value]
    last = redis.last(stream)
    if redis.get(lease) not in (None, me):
        redis.set(followers, b"1", follow_ms / 1000)
        return [b"tail", last]
    if last == 0 and only_if_there:
        return [b"none"]
    redis.set(lease, me, lease_ms / 1000)
    redis.add(stream, last + 1, head)
    redis.expire(stream, keep_ms / 1000)
    return [b"lead", last + 1, _range(redis, stream, 0 if last < after else after)]


def _append(redis: MemoryRedis, keys: Sequence[bytes], args: Sequence[Any]) -> list[Any]:
    value_key, stream, lease, followers = keys
    me, lease_ms, keep_ms, expected, number, part, value, ttl_ms = args
    if redis.get(lease) not in (None, me):
        return [b"taken"]
    if lease_ms > 0:
        redis.set(lease, me, lease_ms / 1000)
    else:
        redis.delete(lease)
    last = redis.last(stream)
    if last != expected:
        return [b"moved", last, _range(redis, stream, expected)]
    if part:
        redis.add(stream, number, part)
    if value:
        redis.set(value_key, value, ttl_ms / 1000)
    redis.expire(stream, keep_ms / 1000)
    return [b"ok", int(redis.get(followers) is not None and redis.get(value_key) is None)]


def _follow(redis: MemoryRedis, keys: Sequence[bytes], args: Sequence[Any]) -> list[Any]:
    _, stream, lease, followers = keys
    redis.set(followers, b"1", args[0] / 1000)
    return [int(redis.get(lease) is not None), redis.last(stream)]


def _range(redis: MemoryRedis, stream: bytes, after: int) -> list[Any]:
    return [[b"%d-0" % number, [b"p", value]] for number, value in redis.entries(stream, after)]
