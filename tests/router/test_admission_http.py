"""Admission as clients meet it: statuses, headers, and what OpenAI's client makes of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from shoal.router.config import RouterConfig, Rung, TenantConfig
from shoal.router.tenants import digest_of

from .fakes import MAX_MODEL_LEN, MODEL, FakeBackend, Reply, Server, request_bytes, wait_for

PATH = "/v1/completions"


def tenant(name: str, **fields: Any) -> TenantConfig:
    """Its key is its name."""
    return TenantConfig(name=name, keys=(digest_of(name),), **fields)


def serve(*tenants: TenantConfig, delay_s: float = 0.0, **config: Any) -> Server:
    backend = FakeBackend()
    backend.delay_s = delay_s
    return Server(RouterConfig(served_model_name=(MODEL,), tenants=tenants, **config), backend)


def post(server: Server, key: str = "", headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    body = {"model": MODEL, "prompt": "hi", **fields}
    return server.post(PATH, body, authorization=f"Bearer {key}" if key else "", **(headers or {}))


@contextmanager
def busy(server: Server, num: int = 1, key: str = "") -> Iterator[None]:
    """So many long generations run meanwhile."""
    auth = {"authorization": f"Bearer {key}"} if key else {}
    data = request_bytes("POST", PATH, b'{"model":"tiny","prompt":"hi","max_tokens":400,"ignore_eos":true}', **auth)
    socks = []
    try:
        for count in range(num):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            sock.sendall(data)
            socks.append(sock)
            wait_for(lambda count=count: server.backend.live > count, "the load")
        yield
    finally:
        for sock in socks:
            sock.close()
        wait_for(lambda: server.ingress.admission.in_flight == 0, "the load to end")


def test_the_engine_is_told_whose_it_is() -> None:
    with serve(tenant("acme", weight=3, priority=2)) as server:
        for salt in ("one", "two"):
            assert post(server, "acme", cache_salt=salt).status == 200
        post(server, "acme", priority=1)
        post(server, "acme", priority=5)
        requests = server.backend.requests
        assert [(r.account, r.share) for r in requests] == [("acme", 3.0)] * 4
        assert [r.priority for r in requests] == [2, 2, 2, 5], "a client went before its tenant"
        assert requests[0].tenant != requests[1].tenant


def test_rates_in_headers_and_429() -> None:
    with serve(tenant("acme", requests_per_minute=2, tokens_per_minute=1000)) as server:
        first = post(server, "acme", max_tokens=5)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - 2 - 5)
        assert post(server, "acme").status == 200
        reply = post(server, "acme")
        assert reply.status == 429
        assert reply.json["error"]["code"] == "rate_limit_exceeded"
        assert reply.json["error"]["type"] == "rate_limit_error"
        assert 20 < int(reply.headers["retry-after"]) <= 30
        assert reply.headers["x-should-retry"] == "true"
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert server.get("/v1/models", authorization="Bearer acme").status == 200


def test_what_no_budget_holds_is_refused_for_good_unless_the_client_left_its_length_open() -> None:
    with serve(tenant("acme", token_budget=50)) as server:
        reply = post(server, "acme", max_tokens=60)
        assert reply.status == 429
        assert reply.headers["x-should-retry"] == "false"
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        assert server.post("/v1/chat/completions", chat, authorization="Bearer acme").status == 200
        (request,) = server.backend.requests
        assert len(request.prompt) + (request.params.max_tokens or 0) == 50


def test_openais_client_waits_as_told_and_stops_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    with serve(
        tenant("acme", requests_per_minute=600, token_budget=1000), tenant("once", requests_per_minute=1)
    ) as server:

        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=2)

        client("once").completions.create(model=MODEL, prompt="hi", max_tokens=1)
        with pytest.raises(openai.RateLimitError):
            client("once").completions.create(model=MODEL, prompt="hi", max_tokens=1)
        waits = [wait for wait in slept if wait > 1]
        assert len(waits) == 2
        assert all(50 < wait <= 60 for wait in waits)
        slept.clear()
        with pytest.raises(openai.RateLimitError, match="token_budget"):
            client("acme").completions.create(model=MODEL, prompt="hi", max_tokens=400, n=3)
        assert not [wait for wait in slept if wait > 0.1], "it tried again what can never pass"


def test_a_deadline_in_the_queue_and_in_the_engine() -> None:
    with serve(delay_s=0.02, max_in_flight=1) as server, busy(server):
        for asked in ({"timeout": 0.2}, {"headers": {"x_shoal_timeout": "0.2"}, "timeout": 50}):
            reply = post(server, **asked)  # type: ignore[arg-type]
            assert reply.status == 408
            assert "0.2 s in the queue" in reply.json["error"]["message"]
            assert reply.headers["x-should-retry"] == "false"
        assert len(server.backend.requests) == 1


def test_the_engine_gets_what_the_queue_has_left_of_the_deadline() -> None:
    with serve(delay_s=0.002, max_in_flight=1) as server:
        first = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        first.sendall(request_bytes("POST", PATH, b'{"model":"tiny","prompt":"hi","max_tokens":100,"ignore_eos":true}'))
        wait_for(lambda: server.backend.live == 1, "the load")
        assert post(server, timeout=30).status == 200
        assert 0 < server.backend.requests[1].timeout_s < 30
        assert post(server, headers={"x_shoal_timeout": "12.5"}, timeout=20).status == 200
        assert 12 < server.backend.requests[2].timeout_s <= 12.5
        assert post(server, headers={"x_shoal_timeout": "4000"}).status == 400
        first.close()


def test_a_client_that_leaves_the_queue_is_forgotten() -> None:
    with serve(delay_s=0.02, max_in_flight=1) as server, busy(server):
        with server.connect() as sock:
            sock.sendall(request_bytes("POST", PATH, b'{"model":"tiny","prompt":"hi"}'))
            wait_for(lambda: server.ingress.admission._queue.waiting == 1, "the queue")
        wait_for(lambda: server.ingress.admission._queue.waiting == 0, "the client to be forgotten")
        assert len(server.backend.requests) == 1


def test_overload_refuses_with_the_time_to_come_back() -> None:
    with serve(delay_s=0.02, max_in_flight=1, max_waiting=0) as server, busy(server):
        reply = post(server)
        assert reply.status == 429
        assert reply.json["error"]["code"] == "queue_full"
        assert reply.headers["x-should-retry"] == "true"
        assert int(reply.headers["retry-after-ms"]) >= 100
        server.ingress.admission.drain()
        assert post(server).status == 503


def test_the_ladder_is_climbed_and_says_so() -> None:
    ladder = (Rung(load=0.5, max_tokens=4, truncate_to=6),)
    with serve(tenant("acme"), delay_s=0.02, max_in_flight=4, ladder=ladder) as server:
        assert "x-shoal-degraded" not in post(server, "acme", max_tokens=9).headers
        with busy(server, 2, "acme"):
            reply = post(server, "acme", max_tokens=9, prompt="a long prompt", truncation="auto")
            assert reply.headers["x-shoal-degraded"] == "truncate_to=6, max_tokens=4"
            assert reply.json["usage"] | {"prompt_tokens_details": 0} == {
                "prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10, "prompt_tokens_details": 0,
            }  # fmt: skip
            assert bytes(server.backend.requests[-1].prompt) == b"prompt"
            kept = post(server, "acme", max_tokens=3, prompt="a long prompt")
            assert "x-shoal-degraded" not in kept.headers, "nothing was taken from it"
            assert kept.json["usage"]["prompt_tokens"] == 13
        metrics = server.get("/metrics", authorization="Bearer acme").body.decode()
        assert 'shoal_degraded_requests_total{rung="max_tokens"} 1.0' in metrics


def test_at_the_top_of_the_ladder_requests_are_shed() -> None:
    tenants = tenant("acme"), tenant("vip", priority=-1)
    with serve(*tenants, delay_s=0.02, max_in_flight=2, ladder=(Rung(load=0.5, shed=True),)) as server:
        with busy(server, 1, "vip"):
            reply = post(server, "acme")
            assert reply.status == 503
            assert reply.headers["x-should-retry"] == "true"
            assert int(reply.headers["retry-after"]) >= 1
            assert post(server, "vip").status == 200
        assert post(server, "acme").status == 200


@pytest.mark.parametrize("prompt", ["x" * 600 + "the end", list(b"x" * 600 + b"the end")])
def test_truncation_keeps_the_last_tokens_that_fit(prompt: Any) -> None:
    with serve() as server:
        assert post(server, prompt=prompt, max_tokens=12).status == 400
        assert post(server, prompt=prompt, max_tokens=12, truncation="disabled").status == 400
        assert post(server, prompt=prompt, max_tokens=12, truncation="auto").status == 200
        (request,) = server.backend.requests
        assert len(request.prompt) == MAX_MODEL_LEN - 12
        assert bytes(request.prompt).endswith(b"xthe end")
        assert post(server, truncation="middle").status == 400


def test_what_is_cut_to_fit_leaves_room_for_an_answer() -> None:
    text = "x" * 600
    with serve() as server:
        assert post(server, prompt=text, truncation="auto").json["usage"]["completion_tokens"] == 16
        chat = {"model": MODEL, "messages": [{"role": "user", "content": text}], "truncation": "auto"}
        server.post("/v1/chat/completions", chat)
        assert server.backend.requests[-1].params.max_tokens == MAX_MODEL_LEN // 4
        post(server, prompt="x" * (MAX_MODEL_LEN - 3), truncation="auto")
        assert len(server.backend.requests[-1].prompt) == MAX_MODEL_LEN - 3, "it fitted"


def test_more_choices_than_the_tenant_may_have_at_once_are_no_matter_of_waiting() -> None:
    with serve(tenant("acme", max_in_flight=2)) as server:
        reply = post(server, "acme", n=3, max_tokens=1)
        assert reply.status == 400
        assert "3 choices; acme may have 2 in flight" in reply.json["error"]["message"]
        assert post(server, "acme", n=2, max_tokens=1).status == 200
