"""`shoal keys`: what it prints is what a config takes, and what it stores is what a server finds."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cluster import keys
from shoal.cluster.cli import app
from shoal.router.auth import Keys
from shoal.router.config import RouterConfig
from shoal.router.store import NoStore
from shoal.router.tenants import NoVault, Seals, StoredKeys
from shoal.runtime.errors import ConfigError, Unauthorized

from ..redis_servers import RedisServer, needs_redis

SECRET = b"s" * 32


class Redis(NoStore):
    """What `shoal keys` writes, a server reads."""

    available = True

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    async def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    async def write(self, url: str, name: bytes, value: bytes | None, ttl_s: float) -> None:
        assert url == "redis://here"
        if value is None:
            self.values.pop(name, None)
        else:
            assert ttl_s == 86_400 * 7
            self.values[name] = value


def whose(key: str, of: Keys) -> str:
    return asyncio.run(of.check(b"Bearer " + key.encode())).name


def test_a_new_key_opens_the_server_that_has_its_line() -> None:
    result = CliRunner().invoke(app, ["keys", "new", "--tenant", "acme", "--weight", "2", "--token-budget", "500"])
    assert result.exit_code == 0
    key = result.stdout.strip()
    assert len(key) > 40
    _, line = result.stderr.strip().split("\n")
    assert key not in line
    config = RouterConfig.model_validate({"tenants": yaml.safe_load(line)})
    of = Keys(config, vault=NoVault(), seals=Seals(SECRET))
    assert whose(key, of) == "acme"
    assert (config.tenants[0].weight, config.tenants[0].token_budget) == (2, 500)
    assert keys.new_key() != keys.new_key()


def test_a_stored_key_opens_servers_that_know_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    redis, key = Redis(), keys.new_key()
    monkeypatch.setattr(keys, "_set", redis.write)
    tenant = keys.tenant_config({"name": "acme", "weight": None, "requests_per_minute": 5})
    keys.put_key("redis://here", key, tenant, secret=SECRET, days=7)
    config = RouterConfig(api_keys=("other",))

    def server(secret: bytes) -> Keys:
        seals = Seals(secret)
        return Keys(config, vault=StoredKeys(redis, seals=seals, clock=lambda: 0.0), seals=seals)

    assert whose(key, server(SECRET)) == "acme"
    with pytest.raises(Unauthorized):
        whose(key, server(b"x" * 32))
    stored = b"".join([*redis.values, *redis.values.values()])
    assert key.encode() not in stored
    assert hashlib.sha256(key.encode()).digest() not in stored
    keys.delete_key("redis://here", key, secret=SECRET)
    with pytest.raises(Unauthorized):
        whose(key, server(SECRET))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="name"):
        keys.tenant_config({"name": "a b"})
    with pytest.raises(ConfigError, match="weight"):
        keys.tenant_config({"name": "a", "weight": 0})


@pytest.mark.parametrize("key", ["", "of several words", "ключ-от-всех-дверей"])
def test_a_key_that_no_header_carries_is_not_stored(key: str) -> None:
    with pytest.raises(ConfigError, match="neither spaces nor"):
        keys.put_key("redis://here", key, keys.tenant_config({"name": "acme"}), secret=SECRET, days=7)


@needs_redis
def test_a_key_that_is_not_there_is_not_called_deleted(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        key, acme = keys.new_key(), keys.tenant_config({"name": "acme"})
        keys.put_key(server.url, key, acme, secret=SECRET, days=7)
        with pytest.raises(ConfigError, match="no such key"):
            keys.delete_key(server.url, key + "x", secret=SECRET)
        keys.delete_key(server.url, key, secret=SECRET)
        with pytest.raises(ConfigError, match="no such key"):
            keys.delete_key(server.url, key, secret=SECRET)
