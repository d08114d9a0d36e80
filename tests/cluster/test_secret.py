"""The cluster's secret: made once, for its owner alone. And what a cluster's config has files for."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.cluster.secret import LENGTH, cluster_secret, secret_of, with_secrets
from shoal.router.auth import keys_of
from shoal.router.config import RouterConfig, digest_of
from shoal.runtime.errors import ConfigError, Unauthorized


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "secret"
    secret = cluster_secret(file)
    assert len(secret) == 2 * LENGTH
    assert file.stat().st_mode & 0o777 == 0o600
    assert cluster_secret(file) == secret
    assert cluster_secret(tmp_path / "other") != secret


def test_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x" * 64)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        cluster_secret(file)
    file.chmod(0o600)
    assert cluster_secret(file) == "x" * 64
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="5 characters; at least 32"):
        cluster_secret(file)
    with pytest.raises(ConfigError, match=r"router\.secret"):
        cluster_secret(file / "below")


def test_two_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for i in range(20):
            file = tmp_path / str(i) / "secret"
            assert len(set(pool.map(cluster_secret, [file] * 4))) == 1


def test_a_cluster_s_secrets_come_from_files(tmp_path: Path) -> None:
    secret, keys = tmp_path / "secret", tmp_path / "keys"
    router = RouterConfig.model_validate({"secret_file": secret, "api_key_file": keys, "api_keys": ["first"]})
    with pytest.raises(ConfigError, match=r"router.secret_file .*secret: No such file.*every node"):
        with_secrets(router)
    secret.write_text("s" * 20)
    with pytest.raises(ConfigError, match="20 characters; at least 32"):
        with_secrets(router)
    secret.write_text("s" * 32 + "\n")
    keys.write_text("second\n\nnot a key\n")
    with pytest.raises(ConfigError, match="line 3") as refused:
        with_secrets(router)
    assert "not a key" not in str(refused.value)
    keys.write_text(f"second\n{digest_of('third')}\n")
    known = with_secrets(router)
    assert known.secret == "s" * 32
    assert known.api_keys == ("first", "second", digest_of("third"))
    assert secret_of(router) == b"s" * 32


def test_a_digest_opens_for_its_key() -> None:
    config = RouterConfig.model_validate({"secret": "s" * 32, "api_keys": [digest_of("the-key")]})
    keys = keys_of(config)
    assert asyncio.run(keys.check(b"Bearer the-key")).name == "key-1"
    with pytest.raises(Unauthorized):
        asyncio.run(keys.check(f"Bearer {digest_of('the-key')}".encode()))
