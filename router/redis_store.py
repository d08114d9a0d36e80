"""Beside station 5: Redis as a `Store`. Whatever Redis does, a call ends in time: in an answer or in `StoreDown`.

Two breakers stand before it. *Asking* opens where calls are not answered: nothing, late, nonsense, the login refused,
still loading. Then nobody is asked. *Writing* opens where Redis answers that it will not write: read-only behind a
failover, full, unable to save, not permitted. Then reads go on, so what is cached is still served. While one is open a
task of ours probes, so no request pays for finding out: first with patience, since the way to a new master takes time
to find, then in the time that every call has.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import Gauge
from redis.exceptions import NoScriptError

from .breaker import Breaker
from .meters import StoreMeter
from .redis_link import REFUSED, UNREACHABLE, Deadline, Link, connect, diagnose, system_error
from .redis_url import RedisAddress
from .store import Entry, Script, StoreDown

logger = logging.getLogger("shoal.router")

_MAX_CALLS = 32  # short calls at once, each on a connection; others wait for their turn, within their own time
_MAX_READS = 256  # reads at once that wait for entries, each on a connection
_MAX_ENTRIES = 1024  # of one read
_LATE_S = 0.2  # behind its time a read without entries may end: Redis looks ten times a second whose time is over
_PATIENCE_S = 2.0  # of a probe, for which nobody waits
_PROBE_KEY = b"shoal:probe"
_GIVEN_UP = "given up"  # by its caller: no failure

Operation = Callable[[Link], Awaitable[Any]]


class RedisStore:
    """One ingress's way to Redis. Lives in one event loop; connects when it is first asked."""

    def __init__(
        self,
        address: RedisAddress,
        meter: StoreMeter,
        *,
        timeout_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """timeout_s: for one short call, waiting for its turn and connecting included."""
        rng = rng or random.Random()
        self._timeout_s = timeout_s
        self._meter = meter
        self._link = connect(address, _PATIENCE_S)
        self._short = _Lane(self._link, _MAX_CALLS)
        self._long = _Lane(self._link, _MAX_READS)
        self._digests: dict[Script, str] = {}
        self._has_complained = False
        self._closed = False
        self._asking = _Gate(
            Breaker(clock=clock, rng=rng),
            self._probe_asking,
            meter.available,
            blames=UNREACHABLE,
            subject=f"Redis at {address}",
            verb="answer",
        )
        self._writing = _Gate(
            Breaker(clock=clock, rng=rng),
            self._probe_writing,
            meter.writable,
            blames=REFUSED,
            subject=f"Redis at {address}",
            verb="write",
        )

    @property
    def available(self) -> bool:
        return not (self._closed or self._asking.is_open)

    async def get(self, key: bytes) -> bytes | None:
        async def operation(link: Link) -> bytes | None:
            return _bytes_or_none(await link.call(key, "GET", key))

        value: bytes | None = await self._ask(operation, self._asking)
        return value

    async def set(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        ttl_ms = max(1, round(ttl_s * 1000))
        await self._ask(lambda link: link.call(key, "SET", key, value, "PX", ttl_ms), self._asking, self._writing)

    async def delete(self, *keys: bytes) -> None:
        if keys:
            await self._ask(lambda link: link.call(keys[0], "DEL", *keys), self._asking, self._writing)

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        assert keys, "a script's keys say where it runs"
        digest = self._digests.get(script)
        if digest is None:
            digest = self._digests[script] = hashlib.sha1(script.source.encode(), usedforsecurity=False).hexdigest()

        async def operation(link: Link) -> Any:
            try:
                return await link.call(keys[0], "EVALSHA", digest, len(keys), *keys, *args)
            except NoScriptError:
                return await link.call(keys[0], "EVAL", script.source, len(keys), *keys, *args)

        return await self._ask(operation, self._asking, self._writing)

    async def read(self, stream: bytes, *, after: int, wait_s: float) -> list[Entry]:
        wait_ms = round(wait_s * 1000)
        block = ("BLOCK", wait_ms) if wait_ms > 0 else ()  # BLOCK 0 would wait for ever
        start = f"{after}-0"

        async def operation(link: Link) -> list[Entry]:
            answer = await link.call(stream, "XREAD", "COUNT", _MAX_ENTRIES, *block, "STREAMS", stream, start)
            return [_entry(*entry) for entry in answer[0][1]] if answer else []

        if wait_ms > 0:
            call = self._through(self._long, wait_s + _LATE_S + self._timeout_s, operation, self._asking)
        else:
            call = self._ask(operation, self._asking)
        entries: list[Entry] = await call
        return entries

    async def close(self) -> None:
        self._closed = True
        for gate in (self._asking, self._writing):
            await gate.close()
        await self._link.close()

    async def _ask(self, operation: Operation, *gates: _Gate) -> Any:
        start = time.perf_counter()
        answer = await self._through(self._short, self._timeout_s, operation, *gates)
        self._meter.seconds.observe(time.perf_counter() - start)
        return answer

    async def _through(self, lane: _Lane, seconds: float, operation: Operation, *gates: _Gate) -> Any:
        """The call, where all gates are closed; they learn what became of it."""
        if self._closed:
            raise StoreDown("the store is closed")
        tickets = [(gate, gate.enter()) for gate in gates]
        kind, detail = _GIVEN_UP, ""
        try:
            answer = await lane.run(operation, seconds)
            kind = ""
            return answer
        except _Failed as failed:
            kind, detail = failed.kind, failed.detail
            self._meter.errors.labels(kind).inc()
            if kind == "script":
                self._complain()
            raise StoreDown(f"the call failed ({kind}{detail})") from None
        finally:
            if not self._closed:
                for gate, ticket in tickets:
                    gate.settle(ticket, kind, detail)

    # In a cluster these ask one master of several. Where another is gone, calls to it open the breaker again, which
    # is then probed ever less often.

    async def _probe_asking(self) -> None:
        await self._link.doubt()
        for seconds in (_PATIENCE_S, self._timeout_s):
            await self._short.run(lambda link: link.call(_PROBE_KEY, "GET", _PROBE_KEY), seconds)

    async def _probe_writing(self) -> None:
        await self._link.doubt()  # another may be the master now
        await self._short.run(lambda link: link.call(_PROBE_KEY, "SET", _PROBE_KEY, b"", "PX", 1000), _PATIENCE_S)

    def _complain(self) -> None:
        """Once: neither the server's text nor the call may be shown, and no breaker opens for what it is not."""
        if not self._has_complained:
            self._has_complained = True
            logger.warning("Redis refused a call as wrong; shoal_redis_errors_total{kind=script} counts such calls")


class _Failed(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


class _Lane:
    """How many calls of one sort may be on the link at once: those that wait take no place from those that do not."""

    def __init__(self, link: Link, places: int) -> None:
        self._link = link
        self._places = asyncio.Semaphore(places)

    async def run(self, operation: Operation, seconds: float) -> Any:
        """Raises _Failed, and nothing else."""
        has_place = False
        try:
            async with Deadline(seconds), self._places:
                has_place = True
                return await operation(self._link)
        except Exception as error:  # noqa: BLE001 - a server that lies can make a parser raise anything
            # That all places were taken says nothing of Redis.
            raise _Failed(diagnose(error) if has_place else "queue", system_error(error)) from None


class _Gate:
    """A breaker with its gauge, its two log lines, and the task that probes while it is open."""

    def __init__(
        self,
        breaker: Breaker,
        probe: Callable[[], Awaitable[None]],
        gauge: Gauge,
        *,
        blames: frozenset[str],
        subject: str,
        verb: str,
    ) -> None:
        """probe: raises where the gate must stay open. blames: the kinds of failure that open it. verb: what is not
        done then."""
        self._breaker = breaker
        self._probe = probe
        self._gauge = gauge
        self._blames = blames
        self._down = f"{subject} does not {verb}: nothing new is cached until it does"
        self._up = f"{subject} {verb}s again"
        self._task: asyncio.Task[None] | None = None
        gauge.set(1)

    @property
    def is_open(self) -> bool:
        return self._breaker.is_open

    def enter(self) -> int:
        """A ticket for one call. Raises StoreDown while the gate is open: its probe is ours."""
        ticket = None if self._breaker.is_open else self._breaker.enter()
        if ticket is None:
            raise StoreDown("it was not asked: a breaker is open")
        return ticket

    def settle(self, ticket: int, kind: str, detail: str) -> None:
        """The call has failed of `kind`; it was answered where that is empty."""
        was_open = self._breaker.is_open
        if not kind:
            self._breaker.succeeded(ticket)
        elif kind in self._blames:
            self._breaker.failed(ticket)
        else:
            self._breaker.left(ticket)
        if self._breaker.is_open and not was_open:
            self._gauge.set(0)
            logger.warning("%s (%s%s)", self._down, kind, detail)
            self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while self._breaker.is_open:
            await asyncio.sleep(self._breaker.probe_in_s)
            ticket = self._breaker.enter()
            if ticket is None:
                continue
            try:
                await self._probe()
            except Exception:  # noqa: BLE001 - whatever it was, Redis is not back
                self._breaker.failed(ticket)
            else:
                self._breaker.succeeded(ticket)
        self._gauge.set(1)
        logger.warning("%s", self._up)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


def _bytes_or_none(answer: Any) -> bytes | None:
    if answer is None or isinstance(answer, bytes):
        return answer
    raise TypeError("a GET is answered with bytes or nothing")


def _entry(name: bytes, fields: list[bytes]) -> Entry:
    """Scripts of ours add entries of one field."""
    value = fields[1]
    if not isinstance(value, bytes):
        raise TypeError("a field of a stream is bytes")
    return Entry(position=int(name.partition(b"-")[0]), value=value)
