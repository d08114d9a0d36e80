"""Beside the line: one generation's events on their way from a connection to whoever follows them."""

from __future__ import annotations

import asyncio

from ..runtime.errors import ShoalError
from ..runtime.generation import TokenEvent


class Stream:
    """Pushed by a connection, taken by one follower.

    has_begun: a suspect that has not is not what ends its replica.
    """

    def __init__(self, id: int, *, has_begun: bool) -> None:
        self.id = id
        self.has_begun = has_begun
        self.ended = False
        self._events: list[TokenEvent] = []
        self._error: ShoalError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, events: list[TokenEvent]) -> None:
        if self.ended:
            return
        self._events = self._events + events if self._events else events
        self.ended = events[-1].finish_reason is not None
        self._wake()

    def fail(self, error: ShoalError) -> None:
        self._error, self.ended = error, True
        self._wake()

    async def take(self) -> list[TokenEvent]:
        """All events that are there, at least one; behind the last the error that ended the stream."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
