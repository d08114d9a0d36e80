"""The key: denied by default, on every route but two, however the request is dressed."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

import pytest

from shoal.router.auth import Keys
from shoal.router.config import RouterConfig
from shoal.runtime.errors import Unauthorized

from .fakes import MODEL, Server, request_bytes

KEY = "sk-first"
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":1}'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(RouterConfig(served_model_name=(MODEL,), api_keys=(KEY, "sk-second"))) as running:
        yield running


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_public_routes(server: Server, path: str) -> None:
    assert server.get(path).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/v1/models/tiny", "/version", "/metrics", "/docs", "/redoc", "/openapi.json", "/", "/nope",
        "/v1/cluster", "/health/", "//health", "/health/../v1/models", "/healthz", "/READY", "/v1/models?x=/health",
        "/v1/models#/health", "/%2fhealth", "/health%00", "/health;x", "/v1/models/..%2f..%2fhealth",
    ],
)  # fmt: skip
def test_every_other_path_wants_a_key(server: Server, path: str) -> None:
    reply = server.get(path)
    assert reply.status == 401
    assert reply.json["error"]["code"] == "missing_api_key"
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_posts_want_a_key_before_their_body_is_read(server: Server, path: str) -> None:
    assert server.post(path, b"not json").status == 401


@pytest.mark.parametrize(
    "value",
    [
        "", "Bearer", "Bearer ", "Bearer wrong", "Bearer sk-firs", "Bearer sk-first2", "Bearer SK-FIRST", "sk-first",
        "Basic sk-first", "Bearer sk-first, sk-second", "Bearer sk-first sk-first", "Bearersk-first", "Bearer \xff\xfe",
        "Bearer " + "a" * 5000,
    ],
)  # fmt: skip
def test_wrong_keys(server: Server, value: str) -> None:
    reply = server.get("/v1/models", authorization=value)
    assert reply.status == 401
    assert "sk-" not in reply.body.decode()


def test_dressing_up_does_not_help(server: Server) -> None:
    for header in ("host", "x-forwarded-prefix", "x-original-url", "x-rewrite-url", "referer"):
        assert server.get("/v1/models", **{header: "/health"}).status == 401
    assert server.raw(b"GET http://127.0.0.1/health/../v1/models HTTP/1.1\r\nhost: x\r\n\r\n").status in (400, 401, 404)
    two = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer no\r\nauthorization: Bearer sk-first\r\n\r\n"
    assert server.raw(two).status == 401


@pytest.mark.parametrize("value", ["Bearer sk-first", "Bearer sk-second", "bearer sk-first", "Bearer  sk-first"])
def test_right_keys(server: Server, value: str) -> None:
    assert server.get("/v1/models", authorization=value).status == 200
    assert server.raw(request_bytes("POST", "/v1/chat/completions", CHAT, authorization=value)).status == 200


def test_each_key_is_a_tenant_of_its_own(server: Server) -> None:
    server.backend.requests.clear()
    for key in ("sk-first", "sk-first", "sk-second"):
        server.raw(request_bytes("POST", "/v1/chat/completions", CHAT, authorization=f"Bearer {key}"))
    one, same, other = [request.tenant for request in server.backend.requests]
    assert one == same != other
    assert KEY not in one


def test_tenants_depend_on_the_secret() -> None:
    assert Keys([], secret=b"a").check(None) != Keys([], secret=b"b").check(None)
    assert Keys([], secret=b"a").check(None) == Keys([], secret=b"a").check(b"Bearer whatever")
    assert Keys([], secret=b"a").salt(b"ab", b"c") != Keys([], secret=b"a").salt(b"a", b"bc")


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    plain = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return plain(a, b)

    monkeypatch.setattr("shoal.router.auth.hmac.compare_digest", compare)
    keys = Keys(["a", "b", "c"], secret=b"x")
    keys.check(b"Bearer a")
    assert len(compared) == 3
    with pytest.raises(Unauthorized):
        keys.check(b"Bearer d")
    assert len(compared) == 6


def test_keys_do_not_show() -> None:
    config = RouterConfig(api_keys=("sk-hidden",), secret="s3cret")
    assert "sk-hidden" not in repr(config)
    assert "s3cret" not in repr(config)
