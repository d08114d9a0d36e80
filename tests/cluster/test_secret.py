"""The cluster's secret: made once, for its owner alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.cluster.secret import LENGTH, cluster_secret
from shoal.runtime.errors import ConfigError


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
