"""A cluster of a test's own that changes while it serves: changing.py at work, and what it says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.preflight import free_port

from .changing import CONFIG

START_S = 150.0


class Service:
    """One such cluster, ready: two ingresses, in front of what `config` adds. port: where it answers.

    num_nodes: beside the head, for replicas.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, num_nodes: int = 0) -> None:
        self.is_up = False
        self.port = free_port("127.0.0.1", 0)
        self.folder = folder
        (folder / CONFIG).write_text(json.dumps(config_of(folder, self.port, config)))
        self._log = (folder / "log").open("w+")
        script = Path(__file__).parent / "changing.py"
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(folder), str(num_nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        timer = threading.Timer(START_S, self._give_up)
        timer.daemon = True
        timer.start()
        assert self._heard() == "ready"
        self.is_up = True

    def _give_up(self) -> None:
        """Nothing else ends a wait for a word that does not come."""
        if not self.is_up:
            self.process.kill()

    def command(self, line: str) -> str:
        """Returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._heard()

    def tell(self, **changes: dict[str, Any]) -> None:
        """Returns when Serve knows."""
        assert self.command(f"tell {json.dumps(changes)}") == "done"

    def deploy(self, **changes: dict[str, Any]) -> None:
        """Returns when the change is through."""
        assert self.command(f"deploy {json.dumps(changes)}") == "done"

    def actors(self, kind: str) -> dict[str, str]:
        """Processes of "replicas" or "ingresses", and their nodes."""
        found: dict[str, str] = json.loads(self.command(kind))
        return found

    def ingress_ports(self) -> list[int]:
        """Both ones' own, past the proxy that shares requests out. Serve leaves out who is just told of a change."""
        deadline = time.monotonic() + 30
        while len(ports := sorted(json.loads(self.command("ports")).values())) != 2:
            assert time.monotonic() < deadline, ports
            time.sleep(0.1)
        return ports

    def _heard(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("ready", "done", "{")):
                return line.strip()
        self._log.seek(0)
        pytest.fail(self._log.read()[-6000:])

    def get(self, path: str, *, port: int | None = None) -> str:
        """Of the ingress at that port of its own, or of any."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def sums(self, sample: str, label: str, **where: str) -> Counter[str]:
        """What all ingresses have counted of a metric's sample, by a label, where others are as said; no zeros."""
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.get("/metrics")):
            for one in family.samples:
                if one.name == sample and one.value and where.items() <= one.labels.items():
                    found[one.labels[label]] += int(one.value)
        return found

    def interrupted(self) -> Counter[str]:
        """Cause to generations, of all ingresses."""
        return self.sums("shoal_generations_interrupted_total", "cause")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._log.close()


def config_of(folder: Path, port: int, more: dict[str, Any]) -> dict[str, Any]:
    """Replicas that are small, and exact: fp32 and deterministic, so that a log that moved tells nobody."""
    secret = folder / "secret"
    secret.write_text("s" * 64)
    secret.chmod(0o600)
    tree: dict[str, dict[str, Any]] = {
        "router": {"secret_file": str(secret)},
        "server": {"redis_url": "none", "port": port, "ingresses": 2, "ingress_drain_timeout_s": 120.0},
        "engine": {
            "dtype": "float32",
            "device": "cpu",
            "deterministic": True,
            "num_threads": 1,
            "kv_cache_memory_gb": 0.05,
            "max_num_seqs": 16,
        },
    }
    sections = {name: {**tree[name], **more.get(name, {})} for name in tree}
    return {**more, **sections}


def until(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
