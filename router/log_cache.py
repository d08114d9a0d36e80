"""Station 5 with a store: every log is read from wherever it is, by name, and made once by whoever comes first.

    open ──> a live log of this name here? ── yes ──> one more reader
                  │ no
                  └──> one more live log, with a task that finds out where it comes from (`log_task.py`)

Without the store all of this still holds within the process: nothing fails, nothing waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..runtime.generation import GenerationRequest, TokenEvent
from .cache import CacheMode, CacheStatus, Caching, Lead, Reading, Refused, uncached
from .config import RouterConfig
from .live_log import LiveLog, LogReader
from .log_key import LogKeys
from .log_store import LogStore
from .log_task import LogTask, reused_key
from .log_value import Head, Seal
from .meters import CacheMeter
from .store import Store

_CLOSE_S = 1.0


class LogCache:
    """The response cache of one ingress; all of it belongs to one event loop.

    model: a digest of all that the answers depend on beside the request: name, weights, dtype, tokenizer. secret: the
    cluster's. clock: unix seconds, for the age of hits.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: str,
        secret: bytes,
        config: RouterConfig,
        meter: CacheMeter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = LogKeys(secret, model=model)
        self._shared = LogStore(store, Seal(secret, max_bytes=config.cache_max_bytes), config=config, meter=meter)
        self._meter = meter
        self._clock = clock
        self._live: dict[bytes, LiveLog] = {}
        self._tasks: dict[asyncio.Task[None], LogTask] = {}

    def open(self, request: GenerationRequest, lead: Lead, caching: Caching) -> Reading:
        """See `ResponseCache`. The request is a log at its beginning: `request.tokens` is empty."""
        assert not request.tokens
        if not _is_cached(caching):
            self._meter.lookups.labels(CacheStatus.BYPASS.value).inc()
            return uncached(request, lead, caching)
        content = self._keys.content(request, scope=caching.scope, is_reproducible=caching.is_reproducible)
        if caching.idempotency is None or caching.is_reproducible:
            name, head = content, Head(request.seed)
        else:
            name = self._keys.idempotent(*caching.idempotency, scope=caching.scope)
            head = Head(request.seed, content)
        log = self._log(name, head, caching)
        if log.tape.head.fingerprint != head.fingerprint:
            return Refused(reused_key())
        must_exist = caching.resumes and not caching.is_reproducible
        return LogReading(LogReader(log, request, lead, must_exist=must_exist), self._meter)

    async def close(self) -> None:
        for task in self._tasks.values():
            task.close()
        if self._tasks:
            _, late = await asyncio.wait([*self._tasks], timeout=_CLOSE_S)
            for running in late:
                running.cancel()

    def _log(self, name: bytes, head: Head, caching: Caching) -> LiveLog:
        """The one that lives here, or a new one."""
        if caching.mode is CacheMode.ONLY:
            return self._start(name, head, LogTask.look)
        if caching.mode is CacheMode.REFRESH and not caching.resumes:
            return self._start(name, head, LogTask.refresh)
        log = self._live.get(name)
        if log is None or log.has_failed:
            log = self._start(name, head, LogTask.share)
            if name not in self._live:
                self._meter.flights.inc()
            self._live[name] = log
        return log

    def _start(self, name: bytes, head: Head, way: Callable[[LogTask], Coroutine[Any, Any, None]]) -> LiveLog:
        task = LogTask(self._shared, name, head, forget=self._forget, clock=self._clock)
        running = asyncio.get_running_loop().create_task(way(task))
        self._tasks[running] = task
        running.add_done_callback(self._ended)
        return task.log

    def _ended(self, running: asyncio.Task[None]) -> None:
        task = self._tasks.pop(running)
        self._forget(task.log)
        task.close()

    def _forget(self, log: LiveLog) -> None:
        if self._live.get(log.name) is log:
            del self._live[log.name]
            self._meter.flights.dec()


def _is_cached(caching: Caching) -> bool:
    return caching.mode is not CacheMode.BYPASS and (caching.is_reproducible or caching.idempotency is not None)


class LogReading:
    """`Reading` of a live log."""

    def __init__(self, reader: LogReader, meter: CacheMeter) -> None:
        self.status = CacheStatus.MISS
        self.age_s = 0.0
        self._reader = reader
        self._meter = meter
        self._is_settled = False

    def __aiter__(self) -> LogReading:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if not self._is_settled:
            await self.settled()
        return [await self._reader.next()]

    async def settled(self) -> None:
        """Who began a log is not who shares it, nor who comes when it is over and on its way to the store."""
        origin = await self._reader.origin()
        if origin is None or self._is_settled:
            return
        self._is_settled = True
        if origin is CacheStatus.MISS and not self._reader.has_begun_it:
            origin = CacheStatus.HIT if self._reader.found_it_whole else CacheStatus.SHARED
        self.status = origin
        self.age_s = self._reader.log.age_s
        self._meter.lookups.labels(self.status.value).inc()

    def stopped(self, length: int, stop: str) -> None:
        self._reader.log.stop(length, stop)

    async def aclose(self) -> None:
        self._reader.close()
