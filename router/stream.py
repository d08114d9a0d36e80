"""Station 1, the answer's way out: a flight as server-sent events, or as one body.

A stream ends in exactly one way: the last piece and `[DONE]`, or an error event and `[DONE]`, or the client is gone.

Its headers go out with its first piece, so that what fails before is an HTTP status. Where a replica must be started
first (wake.py), that may be minutes, and clients and proxies give up on a connection that says nothing: common limits
are 30 and 60 s. So the headers then wait no longer than `PATIENCE_S`, and comment lines, which every SSE client skips,
follow while nothing else does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .body import ClientGone
from .flight import Flight
from .headers import event_id
from .http import DONE, STREAM_HEADERS, error_event
from .responses import Shape, Usage
from .text import Piece, merge

PATIENCE_S = 10.0  # a replica that starts sooner is not told of
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": waiting for a replica\n\n"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one request gets: the flight that brings it and the shape it takes.

    headers: asked for when the first pieces are there. received: of each choice, where this goes on with a stream that
    broke off; then events with tokens carry an id to go on from, which clients that never asked may take for data.
    on_error: called where a stream ends with an error event; its status is 200 for ever. is_held: whether it waits for
    a replica to be started.
    """

    flight: Flight
    shape: Shape
    usage: Callable[[], Usage]
    include_usage: bool
    send_timeout_s: float
    on_error: Callable[[], None]
    headers: Callable[[], dict[str, str]]
    has_ids: bool = False
    received: list[int] | None = None
    is_held: Callable[[], bool] = lambda: False


async def respond(answer: Answer, receive: Receive, *, stream: bool) -> Response:
    """The response. The flight is over when it returns, or is the stream's to end.

    Raises:
        ClientGone: nobody is there to answer. Exception: what ended the flight before the first byte of a 200.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(answer.flight)
        await stack.enter_async_context(_watching(receive, answer.flight))
        if not stream:
            whole = await _whole(answer)
            return Response(whole, media_type="application/json", headers=answer.headers())
        first = await _next(answer.flight, PATIENCE_S)
        while first is None and not answer.is_held():
            first = await _next(answer.flight, PATIENCE_S)
        return EventStream(answer, first, stack.pop_all())


async def _whole(answer: Answer) -> bytes:
    pieces: list[list[Piece]] = [[] for _ in answer.flight.choices]
    async for ready in answer.flight:
        for piece in ready:
            pieces[piece.index].append(piece)
    return answer.shape.whole([merge(parts) for parts in pieces], answer.usage())


class EventStream(Response):
    """Server-sent events, straight to ASGI: one send for whatever is ready.

    first: the first pieces; None where a replica must be started before there are any.
    """

    def __init__(self, answer: Answer, first: list[Piece] | None, stack: AsyncExitStack) -> None:
        super().__init__()
        self._answer = answer
        self._first = first
        self._stack = stack
        self._counts = list(answer.received or [0] * len(answer.flight.choices))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            try:
                own = [(name.encode(), value.encode()) for name, value in self._answer.headers().items()]
                await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, *own]})
                await self._run(send)
            except ClientGone:
                return

    async def _run(self, send: Send) -> None:
        answer = self._answer
        try:
            opening = b"" if answer.received else answer.shape.opening(len(answer.flight.choices))
            first = self._first
            while first is None:
                await self._send(send, KEEP_ALIVE)
                first = await _next(answer.flight, KEEP_ALIVE_S)
            await self._send(send, opening + self._chunks(first))
            async for ready in answer.flight:
                if events := self._chunks(ready):
                    await self._send(send, events)
            tail = answer.shape.usage(answer.usage()) if answer.include_usage else b""
        except ClientGone:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a terminal event
            answer.on_error()
            tail = error_event(error)
        await self._send(send, tail + DONE, last=True)

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        """Raises ClientGone where the client has taken nothing for too long."""
        try:
            async with asyncio.timeout(self._answer.send_timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise ClientGone from None

    def _chunks(self, ready: Sequence[Piece]) -> bytes:
        if len(ready) == 1:
            return self._chunk(ready[0])
        grouped: dict[int, list[Piece]] = {}
        for piece in ready:
            grouped.setdefault(piece.index, []).append(piece)
        return b"".join([self._chunk(merge(pieces)) for pieces in grouped.values()])

    def _chunk(self, piece: Piece) -> bytes:
        chunk = self._answer.shape.chunk(piece)
        if not self._answer.has_ids:
            return chunk
        self._counts[piece.index] += len(piece.tokens)
        if piece.finish_reason is not None:  # one more says that the client has had the end
            self._counts[piece.index] = self._answer.flight.choices[piece.index].num_tokens + 1
        return b"id: %b\n%b" % (event_id(self._counts), chunk) if chunk else b""


async def _next(flight: Flight, timeout_s: float) -> list[Piece] | None:
    """The next pieces; None where there are none in this time, and then none is lost. Raises what ends the flight."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(flight)
    except TimeoutError:
        return None


@asynccontextmanager
async def _watching(receive: Receive, flight: Flight) -> AsyncIterator[None]:
    """Fails the flight as soon as the client closes the connection. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        flight.fail(ClientGone())

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()
