"""Before there is a model the ingress answers all the same, and goes over to serving without a restart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.router.config import RouterConfig

from .fakes import MODEL, Server, read_reply, request_bytes

KEY = "Bearer sesame"
HI = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CONFIG = RouterConfig(served_model_name=(MODEL,), api_keys=("sesame",))


@pytest.fixture(scope="module")
def loading() -> Iterator[Server]:
    with Server(CONFIG, loaded=False) as server:
        yield server


def test_alive_while_loading(loading: Server) -> None:
    assert loading.get("/health").status == 200


@pytest.mark.parametrize("path", ["/ready", "/v1/models", f"/v1/models/{MODEL}", "/metrics", "/version", "/docs", "/x"])
def test_all_else_is_to_come_back(loading: Server, path: str) -> None:
    reply = loading.get(path, authorization=KEY)
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json["error"] == {
        "message": "not ready: the replica is still loading",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_bodies_are_not_looked_at(loading: Server, path: str) -> None:
    assert loading.post(path, b"{", authorization=KEY).status == 503
    assert loading.backend.requests == []


def test_the_key_is_asked_for_first(loading: Server) -> None:
    assert loading.get("/v1/models").status == 401
    assert loading.post("/v1/chat/completions", HI, authorization="Bearer wrong").status == 401


def test_serves_as_soon_as_it_is_open(loading: Server) -> None:
    """Keep last: it opens the server."""
    with loading.connect() as sock:  # one connection throughout: nothing is started anew
        for status in (503, 200):
            sock.sendall(request_bytes("GET", "/ready", None))
            assert read_reply(sock).status == status
            loading.open()
    assert loading.post("/v1/chat/completions", HI, authorization=KEY).status == 200
