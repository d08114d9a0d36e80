"""A server for the benchmark client: a tokenizer of one token a word, answers with the quirks that a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

BASE, PAIR = 3, 2  # tokens around a prompt, and for each earlier turn

Gate = Callable[[dict[str, Any]], Awaitable[None]]


async def open_gate(body: dict[str, Any]) -> None:
    """Lets everybody through."""


@dataclass
class Quirks:
    """How this server differs from others.

    fail: number of the generating request, from 0 -> what is written instead of an answer. gate: awaited ahead of one.
    refuses: fields that are a 400.
    """

    newline: str = "\n"
    has_usage: bool = True
    has_done: bool = True
    has_tokenize: bool = True
    refuses: tuple[str, ...] = ()
    long_words: tuple[str, ...] = ()
    fail: dict[int, bytes] = field(default_factory=dict)
    gate: Gate = open_gate
    chunked: bool = True


class BenchServer:
    """What it was asked, in order, and how many answers were under way at once."""

    def __init__(self, quirks: Quirks) -> None:
        self.quirks = quirks
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.running = self.peak = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._exchange(reader, writer):
                await writer.drain()
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        content = await reader.readexactly(int(lines.get("content-length", 0)))
        body = json.loads(content) if content else {}
        match head.split(" ")[1]:
            case "/v1/models":
                writer.write(plain(200, {"data": [{"id": "stub", "max_model_len": 4096}]}))
            case "/version":
                writer.write(plain(200, {"version": "7"}))
            case "/tokenize" if self.quirks.has_tokenize:
                writer.write(plain(200, {"count": self.count(body)}))
            case "/v1/completions" | "/v1/chat/completions":
                self.headers.append(head)
                return await self._generate(body, writer)
            case path:
                writer.write(plain(404, {"error": {"message": f"no {path}"}}))
        return True

    async def _generate(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        refused = [name for name in self.quirks.refuses if name in body]
        if refused:
            writer.write(plain(400, {"error": {"message": f"unknown field {refused[0]}"}}))
            return True
        number = len(self.bodies)
        self.bodies.append(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        await self.quirks.gate(body)
        self.running -= 1
        if number in self.quirks.fail:
            writer.write(self.quirks.fail[number])
            return False
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        answer = "".join(self._events(body)).encode()
        if self.quirks.chunked:
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + chunk(answer) + chunk(b""))
        else:
            writer.write(head + b"\r\n" + answer)
        return self.quirks.chunked

    def _events(self, body: dict[str, Any]) -> Iterator[str]:
        """A role (chat), a piece of text for each token, an end, usage, [DONE]."""
        tokens = int(body.get("max_tokens") or body["max_completion_tokens"])
        is_chat = "messages" in body
        choices: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if is_chat else []
        for number in range(tokens):
            kind = "reasoning_content" if number < tokens // 2 else "content"
            choices.append({"delta": {kind: " a"}} if is_chat else {"text": " a"})
        choices.append({"finish_reason": "length", **({"delta": {}} if is_chat else {"text": ""})})
        events = [{"choices": [choice], "usage": None} for choice in choices]
        if self.quirks.has_usage:
            events.append({"choices": [], "usage": {"prompt_tokens": self.count(body), "completion_tokens": tokens}})
        data = [json.dumps(event) for event in events] + ["[DONE]"] * self.quirks.has_done
        return (f": comment{self.quirks.newline}data: {one}{self.quirks.newline * 2}" for one in data)

    def count(self, body: dict[str, Any]) -> int:
        """Tokens of a prompt: its words, those of `long_words` twice, and what is around them."""
        texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
        words = [word for text in texts for word in text.split()]
        turns = len(texts) // 2 if "messages" in body else body["prompt"].count("\n") // 2
        return BASE + PAIR * turns + len(words) + sum(word in self.quirks.long_words for word in words)


def plain(status: int, value: object) -> bytes:
    """A response of JSON."""
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def events(*data: str) -> bytes:
    """A stream of these events alone, which ends with its connection."""
    return b"HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {one}\n\n" for one in data).encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@asynccontextmanager
async def bench_server(quirks: Quirks | None = None) -> AsyncIterator[BenchServer]:
    """In this event loop."""
    server = BenchServer(quirks or Quirks())
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield server


@contextmanager
def bench_server_thread(quirks: Quirks | None = None) -> Iterator[BenchServer]:
    """In a thread of its own, for commands that run a loop themselves."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    found: list[BenchServer] = []
    over = asyncio.Event()

    async def main() -> None:
        async with bench_server(quirks) as server:
            found.append(server)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
