"""The key: denied by default, on every route but two, however the request is dressed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from shoal.router.auth import Keys
from shoal.router.config import RouterConfig, TenantConfig
from shoal.router.store import NoStore, StoreDown
from shoal.router.tenant import Tenant
from shoal.router.tenants import NoVault, Seals, StoredKeys, digest_of, name_of, record_of
from shoal.runtime.errors import Unauthorized, Unavailable

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


def keys(*plain: str, secret: bytes = b"x", vault: Any = None, tenants: tuple[TenantConfig, ...] = ()) -> Keys:
    return Keys(RouterConfig(api_keys=plain, tenants=tenants), vault=vault or NoVault(), seals=Seals(secret))


def check(of: Keys, key: str | None) -> Tenant:
    return asyncio.run(of.check(None if key is None else f"Bearer {key}".encode()))


def test_tenants_depend_on_the_secret() -> None:
    assert check(keys(secret=b"a"), None) != check(keys(secret=b"b"), None)
    assert check(keys(secret=b"a"), None) == check(keys(secret=b"a"), "whatever")
    assert keys(secret=b"a").salt(b"ab", b"c") != keys(secret=b"a").salt(b"a", b"bc")


def test_a_key_is_found_by_a_name_that_only_the_secret_gives_and_confirmed_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    plain = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return plain(a, b)

    of = keys("a", "b", "c")
    monkeypatch.setattr("shoal.router.auth.hmac.compare_digest", compare)
    digest = hashlib.sha256(b"b").digest()
    assert check(of, "b").name == "key-2"
    assert compared == [(digest, digest)]
    assert digest not in of._known
    assert Seals(b"x").name(digest) != Seals(b"y").name(digest)


def test_a_tenants_keys_share_its_name_limits_and_salt() -> None:
    acme = TenantConfig(name="acme", keys=(digest_of("one"), digest_of("two")), weight=3, priority=-2)
    of = keys("plain", tenants=(acme,))
    one, two = check(of, "one"), check(of, "two")
    assert one == two
    assert (one.name, one.weight, one.priority) == ("acme", 3, -2)
    assert check(of, "plain").name == "key-1"
    assert check(of, "plain").salt != one.salt


def test_tenants_without_keys_do_not_open_the_door() -> None:
    with pytest.raises(Unauthorized):
        check(keys(tenants=(TenantConfig(name="acme"),)), None)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "two tenants have the name a"),
        ({"tenants": [{"name": n, "keys": [digest_of("k")]} for n in ("a", "b")]}, "both a and b"),
        ({"api_keys": ["k"], "tenants": [{"name": "b", "keys": [digest_of("k")]}]}, "both api_keys and b"),
        ({"tenants": [{"name": "key-1"}]}, "anonymous and key-1"),
        ({"tenants": [{"name": "anonymous"}]}, "anonymous and key-1"),
        ({"tenants": [{"name": "a b"}]}, "name"),
        ({"tenants": [{"name": "a", "keys": ["sk-plain"]}]}, "keys"),
        ({"tenants": [{"name": "a", "budget_s": float("inf")}]}, "finite"),
        ({"max_wait_s": float("inf")}, "finite"),
        ({"secret": ""}, "at least 32"),
    ],
)  # fmt: skip
def test_tenants_that_make_no_sense_are_refused_at_the_start(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        RouterConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("Basic abc", "not `Bearer KEY`"), ("Bearer", "no key behind"), ("Bearer  ", "no key behind"),
        ("Bearer a b", "a space in its key"), ("Bearer nobodys", "not one of this server's"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(server: Server, value: str, complaint: str) -> None:
    reply = server.get("/v1/models", authorization=value)
    assert reply.status == 401
    assert complaint in reply.json["error"]["message"]
    assert "nobodys" not in reply.body.decode()


class FakeStore(NoStore):
    """Redis as a dict."""

    available = True

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.is_down = False
        self.asked = 0

    async def get(self, key: bytes) -> bytes | None:
        self.asked += 1
        if self.is_down:
            raise StoreDown("down")
        return self.values.get(key)


class Stored:
    """Keys of a config beside keys of a store."""

    def __init__(self, *tenants: TenantConfig) -> None:
        self.now = 0.0
        self.store = FakeStore()
        self.seals = Seals(b"x")
        vault = StoredKeys(self.store, seals=self.seals, clock=lambda: self.now)
        self.keys = keys("plain", vault=vault, tenants=tenants)

    def put(self, key: str, tenant: TenantConfig, *, seals: Seals | None = None) -> bytes:
        name = name_of(key, self.seals)
        self.store.values[name] = (seals or self.seals).seal(name, record_of(tenant))
        return name

    def check(self, key: str) -> Tenant:
        return check(self.keys, key)


ACME = TenantConfig(name="acme", weight=2, requests_per_minute=60)


def test_a_stored_key_is_its_tenants() -> None:
    stored = Stored()
    stored.put("stored", ACME)
    tenant = stored.check("stored")
    assert (tenant.name, tenant.weight, tenant.requests_per_minute) == ("acme", 2, 60)
    assert tenant == check(keys("plain", tenants=(ACME.model_copy(update={"keys": (digest_of("k"),)}),)), "k")
    assert "stored" not in repr(stored.store.values)


def test_what_the_config_says_of_a_tenant_counts() -> None:
    stored = Stored(TenantConfig(name="acme", weight=9))
    stored.put("stored", ACME)
    assert stored.check("stored").weight == 9


def test_whoever_can_write_to_the_store_cannot_make_a_key() -> None:
    stored = Stored()
    name = stored.put("forged", ACME, seals=Seals(b"another secret"))
    other = stored.put("true", ACME)
    true = stored.store.values[other]
    tampered = true.replace(b'"weight":2', b'"weight":9')
    assert tampered != true
    for value in (stored.store.values[name], true, tampered, b"", b"x" * 40, true[:-1], b"x" * 10**6):
        stored.now += 100
        stored.store.values[name] = value
        with pytest.raises(Unauthorized):
            stored.check("forged")
    stored.store.values[other] = tampered
    with pytest.raises(Unauthorized):
        stored.check("true")


def test_answers_are_remembered_for_a_while() -> None:
    stored = Stored()
    name = stored.put("stored", ACME)
    for _ in range(3):
        stored.check("stored")
    assert stored.store.asked == 1
    del stored.store.values[name]
    stored.now += 31
    for _ in range(3):
        with pytest.raises(Unauthorized):
            stored.check("stored")
    assert stored.store.asked == 2
    stored.put("stored", ACME)
    stored.now += 6
    stored.check("stored")


def test_memory_is_bounded_and_guesses_crowd_out_nobody() -> None:
    stored = Stored()
    stored.put("stored", ACME)
    stored.check("stored")
    for guess in range(5000):
        with pytest.raises(Unauthorized):
            asyncio.run(_find(stored, guess))
    asked = stored.store.asked
    stored.check("stored")
    assert stored.store.asked == asked
    assert len(stored.keys._vault._unknown._entries) <= 4096  # type: ignore[attr-defined]


async def _find(stored: Stored, guess: int) -> None:
    if await stored.keys._vault.find(b"%d" % guess) is None:
        raise Unauthorized("nobody's")


def test_while_the_store_is_down_unknown_keys_are_neither_let_in_nor_called_wrong() -> None:
    stored = Stored()
    for key in ("stored", "unseen"):
        stored.put(key, ACME)
    stored.check("stored")
    stored.store.is_down = True
    assert stored.check("plain").name == "key-1"
    with pytest.raises(Unavailable) as refusal:
        stored.check("unseen")
    assert refusal.value.retry_after > 0
    stored.now += 1800
    assert stored.check("stored").name == "acme", "an outage of Redis has failed a request"
    stored.now += 3600
    with pytest.raises(Unavailable):
        stored.check("stored")
    stored.store.is_down = False
    assert stored.check("stored").name == "acme"


def test_no_outage_brings_a_deleted_key_back() -> None:
    stored = Stored()
    name = stored.put("stored", ACME)
    stored.check("stored")
    del stored.store.values[name]
    stored.now += 31
    with pytest.raises(Unauthorized):
        stored.check("stored")
    stored.store.is_down = True
    stored.now += 6
    with pytest.raises(Unavailable):
        stored.check("stored")


def test_keys_do_not_show() -> None:
    config = RouterConfig(api_keys=("sk-hidden",), secret="s3cret" * 6)
    assert "sk-hidden" not in repr(config)
    assert "s3cret" not in repr(config)
