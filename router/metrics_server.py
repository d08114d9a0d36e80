"""Beside the stations: `/metrics` alone on a port of its own, open, so meant for loopback or a network of operators.

Of several ingresses on one machine one holds the port; the others wait until it is free, so that it outlives an ingress
that is replaced. A dozen lines of HTTP are all that a scraper needs: one request a connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus

from ..runtime.errors import ShoalError
from .metrics import CONTENT_TYPE

logger = logging.getLogger("shoal.router")

RETRY_S = 1.0  # between two tries for a port that is taken
REQUEST_S = 5.0  # for a request's head, and for the answer to be taken
MAX_HEAD = 16 * 2**10  # bytes

Scrape = Callable[[], Awaitable[bytes]]


async def serve_metrics(scrape: Scrape, *, host: str, port: int, retry_s: float = RETRY_S) -> None:
    """Answer `GET /metrics` with what `scrape` gives, until cancelled. A port that is taken is tried again."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _reply(head, scrape))
                await writer.drain()
        writer.close()

    is_told = False
    while True:
        try:
            server = await asyncio.start_server(answer, host, port, limit=MAX_HEAD)
        except OSError as error:
            if not is_told:
                level = logging.INFO if error.errno == errno.EADDRINUSE else logging.WARNING  # by another ingress
                logger.log(level, "no /metrics on %s port %d so far: %s", host, port, error.strerror)
                is_told = True
            await asyncio.sleep(retry_s)
        else:
            async with server:
                logger.info("/metrics on %s port %d", host, port)
                await server.serve_forever()


async def _reply(head: bytes, scrape: Scrape) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if path != b"/metrics":
        return _response(HTTPStatus.NOT_FOUND, b"only /metrics is here\n")
    if method not in (b"GET", b"HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"GET it\n", "allow: GET, HEAD\r\n")
    try:
        text = await scrape()
    except ShoalError as error:
        return _response(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode() + b"\n")
    except Exception as error:  # a scraper gets an answer, whatever went wrong
        logger.error("unexpected %s in a scrape", type(error).__name__, exc_info=error)
        return _response(HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error; the server's log has it\n")
    reply = _response(HTTPStatus.OK, text)
    return reply if method == b"GET" else reply[: -len(text)]


def _response(status: HTTPStatus, body: bytes, headers: str = "") -> bytes:
    kind = CONTENT_TYPE if status is HTTPStatus.OK else "text/plain; charset=utf-8"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        f"{headers}connection: close\r\n\r\n"
    )
    return head.encode() + body
