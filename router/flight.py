"""Stations 4 to 7 at work: all choices of one request in the air at once, gathered into one stream of pieces.

Each choice has a task that follows its log and makes text of it; whoever answers the client takes whatever pieces are
ready, so a slow client gets fewer and longer ones. Leaving the flight cancels what still flies, which aborts the
generations. Invariant: iterating ends after every choice has its finish reason, or raises, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from types import TracebackType

from ..runtime.errors import RequestTimeout, RowFailed, ShoalError, Unavailable
from ..runtime.generation import POISON, FinishReason, TokenEvent
from .backend import Poison
from .cache import CacheStatus, Reading
from .text import Choice, Piece

GRACE_S = 5.0  # the engine ends a generation at its deadline; behind this the router no longer waits for it


class Flight:
    """`async with flight: async for pieces in flight: ...`"""

    def __init__(
        self,
        choices: Sequence[Choice],
        read: Callable[[Choice], Reading],
        *,
        on_event: Callable[[Choice, TokenEvent], None],
        on_end: Callable[[], None],
    ) -> None:
        self.choices = choices
        self.error: Exception | None = None
        self._read = read
        self._readings: list[Reading] = []
        self._on_event = on_event
        self._on_end = on_end
        self._pieces: list[Piece] = []
        self._unfinished = len(choices)
        self._unsettled = len(choices)  # not known yet where they come from
        self._waiter: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._closed = False

    def origin(self) -> tuple[CacheStatus, float]:
        """Where the answer comes from, and the age of its oldest part in seconds; settled with the first pieces.

        Of several choices the costliest counts: one that was made makes the answer a miss.
        """
        order = (CacheStatus.BYPASS, CacheStatus.MISS, CacheStatus.SHARED, CacheStatus.HIT)
        status = min((reading.status for reading in self._readings), key=order.index)
        return status, max(reading.age_s for reading in self._readings)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        timeout = self.choices[0].request.timeout_s
        if timeout is not None:
            late = RequestTimeout(f"not finished after {timeout:g} s (timeout)")
            self._deadline = loop.call_later(timeout + GRACE_S, self.fail, late)
        self._tasks = [loop.create_task(self._fly(choice)) for choice in self.choices]

    def fail(self, error: Exception) -> None:
        """End the flight: the consumer gets the pieces that are there, then `error`. Only the first error counts."""
        if self.error is None:
            self.error = error
            for task in self._tasks:
                task.cancel()
            self._wake()

    async def __aenter__(self) -> Flight:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what still flies and wait until it is down: then nobody works for this request any more."""
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for task in self._tasks:
            task.cancel()
        try:
            if any(not task.done() for task in self._tasks):
                await asyncio.wait(self._tasks, timeout=GRACE_S)
        finally:
            self._on_end()

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> list[Piece]:
        while not self._pieces or (self._unsettled and self.error is None):
            if self.error is not None:
                raise self.error
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pieces, self._pieces = self._pieces, []
        return pieces

    async def _fly(self, choice: Choice) -> None:
        try:
            reading = self._read(choice)
            self._readings.append(reading)
            async with aclosing(reading):
                await reading.settled()
                self._unsettled -= 1
                self._wake()
                async for batch in reading:
                    for event in batch:
                        self._land(choice, event)
                        if choice.finished:  # perhaps by a stop string, ahead of the engine: leaving aborts the rest
                            if choice.stopped_by is not None:
                                reading.stopped(choice.num_tokens, choice.stopped_by)
                            return
        except Exception as error:  # noqa: BLE001 - a bug in one request ends this request; http.py logs it
            self.fail(error)

    def _land(self, choice: Choice, event: TokenEvent) -> None:
        problem = _problem(event)
        if problem is not None:
            raise problem
        self._on_event(choice, event)
        self._pieces.append(choice.take(event))
        if choice.finished:
            self._unfinished -= 1
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _problem(event: TokenEvent) -> ShoalError | None:
    """The error that a log's end stands for; None for complete answers and logs that go on."""
    if event.finish_reason is FinishReason.TIMEOUT:
        return RequestTimeout(event.error or "the deadline passed before the end (timeout)")
    if event.finish_reason is FinishReason.ABORT:
        return Unavailable(event.error or "the server ended the generation before its end")
    if event.finish_reason is FinishReason.ERROR:
        return (Poison if event.error == POISON else RowFailed)(event.error or "the generation failed")
    return None
