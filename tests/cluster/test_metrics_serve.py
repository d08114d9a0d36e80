"""Two ingresses of a real `shoal serve`: `/metrics` is one truth, on both ports, whoever answers and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.processes import descendants

from .served import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_REQUESTS = 12


class Server(Served):
    """One running `shoal serve` with two ingresses."""

    def __init__(self, home: Path) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as sock:
            self.metrics_port: int = sock.getsockname()[1]
        ports = ("--metrics-port", str(self.metrics_port), "--log-format", "json")
        super().__init__(home, "--max-model-len", "512", "--ingresses", "2", *ports)

    def complete(self) -> None:
        body = {"model": self.model, "prompt": "Once", "max_tokens": 2, "temperature": 0}
        head = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200

    def scrape(self, url: str) -> dict[str, float]:
        """Answered completions as each ingress counted them."""
        with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return {
            s.labels["ingress"]: s.value
            for s in samples
            if s.name == "shoal_http_responses_total" and s.labels["route"] == "/v1/completions"
        }

    def ingresses(self) -> list[int]:
        found = []
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                if b":ingress" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("home"))
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(timeout=60)


def test_one_truth(server: Server) -> None:
    for _ in range(NUM_REQUESTS):
        server.complete()
    own = f"http://127.0.0.1:{server.metrics_port}"
    seen = [server.scrape(url) for url in (server.url, own) * 4]
    assert {sum(counts.values()) for counts in seen} == {NUM_REQUESTS}, seen
    assert all(counts == seen[0] for counts in seen)

    victims = server.ingresses()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    totals = []
    while len(totals) < 20 or len(server.ingresses()) < 2:
        assert time.monotonic() < deadline
        for url in (server.url, own):
            with suppress(urllib.error.URLError, ConnectionError):
                totals.append(sum(server.scrape(url).values()))
        time.sleep(0.2)
    assert set(totals) == {NUM_REQUESTS}, totals
    server.complete()
    assert sum(server.scrape(own).values()) == NUM_REQUESTS + 1
