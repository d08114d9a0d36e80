"""A second, smaller model behind the same router: asked for by name, or fallen to under load."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.router.config import RouterConfig, Rung
from shoal.runtime.errors import Unavailable

from .fakes import INFO, MODEL, FakeBackend, Reply, Server, byte_level_text, request_bytes, wait_for

SMALL = "tiny-er"
RUNG = Rung(load=0.5, model=SMALL)


def two_models(small: FakeBackend, *, is_open: bool = True, **config: Any) -> Server:
    server = Server(RouterConfig(served_model_name=(MODEL, "alias"), **config))
    model = server.ingress.add(small, name=SMALL)
    small.answer = "small talk"
    if is_open:
        model.open(INFO, byte_level_text())
    return server


def ask(server: Server, model: str = MODEL) -> Reply:
    return server.post("/v1/completions", {"model": model, "prompt": "hi", "max_tokens": 100})


def text(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["text"])


def test_each_model_answers_to_its_name() -> None:
    with two_models(FakeBackend()) as server:
        assert [card["id"] for card in server.get("/v1/models").json["data"]] == [MODEL, "alias", SMALL]
        assert text(ask(server, "alias")) == server.backend.answer
        reply = ask(server, SMALL)
        assert (text(reply), reply.json["model"]) == ("small talk", SMALL)
        assert "x-shoal-degraded" not in reply.headers
        assert server.get(f"/v1/models/{SMALL}").json["id"] == SMALL
        assert server.post("/tokenize", {"model": SMALL, "prompt": "hi"}).json["count"] == 2
        unknown = ask(server, "huge")
        assert unknown.status == 404
        assert SMALL in unknown.json["error"]["message"]


def test_under_load_the_smaller_one_answers_and_says_so() -> None:
    with two_models(FakeBackend(), max_in_flight=2, ladder=(RUNG,)) as server:
        assert text(ask(server)) == server.backend.answer
        server.backend.delay_s = 0.02
        body = b'{"model":"tiny","prompt":"hi","max_tokens":500,"ignore_eos":true}'
        with server.connect() as sock:
            sock.sendall(request_bytes("POST", "/v1/completions", body))
            wait_for(lambda: server.backend.live == 1, "the load")
            reply = ask(server)
            assert (text(reply), reply.json["model"]) == ("small talk", SMALL)
            assert reply.headers["x-shoal-degraded"] == f"model={SMALL}"
            assert "x-shoal-degraded" not in ask(server, SMALL).headers
        metrics = server.get("/metrics").body.decode()
        assert 'shoal_degraded_requests_total{rung="model"} 1.0' in metrics


def test_a_smaller_model_that_is_still_loading_is_not_there() -> None:
    with two_models(FakeBackend(), is_open=False, max_in_flight=1, ladder=(RUNG,)) as server:
        assert ask(server, SMALL).status == 404
        server.backend.delay_s = 0.02
        body = b'{"model":"tiny","prompt":"hi","max_tokens":500,"ignore_eos":true}'
        with server.connect() as sock:
            sock.sendall(request_bytes("POST", "/v1/completions", body))
            wait_for(lambda: server.backend.live == 1, "the load")
            server.backend.delay_s = 0.0
        assert text(ask(server)) == server.backend.answer


def test_nothing_is_served_before_the_main_model_is_there() -> None:
    server = Server(loaded=False)
    server.ingress.add(FakeBackend(), name=SMALL).open(INFO, byte_level_text())
    with pytest.raises(Unavailable):
        server.ingress.model_of(SMALL)
