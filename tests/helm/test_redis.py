"""The bundled Redis, started here by the command that its pod runs."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from shoal.cluster.preflight import free_port

from .chart import case, needs_helm, of_kind

SERVER = shutil.which("redis-server")
pytestmark = [needs_helm, pytest.mark.skipif(SERVER is None, reason="there is no redis-server on the PATH")]


@contextmanager
def running(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """How to connect to it, without a password."""
    found = case(name)
    (config,) = [m for m in of_kind(found, "ConfigMap") if m["metadata"]["name"].endswith("-redis")]
    secrets = {key: base64.b64decode(value) for s in of_kind(found, "Secret") for key, value in s["data"].items()}
    port = free_port("127.0.0.1", 0)
    places = {"/etc/redis": f"{folder}/etc", "/data": f"{folder}/data", "6379": str(port)}
    text, command = config["data"]["redis.conf"], ""
    (pod,) = [each["spec"]["template"]["spec"] for each in of_kind(found, "StatefulSet")]
    command = pod["containers"][0]["args"][0]
    for old, new in places.items():
        text, command = text.replace(old, new), command.replace(old, new)
    for sub in ("etc/auth", "etc/tls", "data"):
        (folder / sub).mkdir(parents=True)
    plain = "" if "tls-port" in text else f"port {port}\n"
    (folder / "etc" / "redis.conf").write_text(f"bind 127.0.0.1\n{plain}{text}")
    (folder / "etc" / "auth" / "password").write_bytes(secrets["redis-password"])
    for file in ("ca.crt", "tls.crt", "tls.key"):
        (folder / "etc" / "tls" / file).write_bytes(secrets.get(file, b""))
    server = subprocess.Popen(["/bin/sh", "-ec", command], stdout=subprocess.DEVNULL)
    tls = {} if plain else {"ssl": True, "ssl_ca_certs": f"{folder}/etc/tls/ca.crt"}
    try:
        yield {"host": "localhost", "port": port, "password": secrets["redis-password"].decode(), **tls}
    finally:
        server.terminate()
        server.wait(30)


def await_answer(client: redis.Redis) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            client.ping()
            return
        except redis.AuthenticationError:
            raise
        except redis.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("name", ["defaults", "redis-tls"])
def test_it_starts_and_wants_its_password(name: str, tmp_path: Path) -> None:
    with running(name, tmp_path) as where:
        client = redis.Redis(**where)
        await_answer(client)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
        assert client.config_get("appendonly") == {"appendonly": "yes" if name == "defaults" else "no"}
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(**{**where, "password": "no"}).ping()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(**{**where, "password": None}).ping()
