"""Beside station 5: what makes one live log longer, in one task: lead it, or tail it from whoever leads it elsewhere.

    settle ── a finished log ─────────────────────────────────────────────> end
       ├──── the lease is ours ──> LEADS <── its leader is gone ──┐
       ├──── another one leads ──> TAILS ─────────────────────────┤
       └──── no store ───────────> ALONE <── no store ────────────┘
                                     └──> LEADS, once there is a store that has nothing else
    refresh, or the store's log differs ──> APART, to its end

One generation runs while it leads or is alone; its tokens are read here at once, and every so often all that are new go
to the store. Where that did not answer they go there later: a log that it does not have cannot be continued elsewhere.
What a reader was given stands: where the store says otherwise, the log goes on alone and is not stored.
A reader who has had a part of a log that only the store knows waits for the store: nothing else can go on with it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from enum import Enum, auto
from typing import Any, cast

import msgspec

from ..runtime.errors import (
    CacheMiss,
    EngineError,
    InvalidRequest,
    LogLost,
    QueueFull,
    RequestTimeout,
    ShoalError,
    Unavailable,
)
from ..runtime.generation import FinishReason, TokenEvent
from .backend import error_of, failure_of
from .cache import CacheStatus
from .live_log import Bell, Differs, LiveLog, LogReader, expired, refused
from .log_store import Appended, LogStore, Opened
from .log_value import Ending, Head, Kept, Part
from .store import StoreAbsent, StoreDown

FOLLOWED_S = 0.03  # between two writes while another ingress follows
UNFOLLOWED_S = 0.25  # and while none does: then they serve a takeover alone, which makes the missing tokens again
RETRY_S = 0.1  # between two looks for a store that does not answer


class Role(Enum):
    LEADS = auto()
    TAILS = auto()
    ALONE = auto()  # until there is a store
    APART = auto()  # whatever the store has


class LogTask:
    """Owns one live log. Whoever runs it forgets the log when it is over, and closes it: it may have been cancelled.

    forget: from then on nobody joins it; may be called again. clock: unix seconds, for the age of what is kept.
    """

    def __init__(
        self,
        shared: LogStore,
        name: bytes,
        head: Head,
        *,
        forget: Callable[[LiveLog], None],
        clock: Callable[[], float],
    ) -> None:
        self.log = LiveLog(name, head, on_change=self._ring)
        self._shared = shared
        self._meter = shared.meter
        self._link = shared.link(name, owner=secrets.token_hex(8))
        self._forget = forget
        self._clock = clock
        self._bell = Bell()
        self._reading: asyncio.Task[list[Part]] | None = None
        self._role = Role.ALONE
        self._due = 0.0  # on the loop's clock: when the store is to hear of us even if there is nothing new
        self._sent = 0  # tokens that the stream has
        self._wanted = False  # by some other ingress
        self._has_head = False  # the log's own: of whoever began it
        self._differs = False  # from what the store has
        self._failure: ShoalError | None = None  # of the generation, for all who wait for it

    # Three ways to begin

    async def share(self) -> None:
        """A finished log, somebody's live one, or one that is led here."""
        await self._run(self._open)

    async def refresh(self) -> None:
        """A new log, whatever there is."""
        await self._run(self._begin)

    async def look(self) -> None:
        """A finished log, or CacheMiss."""
        await self._run(self._find)

    def close(self) -> None:
        """End it for its readers here; whoever follows elsewhere goes on with it."""
        self.log.fail(Unavailable("the server is shutting down before the answer's end", retry_after=1.0))

    async def _run(self, settle: Callable[[], Coroutine[Any, Any, None]]) -> None:
        log = self.log
        try:
            await settle()
            while log.is_live and log.readers:
                await (self._tail() if self._role is Role.TAILS else self._lead())
            if log.tape.end is None or not log.tape.end.is_complete:
                self._forget(log)  # newcomers begin anew
            with suppress(StoreDown):
                await self._leave()
        except Exception as error:  # noqa: BLE001 - a bug here must not leave readers waiting
            log.fail(error)

    # What there is

    async def _open(self) -> None:
        """Look it up; those who may not begin it wait while the store does not answer, and are sent away without it."""
        log, until = self.log, _now() + self._shared.patience_s
        while log.is_live and log.readers:
            opened = await self._look_up(only_if_there=self._is_sought)
            sought = [reader for reader in log.readers if reader.must_exist]
            if opened.is_there or not sought:
                self._settle(opened)
                return
            if opened.may_be_there and len(sought) == len(log.readers) and _now() < until:
                await asyncio.sleep(RETRY_S)
                continue
            for reader in sought:
                reader.fail(self._gone(opened))

    @property
    def _is_sought(self) -> bool:
        """Somebody reads it who has had a part of it, and we do not know how it began."""
        return not self._has_head and any(reader.must_exist for reader in self.log.readers)

    def _gone(self, opened: Opened) -> ShoalError:
        if opened.may_be_there:
            waited = f"{self._shared.patience_s:g} s (resume_wait_s)"
            return Unavailable(
                f"Redis, where the log that was to be continued is kept, did not answer in {waited}", retry_after=1.0
            )
        lost = "the log that was to be continued is gone; send the request again without Last-Event-ID"
        return LogLost(lost, param="last-event-id")

    async def _look_up(self, *, only_if_there: bool) -> Opened:
        """Without a store there is nothing, and nobody to share with."""
        try:
            async with asyncio.timeout(self._shared.limit_s):
                kept = await self._link.get()
                if kept is not None:
                    return Opened(kept=kept)
                return await self._link.open(Part(0, head=self.log.tape.head), only_if_there=only_if_there)
        except StoreAbsent:
            return Opened(is_there=False)
        except (StoreDown, TimeoutError):
            return Opened(is_there=False, may_be_there=True)

    def _settle(self, opened: Opened) -> None:
        log = self.log
        self._has_head |= not opened.is_there  # it begins here
        self._take(opened)
        if opened.kept is not None:
            log.age_s = max(0.0, self._clock() - opened.kept.created)
        if log.tape.end is not None:
            log.settle(CacheStatus.HIT)
        elif self._role is Role.TAILS or log.tape.tokens:
            log.settle(CacheStatus.SHARED)
        else:
            log.settle(CacheStatus.MISS)

    def _take(self, opened: Opened) -> None:
        """Be what the store says we are, with what it has of the log."""
        tape = self.log.tape
        self._role = Role.LEADS if opened.leads else Role.TAILS if opened.is_there else Role.ALONE
        self._due = _now() + self._shared.beat_s
        is_new = not tape.tokens
        self._absorb([opened.kept.log] if opened.kept is not None else opened.parts)
        self._sent = len(tape.tokens) if is_new else 0  # what was read here may be more than the stream has now

    async def _begin(self) -> None:
        self._has_head, self._role = True, Role.APART
        self.log.settle(CacheStatus.MISS)

    async def _find(self) -> None:
        log = self.log
        with suppress(StoreDown, TimeoutError):
            async with asyncio.timeout(self._shared.limit_s):
                kept = await self._link.get()
            if kept is not None:
                self._settle(Opened(kept=kept))
        if log.is_live:
            log.settle(CacheStatus.MISS)
            log.fail(CacheMiss("no cached answer, and X-Shoal-Cache: only asks for nothing else"))

    def _absorb(self, parts: list[Part]) -> None:
        """What the store has of the log. Where that is not what was read here, it goes on without the store."""
        log, is_more = self.log, False
        try:
            for part in parts:
                if not log.is_live:  # perhaps by a stop string, while this was on its way
                    break
                if part.head is not None and not self._has_head and not self._is_of_this_body(part.head):
                    return
                is_more |= log.tape.absorb(part)
        except Differs:
            self._part()
        if is_more:
            log.changed()

    def _is_of_this_body(self, head: Head) -> bool:
        """Take over the log's head, and with it the seed that it began with."""
        tape = self.log.tape
        if head.fingerprint != tape.head.fingerprint:
            self.log.fail(reused_key())
            return False
        tape.head, self._has_head = head, True
        return True

    def _part(self) -> None:
        """From the store's log: go on alone for those who read here."""
        self._meter.rejected.labels("differs").inc()
        self._role, self._wanted, self._differs = Role.APART, False, True

    # Leading

    async def _lead(self) -> None:
        """Until the log ends, nobody reads it, somebody else leads it, or the leading request's deadline has passed."""
        log = self.log
        producer = asyncio.get_running_loop().create_task(self._produce(log.patient()))
        try:
            while not producer.done():
                await self._bell.wait(min(FOLLOWED_S if self._wanted else UNFOLLOWED_S, self._shared.beat_s))
                if log.is_live and self._role is not Role.APART:
                    await self._flush()
                if not log.is_live or self._role is Role.TAILS or not (log.readers or self._wanted):
                    return
        finally:
            producer.cancel()
            await asyncio.wait([producer])

    async def _produce(self, reader: LogReader) -> None:
        """One generation, to its end. All that is awaited here is the next tokens: readers have them at once."""
        log, had = self.log, len(self.log.tape.tokens)
        events = cast("AsyncGenerator[list[TokenEvent], None]", reader.lead(reader.resumed()))
        try:
            async with aclosing(events):
                async for batch in events:
                    for event in batch:
                        if not log.is_live or self._land(event, reader):
                            return
                    log.changed()
            raise EngineError("the generation ended without a finish reason")
        except RequestTimeout as error:
            expired(log, reader, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the readers' to hear
            if isinstance(error, QueueFull | Unavailable) and len(log.tape.tokens) == had:
                refused(log, reader, error)  # here; who follows elsewhere asks at another door
            else:
                self._failure = error if isinstance(error, ShoalError) else EngineError("the generation failed")
                log.fail(error)
        finally:
            self._ring()

    def _land(self, event: TokenEvent, reader: LogReader) -> bool:
        """Whether the generation has ended."""
        log, reason = self.log, event.finish_reason
        log.tape.append(event)
        if reason is None:
            return False
        if reason is FinishReason.TIMEOUT:
            expired(log, reader, event.error)
        else:
            log.tape.end = Ending(reason, event.stop_reason, event.error)
            log.ended_here = True
        log.changed()
        return True

    async def _flush(self) -> None:
        """To the stream with what is new; or say that we are here, or ask whether others still follow."""
        log, now = self.log, _now()
        length = len(log.tape.tokens)
        if not self._shared.store.available:
            return
        if length <= self._sent and log.readers and now < self._due:
            return
        try:
            reply = await self._link.append(log.tape.part(self._sent) if length > self._sent else None)
        except StoreDown:
            self._wanted = False
            return
        self._due = now + self._shared.beat_s
        self._wanted = reply.wanted
        if reply.taken:
            self._role = Role.TAILS
        elif reply.missed is None:
            self._role = Role.LEADS
            self._sent = length
        elif not reply.missed:  # the store has lost it
            self._sent = 0
        elif not all(log.tape.holds(part) for part in reply.missed):  # else it was ours, and the answer got lost
            self._role = Role.TAILS
            self._absorb(reply.missed)

    # Tailing

    async def _tail(self) -> None:
        """What comes next from whoever leads; where that is nobody, take the lead."""
        try:
            if _now() >= self._due:
                self._due = _now() + self._shared.beat_s
                if not await self._link.follow():
                    await self._take_lead()
                    return
            parts = await self._read()
            self._absorb(parts)
            if parts and self.log.is_live and self._role is Role.TAILS:
                await self._heed(parts[-1])
        except StoreDown:
            if self._is_sought:
                await self._open()
            else:
                self._role, self._sent = Role.ALONE, 0

    async def _heed(self, last: Part) -> None:
        """How the leader left, if it did. Where another one leads by now, that is history."""
        log = self.log
        if last.gave_up:
            await self._take_lead()
        elif (last.failure is not None or last.end is not None) and not await self._link.follow():
            log.tape.end = last.end
            if last.failure is not None:
                log.fail(error_of(last.failure))
            log.changed()

    async def _take_lead(self) -> None:
        if self._is_sought:
            await self._open()
            return
        opened = await self._link.open(Part(0, head=self.log.tape.head), only_if_there=False)
        if opened.leads:
            self._meter.takeovers.inc()
        self._take(opened)

    async def _read(self) -> list[Part]:
        """What comes within a beat, or until there is something to look at here."""
        reading = asyncio.get_running_loop().create_task(self._link.read(self._shared.beat_s))
        self._reading = reading
        try:
            await asyncio.wait([reading])
        finally:
            self._reading = None
            reading.cancel()
        return [] if reading.cancelled() else reading.result()

    def _ring(self) -> None:
        self._bell.ring()
        if self._reading is not None:
            self._reading.cancel()

    # Leaving

    async def _leave(self) -> None:
        """Store what has ended here, give up what has not. Raises StoreDown."""
        log, end = self.log, self.log.tape.end
        if end is not None and end.is_complete:
            if log.ended_here and not self._differs:
                await self._keep()
        elif self._role is Role.LEADS:
            part = log.tape.part(self._sent)
            if self._failure is not None:
                part = msgspec.structs.replace(part, failure=failure_of(self._failure))
            await self._link.give_up(msgspec.structs.replace(part, gave_up=end is None and self._failure is None))

    async def _keep(self) -> None:
        tape = self.log.tape
        value = self._link.pack(Kept(self._clock(), tape.part(0)))
        if value is None:
            self._meter.rejected.labels("too_large").inc()
        if self._role is Role.LEADS:
            reply = await self._link.finish(tape.part(min(self._sent, len(tape.tokens))), value)
        else:
            reply = Appended(missed=[])
        if value is None or reply.taken:
            return
        if reply.missed is not None:
            await self._link.put(value)
        self._meter.stored.inc()
        self._meter.stored_bytes.inc(len(value))


def reused_key() -> InvalidRequest:
    return InvalidRequest(
        "this Idempotency-Key was sent before, with another body; send a key of its own with each request",
        param="idempotency-key",
        code="idempotency_key_reused",
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
