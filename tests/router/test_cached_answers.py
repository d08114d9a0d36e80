"""Cached, shared and continued answers as clients see them: over HTTP, with a real Redis behind the ingresses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import CollectorRegistry

from shoal.router.config import RouterConfig, TenantConfig
from shoal.router.log_cache import LogCache
from shoal.router.meters import StoreMeter
from shoal.router.redis_store import RedisStore
from shoal.router.redis_url import parse_redis_url
from shoal.router.tenants import digest_of

from ..redis_servers import RedisServer, needs_redis
from .fakes import INFO, MODEL, FakeBackend, Reply, Server, byte_level_text, wait_for

pytestmark = needs_redis
SECRET = "s" * 32
CHAT = "/v1/chat/completions"


class CachingServer(Server):
    """A server whose ingress keeps its logs in `redis`."""

    def __init__(self, redis: RedisServer, **config: Any) -> None:
        settings = RouterConfig(served_model_name=(MODEL,), secret=SECRET, redis_timeout_s=1.0, **config)
        super().__init__(settings, FakeBackend(), loaded=False)
        self._redis = redis

    def open_cache(self) -> None:
        """In the server's own loop, to which a store belongs."""

        async def opening() -> None:
            store = RedisStore(parse_redis_url(self._redis.url), StoreMeter(CollectorRegistry()), timeout_s=1.0)
            meter = self.ingress.metrics.cache
            cache = LogCache(store, model="m", secret=SECRET.encode(), config=self.ingress.config, meter=meter)
            self.ingress.open(INFO, byte_level_text(), cache=cache)
            self.store = store

        asyncio.run_coroutine_threadsafe(opening(), self.loop).result(5)

    def __enter__(self) -> CachingServer:
        super().__enter__()
        self.open_cache()
        return self

    def __exit__(self, *error: object) -> None:
        async def closing() -> None:
            await self.ingress.model.cache.close()
            await self.store.close()

        asyncio.run_coroutine_threadsafe(closing(), self.loop).result(5)
        super().__exit__(*error)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(redis: RedisServer) -> Iterator[CachingServer]:
    redis.ask("FLUSHALL")
    with CachingServer(redis) as server:
        yield server


@pytest.fixture
def pair(redis: RedisServer) -> Iterator[tuple[CachingServer, CachingServer]]:
    redis.ask("FLUSHALL")
    with ExitStack() as stack:
        first, second = (stack.enter_context(CachingServer(redis)) for _ in range(2))
        yield first, second


def ask(server: Server, path: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> Reply:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return server.post(path, {"model": MODEL, "temperature": 0, **prompt, **body}, **(headers or {}))


def origin(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return reply.headers["x-shoal-cache"]


def text(reply: Reply) -> str:
    if reply.headers["content-type"].startswith("application/json"):
        return "".join(choice["message"]["content"] for choice in reply.json["choices"])
    chunks = [json.loads(event.split("data: ")[1]) for event in reply.body.decode().split("\n\n")[:-2]]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def stable(reply: Reply) -> Any:
    """What is the same in equal answers."""
    return {name: value for name, value in reply.json.items() if name not in ("id", "created")}


def settled(server: CachingServer, path: str = CHAT, **body: Any) -> Reply:
    """A hit: the entry is stored a moment behind the answer."""
    wait_for(lambda: ask(server, path, **body).headers["x-shoal-cache"] == "hit", "the entry")
    return ask(server, path, **body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": "Paris"},
        {"max_tokens": 4},
        {"temperature": 1.0, "seed": 7},
    ],
)
def test_a_hit_is_the_same_answer_whole_or_streamed(server: CachingServer, body: dict[str, Any]) -> None:
    first = ask(server, **body)
    assert origin(first) == "miss"
    hit = settled(server, **body)
    assert stable(hit) == stable(first)
    assert int(hit.headers["age"]) >= 0
    cost = len(server.backend.requests)
    streamed = ask(server, stream=True, user="somebody", **body)
    assert origin(streamed) == "hit"
    if "n" not in body:
        assert text(streamed) == text(first)
    assert len(server.backend.requests) == cost, "a hit costs no generation"


def test_what_decides_the_answer_decides_the_entry(server: CachingServer) -> None:
    settled(server)
    for other in ({"max_tokens": 5}, {"stop": "x"}, {"top_p": 0.5}, {"logprobs": True}, {"cache_salt": "mine"}):
        assert origin(ask(server, **other)) == "miss", other
    assert origin(ask(server, timeout=20, user="u", stream_options=None)) == "hit"
    assert origin(ask(server, seed=5)) == "hit", "a seed decides nothing at temperature 0"
    assert origin(ask(server, temperature=1.0)) == "bypass"
    assert origin(ask(server, temperature=1.0, seed=5)) == "miss"


def test_modes(server: CachingServer) -> None:
    only = ask(server, headers={"x_shoal_cache": "only"})
    assert (only.status, only.json["error"]["code"]) == (504, "cache_miss")
    assert origin(ask(server, headers={"x_shoal_cache": "bypass"})) == "bypass"
    settled(server)
    assert origin(ask(server, headers={"x_shoal_cache": "ONLY"})) == "hit"
    server.backend.answer = "something new"
    assert origin(ask(server, headers={"x_shoal_cache": "bypass"})) == "bypass"
    assert text(ask(server)) != "something new"
    refreshed = ask(server, headers={"x_shoal_cache": "refresh"})
    assert (origin(refreshed), text(refreshed)) == ("miss", "something new")
    wait_for(lambda: text(ask(server)) == "something new", "the new entry")


@pytest.mark.parametrize(("mode", "statuses"), [("off", ["bypass"] * 2), ("all", ["miss", "hit"])])
def test_the_config_says_what_is_cached(redis: RedisServer, mode: str, statuses: list[str]) -> None:
    redis.ask("FLUSHALL")
    with CachingServer(redis, cache_mode=mode) as server:
        assert origin(ask(server, temperature=1.0)) == statuses[0]
        wait_for(lambda: origin(ask(server, temperature=1.0)) == statuses[1], "the entry")


def test_a_hit_needs_no_replica(server: CachingServer) -> None:
    settled(server)

    def gone(*_: object) -> None:
        raise ConnectionError

    server.backend.before = gone
    assert origin(ask(server)) == "hit"
    assert ask(server, max_tokens=9).status == 500


def test_tenants_are_apart_unless_they_share(redis: RedisServer) -> None:
    redis.ask("FLUSHALL")
    names = {"ann": False, "bob": False, "carl": True, "dora": True}
    tenants = tuple(
        TenantConfig(name=name, keys=(digest_of(f"sk-{name}"),), shares_cache=shares) for name, shares in names.items()
    )
    with CachingServer(redis, tenants=tenants) as server:

        def asks(name: str) -> str:
            return origin(ask(server, headers={"authorization": f"Bearer sk-{name}"}))

        for name in ("ann", "bob", "carl"):
            assert asks(name) == "miss"
            wait_for(lambda name=name: asks(name) == "hit", "the entry")  # type: ignore[misc]
        assert asks("dora") == "hit"


def test_a_hundred_equal_streams_cost_one_generation(pair: tuple[CachingServer, CachingServer]) -> None:
    for server in pair:
        server.backend.delay_s = 0.02
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda i: ask(pair[i % 2], stream=True), range(100)))
    assert {text(reply) for reply in replies} == {pair[0].backend.answer}
    assert sum(len(server.backend.requests) for server in pair) == 1
    origins = [origin(reply) for reply in replies]
    assert origins.count("miss") == 1
    assert set(origins) <= {"miss", "shared", "hit"}


def test_a_stream_is_continued_at_another_ingress(pair: tuple[CachingServer, CachingServer]) -> None:
    """The first one's answer is cut off in the middle, as if it had died: its line, and so its generation, are gone."""
    first, second = pair
    first.backend.delay_s = 0.02
    key = {"idempotency_key": "k-1"}
    body = {"stream": True, "temperature": 1.0}  # a drawn answer: nobody could make it again
    received = b""
    with first.connect() as sock:
        payload = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nidempotency-key: k-1\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        while received.count(b"id: ") < 8:
            received += sock.recv(65536)
    wait_for(lambda: first.backend.live == 0, "the generation to end")
    had = [json.loads(part.split(b"data: ")[1].split(b"\n")[0]) for part in received.split(b"id: ")[1:-1]]
    last_id = received.split(b"id: ")[-2].split(b"\n")[0].decode()
    rest = ask(second, headers={**key, "last_event_id": last_id}, **body)
    assert rest.status == 200
    so_far = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in had)
    assert so_far + text(rest) == first.backend.answer
    (continued,) = second.backend.requests
    assert continued.seed == first.backend.requests[0].seed
    whole = ask(second, headers=key, **body)
    assert text(whole) == first.backend.answer
    assert len(second.backend.requests) == 1


def test_what_a_key_cannot_do(server: CachingServer) -> None:
    drawn = {"temperature": 1.0}
    key = {"idempotency_key": "k"}
    first = ask(server, headers=key, **drawn)
    again = ask(server, headers=key, **drawn)
    assert again.json["id"] == first.json["id"]
    assert len(server.backend.requests) == 1
    other = ask(server, headers=key, max_tokens=3, **drawn)
    assert 400 <= other.status < 500
    assert other.json["error"]["code"] == "idempotency_key_reused"
    lost = ask(server, headers={"idempotency_key": "unknown", "last_event_id": "3"}, stream=True, **drawn)
    assert (lost.status, lost.json["error"]["code"]) == (409, "log_lost")


def test_openai_s_client_streams_a_hit(server: CachingServer) -> None:
    settled(server, stream=False)
    with closing(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True},
            extra_headers={"Idempotency-Key": "k", "X-Shoal-Cache": "only"},
        )  # fmt: skip
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == server.backend.answer
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(server.backend.answer) + 1


def test_a_redis_that_dies_fails_nobody(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, CachingServer(redis) as server:
        settled(server)
        server.backend.delay_s = 0.01
        answers: list[Reply] = []
        streaming = threading.Thread(target=lambda: answers.append(ask(server, stream=True, max_tokens=20)))
        streaming.start()
        wait_for(lambda: server.backend.live == 1, "the stream")
        redis.stop()
        for i in range(10):
            reply = ask(server, max_tokens=3 + i)
            assert origin(reply) == "miss"
        streaming.join()
        assert text(answers[0]) == server.backend.answer[:20]
        assert answers[0].body.endswith(b"data: [DONE]\n\n")
