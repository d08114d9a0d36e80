"""Autoscaling on a real Ray: a part goes to sleep, an answer wakes it, load brings a second replica, quiet takes it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from ..tiny import tiny_model
from .served import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIG = """\
autoscaling:
  min_replicas: 0
  max_replicas: 2
  ttft_s: 0.2
  scale_down_after_s: 2
  idle_s: 4
"""
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "2", "--kv-cache-memory-gb", "0.01"]
FLAGS += ["--redis-url", "none", "--max-model-len", "4096", "--no-haproxy", "--drain-timeout-s", "2"]
LONG_S = 120.0  # a loaded machine's replica is there by then
ASKED = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    (home / "shoal.yaml").write_text(CONFIG)
    model = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    server = Served(home, "--config", str(home / "shoal.yaml"), *FLAGS, model=model)
    yield server
    server.process.terminate()
    server.process.wait(60)


def ask(served: Served, **fields: Any) -> str:
    """The answer's text. Raises AssertionError: it is not whole."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=LONG_S)
    body = json.dumps({"model": served.model, **ASKED, **fields})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    reply = connection.getresponse()
    said = reply.read().decode()
    connection.close()
    assert reply.status == 200, said
    if not fields.get("stream"):
        return str(json.loads(said)["choices"][0]["text"])
    *events, end = [line[6:] for line in said.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def cluster(served: Served) -> Any:
    return json.load(served.get("/v1/cluster"))


def num_replicas(served: Served) -> int:
    return len([each for each in cluster(served)["replicas"] if not each["leaving"]])


def state(served: Served) -> str:
    return str(cluster(served)["variants"][0]["state"])


def decided(served: Served) -> Any:
    """What the policy says of stable; {} where nothing is known yet."""
    return cluster(served)["parts"][0]["autoscaling"] or {}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def test_to_zero_and_back_and_to_two_and_back(served: Served) -> None:
    wanted = ask(served, max_tokens=30)
    until(lambda: state(served) == "asleep")
    assert served.get("/ready").status == 200
    assert num_replicas(served) == 0
    until(lambda: decided(served).get("reason") == "idle")

    answers: list[str] = []
    asking = [
        threading.Thread(target=lambda streamed=streamed: answers.append(ask(served, max_tokens=30, stream=streamed)))
        for streamed in (True, False)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert answers == [wanted] * 2

    failures: list[BaseException] = []
    is_over = threading.Event()

    def keep_asking(number: int) -> None:
        try:
            while not is_over.is_set():
                ask(served, max_tokens=400, stream=True, prompt=f"{number}")
        except BaseException as error:  # noqa: BLE001 - the test's own thread asserts
            failures.append(error)

    load = [threading.Thread(target=keep_asking, args=(number,)) for number in range(16)]
    for thread in load:
        thread.start()
    try:
        until(lambda: num_replicas(served) == 2 or bool(failures))
        until(lambda: decided(served).get("target") == 2 or bool(failures))
        assert decided(served)["max_replicas"] == 2
        assert 'shoal_replicas_target{variant="stable"} 2.0' in served.get("/metrics").read().decode()
    finally:
        is_over.set()
        for thread in load:
            thread.join()
    assert failures == []
    until(lambda: num_replicas(served) < 2)
    until(lambda: state(served) == "asleep")
