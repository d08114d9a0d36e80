"""Beside station 5: one log in memory while it grows, and those who read it, each at its own pace.

A reader holds a position and no tokens, so memory is the log itself, and a new token costs a reader one wake. Nothing
here knows where tokens come from: `log_task.py` makes the log longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ..runtime.errors import EngineError
from ..runtime.generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from .cache import CacheStatus, Lead
from .log_value import Ending, Head, Part

_MOMENT_S = 0.001


class Differs(Exception):
    """What the store says of a log is not what was read of it here."""


class Tape:
    """A log's content. It grows at its end; once read, nothing in it changes."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.num_cached_tokens = 0
        self.end: Ending | None = None
        self._has_begun = False

    def append(self, event: TokenEvent) -> None:
        """What a generation made, but for its end. Raises EngineError: it leaves a gap, or goes back."""
        if event.start != len(self.tokens):
            raise EngineError(f"the generation went on at token {event.start} of a log of {len(self.tokens)}")
        self._extend(event.tokens, event)

    def absorb(self, part: Part) -> bool:
        """What the store says, its end where it is a complete answer. Whether there is more than before.

        Raises:
            Differs: it leaves a gap, or says otherwise. Nothing has changed.
        """
        overlap = self._overlap(part)
        fresh = part.tokens[overlap:]
        if fresh or not self._has_begun:
            logprobs = None if part.logprobs is None else part.logprobs[overlap:]
            self._extend(fresh, msgspec.structs.replace(part, logprobs=logprobs))
        if part.end is not None and part.end.is_complete:
            self.cut(part.start + len(part.tokens), part.end)
        return bool(fresh) or self.end is not None

    def holds(self, part: Part) -> bool:
        """Whether the part says nothing that is not here already."""
        try:
            return self._overlap(part) == len(part.tokens) and part.end is None
        except Differs:
            return False

    def cut(self, length: int, end: Ending) -> None:
        """The log is complete with `length` tokens."""
        del self.tokens[length:]
        if self.logprobs is not None:
            del self.logprobs[length:]
        self.end = end

    def part(self, start: int) -> Part:
        """From `start` to what there is, as it is written to the store; the whole with its head."""
        whole = start == 0
        return Part(
            start,
            self.tokens[start:],
            logprobs=None if self.logprobs is None else self.logprobs[start:],
            prompt_logprobs=self.prompt_logprobs if whole else None,
            num_cached_tokens=self.num_cached_tokens if whole else 0,
            end=self.end,
            head=self.head if whole else None,
        )

    def _overlap(self, part: Part) -> int:
        """How many of the part's tokens are here already."""
        if part.start > len(self.tokens) or (part.logprobs is not None and len(part.logprobs) != len(part.tokens)):
            raise Differs
        known = self.tokens[part.start : part.start + len(part.tokens)]
        if known != part.tokens[: len(known)]:
            raise Differs
        return len(known)

    def _extend(self, tokens: list[int], source: TokenEvent | Part) -> None:
        if not self._has_begun:
            self.prompt_logprobs = source.prompt_logprobs
            self.num_cached_tokens = source.num_cached_tokens
            self._has_begun = isinstance(source, TokenEvent) or bool(tokens) or source.prompt_logprobs is not None
        self.tokens += tokens
        if source.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += source.logprobs


class Bell:
    """Wakes the one who waits; rung before, it ends the next wait at once."""

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until it is rung, or for so long."""
        if not self._rung:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if timeout_s is None else loop.call_later(timeout_s, self.ring)
            try:
                await self._waiter
            finally:
                if timer is not None:
                    timer.cancel()
        self._rung = False


class LiveLog:
    """A tape, its readers, and how it ended for them.

    on_change: called where whoever makes it longer has to look: it ended, or its last reader has left.
    """

    def __init__(self, name: bytes, head: Head, *, on_change: Callable[[], None]) -> None:
        self.name = name
        self.tape = Tape(head)
        self.readers: dict[LogReader, None] = {}
        self.was_read = False  # by anybody, who may have left
        self.error: Exception | None = None
        self.origin: CacheStatus | None = None  # as it is for who made us look; None until that is settled
        self.age_s = 0.0
        self.version = 0
        self.ended_here = False  # and not elsewhere, or long ago
        self._on_change = on_change

    @property
    def is_live(self) -> bool:
        return self.tape.end is None and self.error is None

    @property
    def has_failed(self) -> bool:
        """It ended, and that is no answer for those who come now."""
        return not self.is_live and not (self.tape.end is not None and self.tape.end.is_complete)

    def settle(self, origin: CacheStatus) -> None:
        """It is known where the log comes from."""
        self.origin = origin
        self._wake()

    def changed(self) -> None:
        """There is more to read."""
        self.version += 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """It ends with `error` for all who read it now, behind what there is."""
        if self.is_live:
            self.error = error
            self._wake()
            self._on_change()

    def stop(self, length: int, stop: str) -> None:
        """A reader's text came to a stop string at `length`: once for all of them."""
        if self.is_live and length <= len(self.tape.tokens):
            self.tape.cut(length, Ending(FinishReason.STOP, stop))
            self.ended_here = True
            self.changed()
            self._on_change()

    def leave(self, reader: LogReader) -> None:
        self.readers.pop(reader, None)
        if not self.readers:
            self._on_change()

    def _wake(self) -> None:
        for reader in self.readers:
            reader.bell.ring()

    def patient(self) -> LogReader:
        """The reader who can wait longest: it is its request that the log goes on with."""
        return max(self.readers, key=lambda reader: reader.left_s)


class LogReader:
    """One reader's place in a log, and what it needs to go on with it should it come to that."""

    def __init__(self, log: LiveLog, request: GenerationRequest, lead: Lead, *, must_exist: bool) -> None:
        self.log = log
        self.bell = Bell()
        self.lead = lead
        self.must_exist = must_exist
        self.has_begun_it = not log.was_read
        self.found_it_whole = log.tape.end is not None
        self._request = request
        self._deadline = None if request.timeout_s is None else asyncio.get_running_loop().time() + request.timeout_s
        self._position = 0
        self._version = 0  # of the log as it was read
        self._error: Exception | None = None
        self._late: Ending | None = None
        self._is_over = False
        log.readers[self] = None
        log.was_read = True

    @property
    def left_s(self) -> float:
        """Until its deadline, in seconds."""
        return float("inf") if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    @property
    def account(self) -> str:
        """Whose request it is, in the books."""
        return self._request.account

    def resumed(self) -> GenerationRequest:
        """Its request, to go on with the log as it is."""
        tape = self.log.tape
        params = self._request.params
        if tape.prompt_logprobs is not None:  # asked and answered
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        timeout_s = None if self._deadline is None else max(0.001, self.left_s)
        return msgspec.structs.replace(
            self._request, params=params, seed=tape.head.seed, tokens=[*tape.tokens], timeout_s=timeout_s
        )

    def fail(self, error: Exception) -> None:
        """The log ends with `error` for this reader alone."""
        self._error = error
        self._leave()

    def expire(self, error: str | None) -> None:
        """The deadline of this reader alone has passed."""
        self._late = Ending(FinishReason.TIMEOUT, error=error)
        self._leave()

    def close(self) -> None:
        self._is_over = True
        self._leave()

    async def origin(self) -> CacheStatus | None:
        """Where the log comes from. None: it ended, or this reader left, before anybody knew."""
        while self.log.origin is None and self.log.is_live and self in self.log.readers:
            await self.bell.wait()
        return self.log.origin

    async def next(self) -> TokenEvent:
        """All that is there and was not read, as one event. Raises StopAsyncIteration behind the last one."""
        while True:
            if self._is_over:
                raise StopAsyncIteration
            ended = self._ending()
            if ended is not None or self._version != self.log.version:
                return self._take(ended)
            error = self._error or self.log.error
            if error is not None:
                self.close()
                raise error
            # A loop's timers ring up to its resolution early. Two readers that waited for the rest in turn would keep a
            # virtual clock, which moves only when nothing is ready, where it is.
            await self.bell.wait(None if self._deadline is None else max(_MOMENT_S, self.left_s))
            if self._deadline is not None and self.left_s <= 0 and self.log.is_live and self._late is None:
                self.expire(f"not finished after {self._request.timeout_s:g} s (timeout)")

    def _ending(self) -> Ending | None:
        """The whole is there for one that was late only in taking it."""
        return self.log.tape.end or self._late

    def _take(self, ended: Ending | None) -> TokenEvent:
        tape, start = self.log.tape, self._position
        tokens = tape.tokens[start:]
        first = self._version == 0
        self._version = self.log.version
        self._position = max(start, len(tape.tokens))
        if ended is not None:
            self.close()
        return TokenEvent(
            id=self._request.id,
            start=start,
            tokens=tokens,
            logprobs=None if tape.logprobs is None else tape.logprobs[start:],
            prompt_logprobs=tape.prompt_logprobs if first else None,
            num_cached_tokens=tape.num_cached_tokens if first else 0,
            finish_reason=None if ended is None else ended.finish_reason,
            stop_reason=None if ended is None else ended.stop_reason,
            error=None if ended is None else ended.error,
        )

    def _leave(self) -> None:
        self.log.leave(self)
        self.bell.ring()


def refused(log: LiveLog, led: LogReader, error: Exception) -> None:
    """The leading request was not let in: an end for its tenant's readers. Others have a place of their own."""
    for reader in [*log.readers]:
        if reader.account == led.account:
            reader.fail(error)


def expired(log: LiveLog, led: LogReader, error: str | None) -> None:
    """The leading request's deadline has passed: an end for whoever it is the deadline of, and for nobody else."""
    for reader in [*log.readers]:
        if reader is led or reader.left_s <= 0:
            reader.expire(error)
