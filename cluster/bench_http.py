"""HTTP/1.1 for `shoal bench serve`: a protocol of asyncio's that hands body bytes on in the loop's turn they came in.

Connections are kept and used again, as the clients of real services do. Nothing is tried twice.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..runtime.errors import EngineError
from .client import Origin

IDLE_S = 2.0  # a connection that was idle for longer may be one that the server is about to close
MAX_HEAD = 1 << 16

Receive = Callable[[int, bytes], bool]
"""Given the status and a piece of the body as it comes; true where the rest of it does not matter."""


class CallFailed(EngineError):
    """There is no answer, or only a part of one. `kind` is one of few words, to be counted."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class ResponseParser:
    """One response of HTTP/1.1: bytes in, bytes of the body out (RFC 9112)."""

    def __init__(self) -> None:
        self.status = 0
        self.is_over = False
        self.keeps_alive = True
        self._buffer = b""
        self._left = 0
        self._take: Callable[[], bytes | None] = self._head

    def feed(self, data: bytes) -> bytes:
        """What of the body is in it. Raises CallFailed: this is not HTTP."""
        self._buffer += data
        body = []
        while not self.is_over and (part := self._take()) is not None:
            body.append(part)
        return b"".join(body)

    def end(self) -> None:
        """The connection is closed. Raises CallFailed: in the middle of the response."""
        if self._take == self._rest:
            self.is_over = True
        if not self.is_over:
            raise CallFailed("cut off", "the connection was closed before the end")

    def _head(self) -> bytes | None:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            if len(head) > MAX_HEAD:
                raise CallFailed("not HTTP", f"no end of its headers in {MAX_HEAD} bytes")
            return None
        self._buffer = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise CallFailed("not HTTP", f"{first!r:.80}")
        self.status = int(status[:3])
        if self.status >= 200:  # what is below announces the response
            pairs = (line.partition(":") for line in lines)
            self._begin_body({name.strip().lower(): value.strip() for name, _, value in pairs}, version)
        return b""

    def _begin_body(self, headers: Mapping[str, str], version: str) -> None:
        self.keeps_alive = version != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
        length = headers.get("content-length", "")
        if self.status in (204, 304):
            self.is_over = True
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            self._take = self._chunk_size
        elif length.isdigit():
            self._left = int(length)
            self._take, self.is_over = self._fixed, self._left == 0
        else:
            self._take, self.keeps_alive = self._rest, False

    def _piece(self) -> bytes:
        piece, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(piece)
        return piece

    def _fixed(self) -> bytes | None:
        piece = self._piece()
        self.is_over = self._left == 0
        return piece or None

    def _rest(self) -> bytes | None:
        piece, self._buffer = self._buffer, b""
        return piece or None

    def _chunk_size(self) -> bytes | None:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return None
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise CallFailed("not HTTP", f"a chunk's size is {line!r:.40}") from None
        self._buffer = rest
        self._take = self._chunk if self._left else self._trailer
        return b""

    def _chunk(self) -> bytes | None:
        piece = self._piece()
        if self._left == 0:
            self._take = self._chunk_end
        return piece or None

    def _chunk_end(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        self._buffer, self._take = self._buffer[2:], self._chunk_size
        return b""

    def _trailer(self) -> bytes | None:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return None
        self._buffer, self.is_over = rest, not line
        return b""


class EventParser:
    """Server-sent events: bytes in, the data of whole events out. Lines may end in LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that this completes; comments and fields other than `data` are nothing."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def end(self) -> list[bytes]:
        """An event that lacks its empty line at the end of the stream."""
        return self.feed(b"\n\n")


class _Connection(asyncio.Protocol):
    """Carries one request at a time; goes to `idle` by itself when a response is over."""

    def __init__(self, idle: list[_Connection], open: set[_Connection]) -> None:
        self._idle, self._open = idle, open
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._receive: Receive | None = None
        self._answer: asyncio.Future[int] | None = None
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(self)

    def send(self, payload: bytes, receive: Receive) -> asyncio.Future[int]:
        """The status, when the response is over or `receive` has enough of it; or CallFailed."""
        assert self._transport is not None
        self._parser, self._receive = ResponseParser(), receive
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        return self._answer

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None:  # something that nobody asked for
            self.close()
            return
        try:
            body = parser.feed(data)
            is_enough = bool(body) and self._receive is not None and self._receive(parser.status, body)
        except CallFailed as failure:
            self._fail(failure)
            return
        if parser.is_over or is_enough:
            self._settle(parser.status)
        if parser.is_over:
            self._rest(parser)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        if self in self._idle:
            self._idle.remove(self)
        if (parser := self._parser) is None:
            return
        try:
            parser.end()
            self._settle(parser.status)
        except CallFailed as failure:
            self._fail(failure)

    def leave(self) -> None:
        """The caller waits no longer: what is unfinished is given up."""
        if self._answer is not None and self._answer.cancelled():
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _settle(self, status: int) -> None:
        self._receive = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def _fail(self, failure: CallFailed) -> None:
        self._parser = self._receive = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)
        self.close()

    def _rest(self, parser: ResponseParser) -> None:
        self._parser = None
        if not parser.keeps_alive:
            self.close()
            return
        self.idle_since = time.monotonic()
        self._idle.append(self)


class HttpClient:
    """Calls to one server, any number at once. Belongs to one event loop."""

    def __init__(self, origin: Origin, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._origin = origin
        self._timeout_s = timeout_s
        self._ssl = ssl.create_default_context() if origin.secure else None
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        lines = [f"host: {host}:{origin.port}" if origin.port else f"host: {host}", "accept: */*"]
        lines += [f"authorization: Bearer {api_key}"] if api_key else []
        self._headers = "\r\n".join(lines)

    def payload(self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> bytes:
        """A request as bytes. path: as OpenAI's API has it, from `/v1` on; or another of the server's."""
        own = "".join(f"\r\n{name}: {value}" for name, value in (headers or {}).items())
        kind = f"\r\ncontent-type: application/json\r\ncontent-length: {len(body)}" if method == "POST" else ""
        return f"{method} {self._origin.base}{path} HTTP/1.1\r\n{self._headers}{own}{kind}\r\n\r\n".encode() + body

    async def send(self, payload: bytes, receive: Receive) -> int:
        """Send it, hand on what comes back; the status. Raises CallFailed."""
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._fresh() or await self._connect()
                return await connection.send(payload, receive)
        except TimeoutError:
            raise CallFailed("timeout", f"no end within {self._timeout_s:g} s (--timeout-s)") from None
        finally:
            if connection is not None:
                connection.leave()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a call that is not streamed. Raises CallFailed."""
        parts: list[bytes] = []

        def receive(status: int, piece: bytes) -> bool:
            parts.append(piece)
            return False

        payload = self.payload(method, path, b"" if body is None else msgspec.json.encode(body))
        try:
            status = await self.send(payload, receive)
        except CallFailed as failure:
            if method != "GET" or failure.kind != "cut off" or parts:
                raise
            # Closed while it idled, perhaps: what changes nothing may be asked twice (RFC 9112, 9.3.1).
            status = await self.send(payload, receive)
        return status, b"".join(parts)

    def close(self) -> None:
        """Whatever is under way fails as cut off."""
        for connection in list(self._open):
            connection.close()

    def _fresh(self) -> _Connection | None:
        """The idle connection that was used last, if that was just now."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic() - connection.idle_since < IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        origin = self._origin
        port = origin.port or (443 if origin.secure else 80)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._idle, self._open), origin.host, port, ssl=self._ssl
            )
        except OSError as error:
            kind = "connection refused" if isinstance(error, ConnectionRefusedError) else "no connection"
            raise CallFailed(kind, f"{origin}: {error}") from None
        return connection
