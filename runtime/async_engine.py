"""Around station 9: the engine in a thread of its own, its events as asynchronous streams.

Two threads meet here. The loop's side (`generate`) puts streams into an inbox and reads what they are handed; the
engine's side takes the inbox between steps and hands over a step's events with one call into each event loop. The
engine and `_streams` belong to the engine's thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from ..parallel.group import RankInfo
from .blocks import Changes
from .engine import Engine
from .errors import EngineDead, EngineError, ShoalError, Unavailable
from .generation import FinishReason, GenerationRequest, TokenEvent
from .grammar import FREE, Constraint
from .stats import Stats

log = logging.getLogger(__name__)

STATS_EVERY_S = 0.1
CHECK_EVERY_S = 0.5  # of the ranks, while there is no work
MAX_CHANGES = 32  # of the cache, kept for whoever takes them; more stay in the pool's journal


class _Stream:
    """One consumer of one log. Lives on the consumer's event loop, but for `num_sent`."""

    def __init__(self, request: GenerationRequest, constraint: Constraint) -> None:
        self.request = request
        self.constraint = constraint
        self.loop = asyncio.get_running_loop()
        self.num_sent = len(request.tokens)  # tokens of the log that were handed over
        self.abandoned = False  # by its consumer, before its end
        self.ended = False
        self._ready: list[TokenEvent] = []
        self._refusal: ShoalError | None = None
        self._wake = asyncio.Event()

    def push(self, item: TokenEvent | ShoalError) -> None:
        if isinstance(item, ShoalError):
            self._refusal, self.ended = item, True
        else:
            self._ready.append(item)
            self.ended = item.finish_reason is not None
        self._wake.set()

    async def take(self) -> list[TokenEvent]:
        """All events that are there, at least one; raises if the request was refused."""
        await self._wake.wait()
        self._wake.clear()
        if self._refusal is not None:
            raise self._refusal
        events, self._ready = self._ready, []
        return events


_Batch = list[tuple[_Stream, TokenEvent | ShoalError]]


def _hand_over(batch: _Batch) -> None:
    for stream, item in batch:
        stream.push(item)


class AsyncEngine:
    """Serves many consumers from one `Engine`, whose steps run in a daemon thread from now on."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()  # of what may be posted, and whether it still will be read
        self._coming: deque[_Stream] = deque()
        self._leaving: deque[_Stream] = deque()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._streams: dict[str, _Stream] = {}
        self._draining = False
        self._ends_rest = False
        self._closing = False
        self._death: EngineDead | None = None
        self._busy = False
        self._restarting: str | None = None
        self.last_progress = clock()
        self._changes: deque[Changes] = deque()
        self._stats = engine.stats()
        self._stats_at = self.last_progress
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._thread.start()

    # The consumers' side

    async def generate(
        self, request: GenerationRequest, constraint: Constraint = FREE
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """The log's events as they come, those that came together in one item; the last carries the finish reason.

        Leaving early aborts the generation. If the engine dies, the last event says so.

        Raises:
            InvalidRequest, ContextTooLong, QueueFull, RowFailed: refused, on the first item.
            Unavailable: draining. EngineDead: the engine had stopped before.
        """
        stream = self._post(request, constraint)
        try:
            while True:
                events = await stream.take()
                yield events
                if events[-1].finish_reason is not None:
                    return
        finally:
            if not stream.ended:
                stream.abandoned = True
                self._leaving.append(stream)
                self._wake.set()

    def _post(self, request: GenerationRequest, constraint: Constraint) -> _Stream:
        with self._lock:
            if self._death is not None:
                raise EngineDead(str(self._death))
            if self._draining:
                raise Unavailable("the engine is draining and takes no more generations")
            self._engine.check_queue(len(self._coming))
            stream = _Stream(request, constraint)
            self._coming.append(stream)
            self._idle.clear()
        self._wake.set()
        return stream

    def stats(self) -> Stats:
        """How things stood a moment (`STATS_EVERY_S`, or one step) ago."""
        return self._stats

    def take_cache_changes(self) -> list[Changes]:
        """What the cache has gained and lost since the last call, in order. For one taker."""
        return [self._changes.popleft() for _ in range(len(self._changes))]

    def ranks(self) -> list[RankInfo]:
        """The grid as it stands, by rank."""
        return self._engine.ranks()

    def is_stuck(self, now: float | None = None, limit: float = 10.0) -> bool:
        """Whether there is work and no step has ended for `limit` seconds. Alive without a step is dead.

        A restart of the ranks is not stuck: the group itself gives it a limit.
        """
        now = self._clock() if now is None else now
        return self._busy and self._restarting is None and now - self.last_progress > limit

    @property
    def healthy(self) -> bool:
        """Whether the engine makes steps, or is on its way back to making them."""
        return self._death is None and self._thread.is_alive() and not self.is_stuck()

    @property
    def ready(self) -> bool:
        """Whether new generations are taken and go on at once. While the ranks restart they are queued."""
        return self.healthy and not self._draining and self._restarting is None

    @property
    def state(self) -> str:
        """How things stand, in words for the operator; "ready" where `ready`."""
        if self._death is not None:
            return str(self._death)
        if not self.healthy:
            return "the engine has stopped making steps"
        if self._draining:
            return "the engine is draining"
        return self._restarting or "ready"

    async def drain(self, timeout_s: float) -> None:
        """Take no more; let what is live end by itself until the deadline, then abort the rest.

        Where the engine is stuck it dies: nothing will end by itself, and something that is live may be the cause.
        """
        with self._lock:
            self._draining = True
        if self.is_stuck():
            self._end_all(FinishReason.ERROR, "the engine has stopped making steps")
            return
        if await asyncio.to_thread(self._idle.wait, timeout_s):
            return
        self._ends_rest = True
        self._wake.set()
        if self._restarting is None and await asyncio.to_thread(self._idle.wait, 1.0):
            return
        if self._restarting is not None:  # the engine's thread is away, maybe for longer than anyone waits
            self._end_all(FinishReason.ABORT, "the engine is shutting down")

    def close(self, timeout_s: float = 2.0) -> None:
        """Abort what is live, end the thread and the ranks. Idempotent."""
        self._draining = self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._end_all(FinishReason.ABORT, "the engine was closed")  # a step that hangs is left behind, its thread too
        self._engine.close()

    # The engine's side

    def _run(self) -> None:
        try:
            while not self._closing:
                self._work()
            self._end_all(FinishReason.ABORT, "the engine was closed")
        except Exception as failure:
            log.error("the engine's thread has ended", exc_info=failure)
            self._end_all(FinishReason.ERROR, str(failure))

    def _end_all(self, reason: FinishReason, error: str) -> None:
        """The last thing that any consumer hears. Only the first call counts."""
        with self._lock:
            if self._death is not None:
                return
            self._death = EngineDead(error)
            rest = [*self._streams.values(), *self._coming]
            self._streams = {}
        self._busy = False
        self._send((stream, _last_event(stream, reason, error)) for stream in rest if not stream.abandoned)
        self._idle.set()

    def _work(self) -> None:
        """One step, or a rest where there is nothing to do."""
        self._take_inbox()
        if self._engine.has_work:
            self._busy = True
            self._deliver(self._engine.step())
            self.last_progress = now = self._clock()
            # Behind `last_progress`, or a restart would look stuck at its end.
            self._restarting = self._engine.restarting
            if now - self._stats_at >= STATS_EVERY_S or self._restarting is not None:
                self._publish_stats(now)
            return
        self._busy = False
        self._publish_stats(self._clock())
        with self._lock:
            if not self._coming:
                self._idle.set()
        if self._wake.wait(CHECK_EVERY_S):
            self._wake.clear()
        else:
            self._engine.check()
            self._restarting = self._engine.restarting
        self.last_progress = self._clock()

    def _take_inbox(self) -> None:
        # An id may be used again once its consumer has left: what left before the last newcomer came leaves first.
        num_coming = len(self._coming)
        while self._leaving:
            self._forget(self._leaving.popleft())
        for _ in range(num_coming):
            stream = self._coming.popleft()
            if not stream.abandoned:
                self._admit(stream)
        if self._ends_rest:
            self._ends_rest = False
            self._deliver(self._engine.end_all(FinishReason.ABORT, error="the engine is shutting down"))

    def _admit(self, stream: _Stream) -> None:
        try:
            self._engine.add(stream.request, stream.constraint)
        except EngineDead:
            raise
        except ShoalError as refusal:
            self._send([(stream, refusal)])
        except Exception as failure:
            log.error("a generation could not be taken in", exc_info=failure)
            self._send([(stream, EngineError(f"the generation could not be taken in: {type(failure).__name__}"))])
        else:
            with self._lock:
                self._streams[stream.request.id] = stream

    def _forget(self, stream: _Stream) -> None:
        if self._streams.get(stream.request.id) is stream:
            del self._streams[stream.request.id]
            self._engine.abort(stream.request.id)

    def _deliver(self, events: list[TokenEvent]) -> None:
        batch: _Batch = []
        for event in events:
            stream = self._streams.get(event.id)
            if stream is None:
                continue  # `close` did not wait for this step and has told the consumer
            stream.num_sent += len(event.tokens)
            if event.finish_reason is not None:
                del self._streams[event.id]
            batch.append((stream, event))
        self._send(batch)

    def _send(self, items: Iterable[tuple[_Stream, TokenEvent | ShoalError]]) -> None:
        """Hand items over with one call into each event loop (there is one, but in tests)."""
        batches: dict[asyncio.AbstractEventLoop, _Batch] = {}
        for stream, item in items:
            batches.setdefault(stream.loop, []).append((stream, item))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_hand_over, batch)
            except RuntimeError:  # the loop is closed: its consumers are gone without a word
                for stream, _ in batch:
                    self._forget(stream)

    def _publish_stats(self, now: float) -> None:
        self._stats = self._engine.stats()
        self._stats_at = now
        if len(self._changes) < MAX_CHANGES and (changes := self._engine.take_cache_changes()):
            self._changes.append(changes)


def _last_event(stream: _Stream, reason: FinishReason, error: str) -> TokenEvent:
    return TokenEvent(id=stream.request.id, start=stream.num_sent, tokens=[], finish_reason=reason, error=error)
