"""Two replicas behind a real `shoal serve`: one is killed or stopped in mid-stream, and no client sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.processes import adopting_orphans

from .served import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 24
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 5, "structured_outputs": {"regex": "[a-z ]{60,90}"}},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.9, "seed": 6, "n": 2},
]
PROMPTS = ("Once upon a time", "The largest oceans are", "def f(n):", "A list:", "Water boils", "In 1969", "My", "Why")


class Server(Served):
    """`shoal serve` with two replicas."""

    def __init__(self, home: Path) -> None:
        numbers = ("--max-model-len", "256", "--max-num-seqs", "64", "--replicas", "2")
        super().__init__(home, *numbers, "--deterministic", "--dtype", "float32")

    def text(self, path: str) -> str:
        with self.get(path) as answer:
            return str(answer.read().decode())

    def replicas(self) -> dict[int, bool]:
        """The process of each replica that is connected, and whether it takes work."""
        shown = json.loads(self.text("/v1/cluster"))["replicas"]
        return {replica["ranks"][0]["pid"]: replica["ready"] for replica in shown if replica["ranks"]}

    def await_two(self) -> set[int]:
        """The processes of two replicas that take work."""
        until(lambda: sum(self.replicas().values()) == 2, 90)
        return set(self.replicas())

    def counted(self, name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}[^ ]* (\S+)$", self.text("/metrics"), re.MULTILINE))


class Reader(threading.Thread):
    """One client of one stream. answer: of each choice text, log-probabilities and end, or what went wrong."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.num_chunks = 0
        self.answer: dict[int, list[Any]] = {}
        self.failure: str | None = "the stream just stopped"
        data = json.dumps({"model": server.model, "stream": True, **body}).encode()
        headers = {"content-type": "application/json", "x-shoal-cache": "bypass"}
        self._request = urllib.request.Request(server.url + "/v1/completions", data, headers)

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=120) as answer:
                for line in answer:
                    self._read(line.decode().strip())
        except OSError as error:
            self.failure = repr(error)

    def _read(self, line: str) -> None:
        if line == "data: [DONE]":
            self.failure = None if self.failure == "the stream just stopped" else self.failure
        elif line.startswith("data: "):
            self.num_chunks += 1
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.failure = line
            for choice in chunk.get("choices", ()):
                text, scores, _ = self.answer.get(choice["index"], ["", [], None])
                scores = scores + (choice.get("logprobs") or {}).get("token_logprobs", [])
                self.answer[choice["index"]] = [text + choice["text"], scores, choice["finish_reason"]]


def bodies(num: int, num_tokens: int = NUM_TOKENS) -> list[dict[str, Any]]:
    return [
        {"prompt": PROMPTS[i % len(PROMPTS)] + " " * (i // 8), "max_tokens": num_tokens, **KINDS[i % len(KINDS)]}
        for i in range(num)
    ]


def start(server: Server, asked: list[dict[str, Any]]) -> list[Reader]:
    readers = [Reader(server, body) for body in asked]
    for reader in readers:
        reader.start()
    return readers


def answers(readers: list[Reader]) -> list[dict[int, list[Any]]]:
    for reader in readers:
        reader.join(150)
    assert [reader.failure for reader in readers if reader.failure] == []
    return [reader.answer for reader in readers]


def until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with adopting_orphans():
        server = Server(tmp_path_factory.mktemp("resume"))
        server.await_two()
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.said()


def test_fifty_streams_outlive_a_replica(server: Server) -> None:
    asked = bodies(50)
    undisturbed = answers(start(server, asked))
    readers = start(server, asked)
    until(lambda: sum(reader.num_chunks for reader in readers) > 50 * NUM_TOKENS // 3, 60)
    victim = next(iter(server.await_two()))
    os.kill(victim, signal.SIGKILL)
    assert answers(readers) == undisturbed
    assert server.counted("shoal_generations_resumed_total") >= 10
    assert victim not in server.await_two()


def test_a_stopped_replica_is_replaced_and_its_streams_go_on(server: Server) -> None:
    asked = bodies(4, 120)
    undisturbed = answers(start(server, asked))
    resumed = server.counted("shoal_generations_resumed_total")
    victims = server.await_two()
    readers = start(server, asked)
    until(lambda: min(reader.num_chunks for reader in readers) > 5, 60)
    victim = victims.pop()
    os.kill(victim, signal.SIGSTOP)
    try:
        assert answers(readers) == undisturbed
        assert server.counted("shoal_generations_resumed_total") > resumed
        until(lambda: gone(victim), 30)
    finally:
        if not gone(victim):
            os.kill(victim, signal.SIGCONT)
    assert victim not in server.await_two()
