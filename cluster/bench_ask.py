"""One request of `shoal bench serve`: how it is put to a server, and what its client saw of the answer."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Literal

import msgspec

from ..runtime.errors import EngineError, RequestError
from .bench_http import CallFailed, EventParser, HttpClient
from .bench_load import Ask
from .client import reason_of

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
HEADERS = {"x-shoal-cache": "bypass"}  # Shoal would answer a second run from its store; others do not know it
REFUSED = (400, 422)
ROLES = ("user", "assistant")


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """A role, or nothing but an end, is no text; what a model thinks is."""
        if self.delta is None:
            return bool(self.text)
        return bool(self.delta.content or self.delta.reasoning_content or self.delta.reasoning)


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """What we read of a streamed event, of either route."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: str | None = None


_decode_chunk = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Moments are seconds from the start of the run; -1: never.

    due_s: when it was to be sent. moments: of pieces of text, each one or more tokens. error: a kind, empty where all
    is well. prompt_tokens, output_tokens: as the server counts them; None: it does not say.
    """

    ask: Ask
    due_s: float
    sent_s: float = -1.0
    end_s: float = -1.0
    moments: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""
    detail: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def num_output(self) -> int:
        """Tokens of the answer; where the server does not say, pieces of text."""
        return len(self.moments) if self.output_tokens is None else self.output_tokens

    @property
    def last_s(self) -> float:
        """When the last text was there; an answer without text ends with its stream."""
        return self.moments[-1] if self.moments else self.end_s

    @property
    def ttft_s(self) -> float:
        return (self.moments[0] if self.moments else self.end_s) - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        return (self.e2e_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None


@dataclass(frozen=True, slots=True)
class Dialect:
    """Fields a server is sent. Beyond OpenAI's: what keeps answers long and prompts new."""

    salt: bool = True
    lengths: bool = True
    usage: bool = True
    max_tokens: str = "max_tokens"

    def body(self, ask: Ask, *, endpoint: Endpoint, model: str, temperature: float, salt: str) -> dict[str, Any]:
        """The request's."""
        body: dict[str, Any] = {"model": model, "stream": True, "temperature": temperature}
        body |= _prompt(endpoint, ask.texts)
        body[self.max_tokens] = ask.output_tokens
        if self.usage:
            body["stream_options"] = {"include_usage": True}
        if self.lengths:
            body |= {"ignore_eos": True, "min_tokens": ask.output_tokens}
        if self.salt:
            body["cache_salt"] = salt
        return body


def _prompt(endpoint: Endpoint, texts: Sequence[str]) -> dict[str, Any]:
    if endpoint == "completions":
        return {"prompt": "\n".join(texts)}
    return {"messages": [{"role": who, "content": text} for who, text in zip(cycle(ROLES), texts, strict=False)]}


DIALECTS = (
    (Dialect(), ""),
    (
        Dialect(salt=False),
        "cache_salt: its prefix cache may know prompts of earlier runs; take a new --seed for each",
    ),
    (Dialect(salt=False, lengths=False), "ignore_eos and min_tokens: answers may be shorter than asked for"),
    (Dialect(salt=False, lengths=False, usage=False), "stream_options: pieces of text are counted as tokens"),
    (Dialect(salt=False, lengths=False, max_tokens="max_completion_tokens"), "max_tokens, and what is not OpenAI's"),
)
"""What is tried, in this order, and what a server refuses that takes no more than that."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom we ask, and how."""

    http: HttpClient
    endpoint: Endpoint
    model: str
    temperature: float = 0.0
    salt: str = ""
    dialect: Dialect = Dialect()

    def payload(self, ask: Ask) -> bytes:
        body = self.dialect.body(
            ask, endpoint=self.endpoint, model=self.model, temperature=self.temperature, salt=self.salt
        )
        return self.http.payload("POST", PATHS[self.endpoint], msgspec.json.encode(body), headers=HEADERS)

    async def run(self, record: Record, now: Callable[[], float] = time.perf_counter) -> int:
        """Send the record's request and fill in what comes; the status, 0 where there was none. Never raises."""
        payload = self.payload(record.ask)
        reader = _Reader(record, now)
        status = 0
        record.sent_s = now()
        try:
            status = await self.http.send(payload, reader.receive)
            reader.end(status)
        except CallFailed as failure:
            record.error, record.detail = record.error or failure.kind, record.detail or str(failure)
        record.end_s = now()
        return status

    async def count(self, texts: Sequence[str]) -> int:
        """Tokens that the server makes of a conversation. Raises EngineError: it has no `/tokenize` like vLLM's."""
        body: dict[str, Any] = {"model": self.model}
        body |= _prompt(self.endpoint, texts)
        status, answer = await self.http.call("POST", "/tokenize", body)
        try:
            count = int(msgspec.json.decode(answer)["count"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError):
            count = 0
        if status != 200 or count < 1:
            raise EngineError(f"POST /tokenize: status {status}, no count of tokens")
        return count


class _Reader:
    """Reads one answer into its record."""

    def __init__(self, record: Record, now: Callable[[], float]) -> None:
        self._record = record
        self._now = now
        self._events = EventParser()
        self._refusal = b""
        self._is_done = False

    def receive(self, status: int, piece: bytes) -> bool:
        """See `bench_http.Receive`."""
        if status != 200:
            self._refusal += piece[: 1 << 16]
            return False
        moment = self._now()
        for data in self._events.feed(piece):
            self._event(data, moment)
        return self._is_done

    def end(self, status: int) -> None:
        """The response is over, or nobody waits for its rest. Raises CallFailed: it is no whole answer."""
        if status != 200:
            raise CallFailed(f"status {status}", reason_of(self._refusal))
        for data in self._events.end():
            self._event(data, self._now())
        if not self._is_done and not self._record.finish_reason:
            raise CallFailed("cut off", "the stream ended without [DONE] or a finish_reason")

    def _event(self, data: bytes, moment: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = _decode_chunk(data)
        except msgspec.DecodeError as error:
            raise CallFailed("malformed event", f"{error}: {data[:80]!r}") from None
        if chunk.error is not None or chunk.object == "error":
            raise CallFailed("error event", reason_of(data))
        record = self._record
        for choice in chunk.choices or ():
            if choice.has_text:
                record.moments.append(moment)
            record.finish_reason = choice.finish_reason or record.finish_reason
        if chunk.usage is not None:
            record.prompt_tokens = chunk.usage.prompt_tokens
            record.output_tokens = chunk.usage.completion_tokens


async def settle(target: Target, ask: Ask) -> tuple[Target, str]:
    """The target in the fullest dialect that it takes, tried with a request; and what it refuses, if anything.

    Raises:
        RequestError: it refuses the plainest request. EngineError: it fails, or nobody is there.
    """
    first_refusal = ""
    for dialect, refused in DIALECTS:
        tried = replace(target, dialect=dialect)
        record = Record(ask, due_s=0.0)
        status = await tried.run(record)
        if record.is_ok:
            return tried, refused
        first_refusal = first_refusal or record.detail
        if status not in REFUSED:
            raise EngineError(f"the first request failed: {record.detail}")
    raise RequestError(f"the server refuses the plainest request, too: {first_refusal}")
