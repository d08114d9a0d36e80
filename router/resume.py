"""Station 7: the router owns the stream. Whatever happens to a replica, a log ends in exactly one terminal event.

The station keeps the log as it was emitted (`GenerationRequest.tokens` plus what came since), which is all another
replica needs to go on with it. What stops a log on a replica is one of three:

    the replica was lost, or its engine died: it goes on elsewhere, `resume_attempts` times, on probation (probation.py)
    the replica leaves and hands it over: it goes on elsewhere
    the log itself, or its deadline: the client's to know

A log that no replica has taken in yet is refused at once where none can; one that was waits `resume_wait_s` for one.
Where there may be none on purpose (wake.py), both wait for one to be started, to their deadlines.
Only replicas of its own model take it (`GenerationRequest.digest`): no answer changes its weights in the middle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import cast

import msgspec

from ..runtime.errors import EngineDead, EngineError, QueueFull, RequestTimeout, ShoalError, Unavailable
from ..runtime.generation import FinishReason, GenerationRequest, TokenEvent
from .backend import Backend, Poison, ReplicaLeft, ReplicaLost
from .balance import Balancer
from .config import RouterConfig
from .meters import ResumeMeter
from .probation import PAST, Probation, Verdict
from .wake import RETRY_S, Sleep

POLL_S = 0.05  # between two looks for a replica


def _untold(replica: str | None) -> None:
    return


class Resume:
    """Follows logs over the replicas of one model. One an ingress; all belongs to one event loop."""

    def __init__(
        self,
        backend: Backend,
        balancer: Balancer,
        *,
        config: RouterConfig,
        meter: ResumeMeter,
        sleep: Sleep | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """sleep: whether there may be no replica on purpose; None: there may not."""
        self._backend = backend
        self._balancer = balancer
        self._sleep = sleep or Sleep()
        self._config = config
        self._meter = meter
        self._clock = clock
        self._probation = Probation()
        self._turned = asyncio.Event()  # set and replaced when whoever waits should look again
        self._stopped = False

    def stop(self) -> None:
        """The service ends: a log that loses its replica from now on, or has none, ends with the error it met."""
        self._stopped = True
        self._turn()

    async def follow(
        self, request: GenerationRequest, *, on_attempt: Callable[[str | None], None] = _untold
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """The log's events, from its first new token to its one terminal event. Closing it aborts the generation.

        on_attempt: told each replica that it is tried on; None where the transport chooses.

        Raises:
            ReplicaLost, EngineDead: more replicas were lost than `resume_attempts`. Poison: the one it was tried on,
            alone of the suspects. RequestTimeout: the deadline passed while it had none. Unavailable: it found none.
            ShoalError: as the engine raised it. The log ends with each.
        """
        log = _Log(request, self._clock())
        try:
            while True:
                attempt, replica = await self._place(log)
                on_attempt(replica)
                self._probation.move(log, replica)
                try:
                    # Every backend is an async generator: closing it is what aborts the generation.
                    async with aclosing(cast("_Closable", self._backend.generate(attempt, replica))) as batches:
                        async for batch in batches:
                            events = self._take(log, batch)
                            if events:
                                yield events
                            if log.ended:
                                return
                            if log.handed_over is not None:
                                raise ReplicaLeft(log.handed_over)
                    raise ReplicaLost(f"the replica ended the stream after {log.length} tokens without a finish reason")
                except ShoalError as error:
                    self._interrupt(log, replica, error)
        finally:
            self._clear(log)

    def _take(self, log: _Log, batch: list[TokenEvent]) -> list[TokenEvent]:
        """What of a batch the client gets."""
        events = log.append(batch)
        if events and log.paused_at is not None:
            self._meter.resumed.inc()
            self._meter.pause.observe(self._clock() - log.paused_at)
            log.paused_at = log.waiting_since = None
        if log.on_probation:
            self._clear(log, length=log.length)
        return events

    def _clear(self, log: _Log, *, length: int | None = None) -> None:
        """The log is no suspect any more, if it is one and has come so far: then it is the next one's turn."""
        if self._probation.clear(log, length=length):
            log.on_probation = False
            self._meter.suspects.dec()
            self._turn()

    # Where a log goes

    async def _place(self, log: _Log) -> tuple[GenerationRequest, str | None]:
        """What is asked next, and of which replica; None leaves that to the transport.

        Raises:
            RequestTimeout, Unavailable: see `follow`. ShoalError: what had stopped it, if the service ends.
        """
        if log.error is None:
            attempt = await self._awake(log)
            return attempt, self._balancer.choose(attempt, lost=log.lost | self._foreign(log))
        tried_again = False
        while True:
            now = self._clock()
            self._check(log, log.error, now)
            foreign = self._foreign(log)
            ready = self._ready() - foreign
            has_turn = self._probation.may_go(log)
            # One that had to give it back may be as it was, or back under its name: only after a rest.
            if has_turn and (ready - log.lost or (ready and tried_again)):
                attempt = log.attempt(now)
                # Never the transport's choice: it must be known where a suspect is tried.
                lost = log.lost if ready - log.lost else frozenset()
                return attempt, self._balancer.choose(attempt, lost=lost | foreign)
            if ready and not has_turn:
                log.waiting_since = now  # for its turn, not for a replica
            elif not ready and self._sleep.is_allowed:
                await self._awake(log)
                log.waiting_since = self._clock()
            await self._rest()
            tried_again = True

    async def _awake(self, log: _Log) -> GenerationRequest:
        """What is asked of the first replica, once there is one: at once, unless there is none on purpose.

        Raises:
            Unavailable: none came by the deadline, or the service ends.
        """
        if not self._sleep.is_allowed or self._ready():
            return log.request
        began = self._clock()
        with self._sleep.waiting():
            while self._sleep.is_allowed and not self._ready():
                now = self._clock()
                if self._stopped:
                    raise self._given_up("stopped", Unavailable("the server is shutting down", retry_after=1.0))
                if log.deadline is not None and now >= log.deadline:
                    text = f"no replica could be started in {now - began:.0f} s, the request's time (timeout)"
                    raise self._given_up("asleep", Unavailable(text, retry_after=RETRY_S))
                await self._rest()
        return log.attempt(self._clock())

    def _check(self, log: _Log, error: ShoalError, now: float) -> None:
        if self._stopped:
            raise self._given_up("stopped", error)
        if log.deadline is not None and now >= log.deadline:
            raise self._given_up("deadline", log.late()) from error
        wait_s = self._config.resume_wait_s
        if log.waiting_since is not None and now - log.waiting_since > wait_s:
            text = f"no replica could go on with the generation for {wait_s:g} s (resume_wait_s): {error}"
            raise self._given_up("no_replica", Unavailable(text)) from error

    def _ready(self) -> set[str]:
        return {replica for replica, state in self._backend.replicas().items() if state.problem is None}

    def _foreign(self, log: _Log) -> frozenset[str]:
        """Replicas that serve another model than the log's, as far as anybody says."""
        ours = {"", log.request.digest}
        if len(ours) == 1:
            return frozenset()
        return frozenset(replica for replica, state in self._backend.replicas().items() if state.digest not in ours)

    async def _rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._turned.wait()

    def _turn(self) -> None:
        self._turned.set()
        self._turned = asyncio.Event()

    # What stops it

    def _interrupt(self, log: _Log, replica: str | None, error: ShoalError) -> None:
        """Settle how a log goes on that a replica does not go on with. Raises what ends it."""
        if replica is not None:
            log.lost |= {replica}
        if isinstance(error, EngineDead):
            self._lose(log, replica, error)
        elif not isinstance(error, QueueFull | Unavailable):
            raise error
        elif isinstance(error, ReplicaLeft):
            log.handed_over = None
            log.is_admitted = True
            self._meter.losses.labels("handed_over").inc()
            if not self._config.resume_attempts:
                raise self._given_up("attempts", error)
        elif not log.is_admitted and not self._has_others(log, replica, error):
            raise error  # a refusal
        log.error = error
        self._probation.move(log, None)
        if log.is_admitted:
            log.pause(self._clock())

    def _has_others(self, log: _Log, replica: str | None, error: ShoalError) -> bool:
        """Whether somebody else may take what this replica refused, now or once it is woken."""
        may_wake = self._sleep.is_allowed and not isinstance(error, QueueFull)
        return may_wake or (replica is not None and bool(self._ready() - log.lost))

    def _lose(self, log: _Log, replica: str | None, error: EngineDead) -> None:
        log.is_admitted = True
        log.num_losses += 1
        self._meter.losses.labels("replica_lost" if isinstance(error, ReplicaLost) else "engine_died").inc()
        verdict = self._probation.judge(log, replica, length=log.length)
        if verdict is Verdict.SUSPECT:
            log.on_probation = True
            self._meter.suspects.inc()
        if verdict is Verdict.GUILTY:
            raise self._given_up("guilty", Poison("two replicas were lost while they computed it")) from error
        if log.num_losses > self._config.resume_attempts:
            raise self._given_up("attempts", error)

    def _given_up(self, reason: str, error: ShoalError) -> ShoalError:
        self._meter.given_up.labels(reason).inc()
        return error


class _Log:
    """One log as far as it was emitted, and what has become of it on replicas."""

    def __init__(self, request: GenerationRequest, now: float) -> None:
        self.request = request
        self.deadline = None if request.timeout_s is None else now + request.timeout_s
        self.ended = False
        self.is_admitted = False  # by some replica: from then on it is ours to bring to an end
        self.on_probation = False
        self.handed_over: str | None = None  # why its replica gave it back
        self.error: ShoalError | None = None  # what stopped it last
        self.num_losses = 0
        self.lost: frozenset[str] = frozenset()
        self.paused_at: float | None = None
        self.waiting_since: float | None = None  # for a replica
        self._tokens = list(request.tokens)
        self._num_attempts = 0
        self._has_begun = False  # something was emitted

    @property
    def length(self) -> int:
        return len(self._tokens)

    def late(self) -> RequestTimeout:
        return RequestTimeout(f"not finished after {round(self.request.timeout_s or 0.0, 1):g} s (timeout)")

    def pause(self, now: float) -> None:
        """It is on no replica. Several times without a token in between are one pause."""
        self.paused_at = now if self.paused_at is None else self.paused_at
        self.waiting_since = now if self.waiting_since is None else self.waiting_since

    def attempt(self, now: float) -> GenerationRequest:
        """What the next replica is asked for: to go on behind all that was emitted, in the time that is left."""
        request = self.request
        params = request.params
        if self._has_begun and params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        self._num_attempts += 1
        return msgspec.structs.replace(
            request,
            # A replica may still hold the last attempt, and takes no two of one id.
            id=f"{request.id}~{self._num_attempts}",
            tokens=list(self._tokens),
            params=params,
            timeout_s=None if self.deadline is None else max(0.001, self.deadline - now),
            trial=PAST if self.on_probation else 0,
        )

    def append(self, batch: list[TokenEvent]) -> list[TokenEvent]:
        """The batch as the log's own, without the end that a leaving replica puts to it.

        Raises:
            EngineError: it does not go on where the log ends.
        """
        if batch and batch[-1].finish_reason is FinishReason.ABORT:
            # Nobody aborts a generation that is followed but an engine that ends.
            self.handed_over = batch[-1].error or "the replica ended the generation before its end"
            self.is_admitted = True
            batch = batch[:-1]
        for event in batch:
            if event.start != len(self._tokens):
                raise EngineError(
                    f"the replica sent token {event.start} of a log of {len(self._tokens)}: it broke its promise"
                )
            self._tokens += event.tokens
        if not batch:
            return batch
        self.ended = batch[-1].finish_reason is not None
        if self._num_attempts:
            batch = [self._own(event) for event in batch]
        self.is_admitted = self._has_begun = True
        return batch

    def _own(self, event: TokenEvent) -> TokenEvent:
        """An event of a later attempt, which has a name, a deadline and prefix hits of its own."""
        cached = 0 if self._has_begun else event.num_cached_tokens
        error = str(self.late()) if event.finish_reason is FinishReason.TIMEOUT else event.error
        return msgspec.structs.replace(event, id=self.request.id, num_cached_tokens=cached, error=error)


class _Closable(AsyncIterator[list[TokenEvent]]):
    async def aclose(self) -> None: ...
