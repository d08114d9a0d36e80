"""A router without Ray, without a model: bytes for tokens, a scripted backend, and a server on a loopback port."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import uvicorn

from shoal.parallel.group import RankInfo
from shoal.router.api import create_app
from shoal.router.backend import ModelInfo, ReplicaState
from shoal.router.config import RouterConfig
from shoal.router.ingress import Ingress
from shoal.router.line import LineLimits
from shoal.router.line_client import Address, LineBackend
from shoal.router.replica import Replica
from shoal.runtime.errors import Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from shoal.runtime.stats import Stats
from shoal.runtime.text import Text

from ..tiny import EOS, TEMPLATE, byte_text

VOCAB_SIZE = 260
MAX_MODEL_LEN = 512
MODEL = "tiny"
SECRET = b"s" * 32
LINE_LIMITS = LineLimits(beat_s=0.02)
ANSWER = "The capital of France is Paris."
INFO = ModelInfo(
    model=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS], created=1_700_000_000
)
EXPLODING = "{% if explode %}{{ raise_exception('explode') }}{% endif %}" + TEMPLATE


def byte_level_text() -> Text:
    """One token a byte."""
    return Text(byte_text(), MAX_MODEL_LEN, VOCAB_SIZE, chat_template=EXPLODING)


class FakeBackend:
    """Says `answer` to everything, one token an event; `before` may interfere with each."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new."""
        vars(self).clear()
        self.answer = ANSWER
        self.delay_s = 0.0
        self.before: Callable[[GenerationRequest, int], None] | None = None
        self.after_n: int | None = None  # end the stream in silence after so many events
        self.ready_problem: str | None = None
        self.requests: list[GenerationRequest] = []
        self.live = 0
        self.aborted = 0

    async def generate(self, request: GenerationRequest, replica: str | None = None) -> AsyncIterator[list[TokenEvent]]:
        self.requests.append(request)
        self.live += 1
        finished = False
        try:
            for i, event in enumerate(self._events(request)):
                await asyncio.sleep(self.delay_s)
                if self.before is not None:
                    self.before(request, i)
                if i == self.after_n:
                    finished = True
                    return
                finished = event.finish_reason is not None
                yield [event]
        finally:
            self.live -= 1
            self.aborted += not finished

    def _events(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        params = request.params
        tokens = list(self.answer.encode())
        tokens = (tokens * 10_000)[: params.max_tokens] if params.ignore_eos else [*tokens, EOS]
        limit = params.max_tokens or 0
        if limit == 0:
            yield self._event(request, 0, [], FinishReason.LENGTH)
        for i, token in enumerate(tokens[:limit]):
            if i < len(request.tokens):  # said elsewhere
                continue
            stopped = token == EOS or token in params.stop_token_ids
            ended = FinishReason.STOP if stopped else FinishReason.LENGTH if i + 1 == limit else None
            yield self._event(request, i, [token], ended)
            if stopped:
                return

    def _event(
        self, request: GenerationRequest, start: int, tokens: list[int], ended: FinishReason | None
    ) -> TokenEvent:
        params = request.params
        first = start == len(request.tokens)
        scored = first and params.prompt_logprobs is not None
        return TokenEvent(
            id=request.id,
            start=start,
            tokens=tokens,
            logprobs=None if params.logprobs is None else [_logprob(token, params.logprobs) for token in tokens],
            prompt_logprobs=[None, *(_logprob(token, params.prompt_logprobs or 0) for token in request.prompt[1:])]
            if scored
            else None,
            finish_reason=ended,
            stop_reason=tokens[-1] if ended is FinishReason.STOP else None,
            num_cached_tokens=2 if first else 0,
        )

    async def info(self) -> ModelInfo:
        return INFO

    async def ready(self) -> None:
        if self.ready_problem is not None:
            raise Unavailable(f"not ready: {self.ready_problem}")

    async def stats(self) -> dict[str, Stats]:
        return {"r1": Stats(num_running=self.live, num_blocks=10, num_blocks_held=4, generation_tokens=42, steps=7)}

    def replicas(self) -> dict[str, ReplicaState]:
        rank = RankInfo(rank=0, stage=0, shard=0, node="n1", pid=77, details={"layers": "0-3 of 4"})
        state = ReplicaState(
            problem=self.ready_problem, stats=Stats(num_running=2), ranks=[rank], in_flight=0, tokens_sent=0
        )
        return {"r1": state}


def _logprob(token: int, num_top: int) -> TokenLogprob:
    """The token itself first, then its neighbours."""
    top = [((token + k) % VOCAB_SIZE, -0.5 - k) for k in range(num_top)]
    return TokenLogprob(-0.5, 1, top)


@asynccontextmanager
async def line_to(replica: Replica) -> AsyncIterator[LineBackend]:
    """The real line to a replica in this process."""
    backend = line_backend(replica)
    backend.start()
    try:
        while not backend.replicas():
            await asyncio.sleep(0.001)
        yield backend
    finally:
        await backend.close()


def line_backend(replica: Replica) -> LineBackend:
    """Yet to be started, in the event loop that is to run both."""

    async def find() -> list[Address]:
        return [await replica.listen("r1", "127.0.0.1")]

    return LineBackend(find, secret=SECRET, limits=LINE_LIMITS)


class Server:
    """uvicorn on a loopback port, in a thread of its own. loaded: whether the ingress is open from the start."""

    def __init__(self, config: RouterConfig | None = None, backend: Any = None, *, loaded: bool = True) -> None:
        self.backend = backend or FakeBackend()
        self.ingress = Ingress(
            self.backend, config or RouterConfig(served_model_name=(MODEL, "alias"), resume_attempts=0)
        )
        if loaded:
            self.open()
        app = create_app(self.ingress)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._server.serve()

        asyncio.run(serve())

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self._server.started, "the server to start")
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.ingress.open(INFO, byte_level_text())

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.raw(request_bytes("POST", path, data, **headers))

    def get(self, path: str, **headers: str) -> Reply:
        return self.raw(request_bytes("GET", path, None, **headers))

    def raw(self, data: bytes) -> Reply:
        with self.connect() as sock:
            with suppress(BrokenPipeError, ConnectionResetError):  # answered before it had read everything
                sock.sendall(data)
            return read_reply(sock)

    @contextmanager
    def connect(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            yield sock


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == "", "the stream does not end with an event's end"
        assert all(part.startswith("data: ") for part in parts[:-1])
        return [part.removeprefix("data: ") for part in parts[:-1]]

    @property
    def chunks(self) -> list[Any]:
        assert self.events[-1] == "[DONE]"
        return [json.loads(event) for event in self.events[:-1]]


def request_bytes(method: str, path: str, body: bytes | None, **headers: str) -> bytes:
    """`content_type="x"` sets a header, an empty value leaves it out."""
    sent = {"host": "test"}
    if body is not None:
        sent |= {"content-type": "application/json", "content-length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items() if value)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def read_reply(sock: socket.socket) -> Reply:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
