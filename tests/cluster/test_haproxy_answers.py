"""HAProxy's own answers, by the real HAProxy over a config like the one that Serve makes."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from shoal.cluster.ray_env import write_launcher

CONFIG = """\
defaults
    mode http
    option abortonclose
    timeout client 3600s
    timeout connect 1s
    timeout server 60s
    errorfile 502 /nowhere/500.http
    errorfile 503 /nowhere/500.http
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend app
backend app
    server ingress 127.0.0.1:{ingress}
"""


@pytest.fixture
def ingress() -> Iterator[socket.socket]:
    """Where HAProxy thinks that an ingress is."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


@pytest.fixture
def port(tmp_path: Path, ingress: socket.socket) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port, ingress=ingress.getsockname()[1]))
    launcher = write_launcher(tmp_path)
    for _ in range(2):  # Serve writes it once and starts it again and again
        subprocess.run([launcher, "-c", "-f", config], check=True, capture_output=True)
    with subprocess.Popen([launcher, "-db", "-f", config]) as process:
        try:
            _wait_for(port)
            yield port
        finally:
            process.kill()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "HAProxy did not start"
            time.sleep(0.02)


def answer(client: socket.socket) -> HTTPResponse:
    response = HTTPResponse(client)
    response.begin()
    return response


def test_who_half_closes_is_told_so(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        response = answer(client)
        assert (response.status, response.getheader("content-type")) == (400, "application/json")
        error = json.loads(response.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "connection_closed")


def test_an_ingress_that_ends_before_it_answers_is_a_503_to_be_sent_again(port: int, ingress: socket.socket) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        ingress.accept()[0].close()
        response = answer(client)
        error = json.loads(response.read())["error"]
    assert (response.status, error["type"], error["code"]) == (503, "server_error", "unavailable")
    assert (response.getheader("retry-after"), response.getheader("x-should-retry")) == ("1", "true")


def test_where_no_ingress_listens_it_is_a_503_too(port: int, ingress: socket.socket) -> None:
    ingress.close()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        response = answer(client)
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "unavailable")


def test_headers_do_not_take_for_ever(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("defaults\n    mode http\n")
    subprocess.run([write_launcher(tmp_path), "-c", "-f", config], capture_output=True, check=False)
    assert config.read_text().count("    timeout http-request 30s\n") == 1
