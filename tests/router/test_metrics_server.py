"""`/metrics` on a port of its own: open, alone there, and not the end of an ingress that cannot have the port."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest

from shoal.router.metrics_server import MAX_HEAD, serve_metrics
from shoal.runtime.errors import Unavailable

TEXT = b"shoal_x 1.0\n"
HOST = "127.0.0.1"


async def scrape() -> bytes:
    return TEXT


async def broken() -> bytes:
    raise ZeroDivisionError("a secret")


async def closed() -> bytes:
    raise Unavailable("not ready: it loads")


def free_port() -> int:
    with closing(socket.create_server((HOST, 0))) as sock:
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def serving(port: int, scrape=scrape) -> AsyncIterator[None]:  # type: ignore[no-untyped-def]
    task = asyncio.create_task(serve_metrics(scrape, host=HOST, port=port, retry_s=0.01))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def ask(port: int, request: bytes = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n") -> tuple[int, bytes]:
    """(status, body), as soon as somebody listens; (0, b"") where the connection closes without an answer."""
    async with asyncio.timeout(5):
        while True:
            try:
                reader, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                await asyncio.sleep(0.005)
                continue
            with closing(writer):
                writer.write(request)
                try:
                    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                except ConnectionError:
                    return 0, b""
            return int(head.split()[1]) if head else 0, body


def test_only_metrics_and_only_to_be_read() -> None:
    async def run() -> None:
        port = free_port()
        async with serving(port):
            assert await ask(port) == (200, TEXT)
            assert await ask(port, b"GET /metrics?a=b HTTP/1.0\r\n\r\n") == (200, TEXT)
            assert await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n") == (200, b"")
            assert (await ask(port, b"POST /metrics HTTP/1.1\r\n\r\n"))[0] == 405
            assert (await ask(port, b"GET /v1/models HTTP/1.1\r\n\r\n"))[0] == 404
            assert await ask(port, b"x" * (2 * MAX_HEAD) + b"\r\n\r\n") == (0, b"")
            assert (await ask(port, b"\r\n\r\n"))[0] == 404
            assert await ask(port) == (200, TEXT)

    asyncio.run(run())


def test_a_failing_scrape_is_an_answer() -> None:
    async def run() -> None:
        for scraped, status, says in ((broken, 500, b""), (closed, 503, b"it loads")):
            port = free_port()
            async with serving(port, scraped):
                answered, body = await ask(port)
                assert answered == status
                assert says in body
                assert b"secret" not in body

    asyncio.run(run())


def test_who_cannot_have_the_port_waits_for_it_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        port = free_port()

        async def other() -> bytes:
            return b"other\n"

        async with serving(port):
            assert await ask(port) == (200, TEXT)
            second = asyncio.create_task(serve_metrics(other, host=HOST, port=port, retry_s=0.01))
            await asyncio.sleep(0.05)
            assert not second.done()
            assert await ask(port) == (200, TEXT)
        assert await ask(port) == (200, b"other\n")
        second.cancel()
        await asyncio.wait([second])

    asyncio.run(run())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_address_that_is_not_here_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        task = asyncio.create_task(serve_metrics(scrape, host="192.0.2.1", port=free_port(), retry_s=0.01))
        while not caplog.records:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "192.0.2.1" in record.getMessage()
