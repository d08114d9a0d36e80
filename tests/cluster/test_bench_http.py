"""The benchmark's own HTTP client: responses cut anywhere, events of every spelling, what is no HTTP at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from shoal.cluster.bench_http import CallFailed, EventParser, HttpClient, Origin, ResponseParser

CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;x=1\r\nhello\r\n1\r\n \r\n6\r\nworld!\r\n0\r\nTrailer: 1\r\n\r\n"
)
FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhello world!"
CLOSED = b"HTTP/1.0 200 OK\r\n\r\nhello world!"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("response", "keeps_alive"), [(CHUNKED, True), (FIXED, True), (CLOSED, False)])
def test_a_body_is_the_same_wherever_it_is_cut(response: bytes, keeps_alive: bool, size: int) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces(response, size))
    parser.end()
    assert (parser.status, body, parser.is_over, parser.keeps_alive) == (200, b"hello world!", True, keeps_alive)


@pytest.mark.parametrize("response", [CHUNKED, FIXED])
def test_an_early_end_is_no_end(response: bytes) -> None:
    for length in range(len(response)):
        parser = ResponseParser()
        parser.feed(response[:length])
        with pytest.raises(CallFailed, match="cut off"):
            parser.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 what\r\n\r\n",
        b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http(data: bytes) -> None:
    with pytest.raises(CallFailed, match="not HTTP"):
        ResponseParser().feed(data)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_events_are_the_same_wherever_they_are_cut(newline: bytes, size: int) -> None:
    lines = [b": hi", b"id: 1", b"data: a", b"", b"data:b", b"data:  c", b"", b"", b"event: x", b"", b"data: [DONE]"]
    parser = EventParser()
    feed: Callable[[bytes], list[bytes]] = parser.feed
    found = [event for piece in pieces(newline.join(lines), size) for event in feed(piece)]
    assert found == [b"a", b"b\n c"]
    assert parser.end() == [b"[DONE]"]  # its empty line is missing


@pytest.mark.parametrize(("method", "asked"), [("GET", 2), ("POST", 1)])
def test_what_changes_nothing_is_asked_again_where_a_connection_was_closed(method: str, asked: int) -> None:
    """As servers do after an error, with the next request under way."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        if len(seen) > 1:
            writer.write(FIXED)
        writer.close()

    async def run() -> tuple[int, bytes]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = HttpClient(Origin.parse("http://{}:{}".format(*server.sockets[0].getsockname())))
        async with server:
            try:
                return await client.call(method, "/")
            finally:
                client.close()

    if method == "GET":
        assert asyncio.run(run()) == (200, b"hello world!")
    else:
        with pytest.raises(CallFailed, match="cut off"):
            asyncio.run(run())
    assert len(seen) == asked
