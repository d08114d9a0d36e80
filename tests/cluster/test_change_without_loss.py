"""A cluster changes under load: scaled down, replaced, a machine taken away, ingresses too. No request fails of it.

Every stream's text is the undisturbed one: fp32 and deterministic, so that a log that moved cannot be told from others.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.cluster.processes import adopting_orphans

from ..tiny import tiny_model
from .changes import Service, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = 1500  # tokens: more than a replica that leaves has time for
ASKED: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0, "max_tokens": LONG, "stream": True},
    {"prompt": "In 1969", "temperature": 0.9, "seed": 1, "max_tokens": LONG, "stream": True},
    {"prompt": "Water boils", "temperature": 0.8, "seed": 2, "max_tokens": LONG, "stream": True},
    {"prompt": "The largest oceans", "temperature": 0.7, "seed": 3, "max_tokens": LONG, "stream": False},
    {"prompt": "def f(n):", "temperature": 1.0, "seed": 4, "max_tokens": 40, "stream": True},
    {"prompt": "A list:", "temperature": 0.9, "seed": 5, "max_tokens": 40, "stream": False},
]


class Load:
    """Clients that ask again and again, each the same; `texts` are what they should be told."""

    def __init__(self, service: Service, texts: list[str]) -> None:
        import openai

        self.failures: list[str] = []
        self.num_answers = 0
        self._client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0)
        self._model = self._client.models.list().data[0].id
        self._texts = texts
        self._begun = [threading.Event() for _ in ASKED]  # its present request
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(len(texts))]

    def ask(self, index: int) -> str:
        """The text of one answer."""
        answer: Any = self._client.completions.create(
            model=self._model,
            extra_headers={"x-shoal-cache": "bypass"},
            extra_body={"ignore_eos": True},
            timeout=120,
            **ASKED[index],
        )
        if not ASKED[index]["stream"]:
            return str(answer.choices[0].text)
        text, end = "", None
        for chunk in answer:
            self._begun[index].set()
            for choice in chunk.choices:
                text, end = text + choice.text, choice.finish_reason or end
        return text if end == "length" else f"{text} and no end"

    def _run(self, index: int) -> None:
        while not self._stop.is_set():
            try:
                text = self.ask(index)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a request that failed)
                self.failures.append(f"{index}: {error!r:.500}")
                return
            self.num_answers += 1
            if text != self._texts[index]:
                self.failures.append(f"{index}: another text")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.await_streams()
        return self

    def await_streams(self) -> None:
        """Returns when every stream has got something since now."""
        streams = [begun for begun, asked in zip(self._begun, ASKED, strict=True) if asked["stream"]]
        for begun in streams:
            begun.clear()
        until(lambda: self.failures or all(begun.is_set() for begun in streams), 120.0)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive(), "a request has no end"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with adopting_orphans():  # whatever becomes of the script, nothing of its cluster is left
        folder = tmp_path_factory.mktemp("changing")
        server: dict[str, Any] = {
            "replicas": 2,
            "drain_timeout_s": 0.4,
            "notice": f"file:{folder}/{{node}}",
            "node_labels": {"shoal": "replica"},
            "ingress_node_labels": {"shoal": "ingress"},
        }
        model = str(tiny_model(tmp_path_factory.mktemp("model")))
        service = Service(folder, {"engine": {"model": model}, "server": server}, num_nodes=2)
        yield service
        service.close()


@pytest.fixture(scope="module")
def texts(service: Service) -> list[str]:
    """What the answers are if nothing happens."""
    quiet = Load(service, [])
    return [quiet.ask(i) for i in range(len(ASKED))]


def check(load: Load, service: Service) -> None:
    assert load.failures == []
    assert load.num_answers > len(ASKED)
    assert service.interrupted().keys() <= {"handed_over"}, "somebody took a planned end for a loss"


def await_hand_over(service: Service, before: Counter[str]) -> None:
    until(lambda: service.interrupted()["handed_over"] > before["handed_over"], 20.0)  # as ingresses tell


def test_scaled_down(service: Service, texts: list[str]) -> None:
    before = service.interrupted()
    with Load(service, texts) as load:
        service.deploy(server={"replicas": 1})
        until(lambda: len(service.actors("replicas")) == 1)
        load.await_streams()
    await_hand_over(service, before)
    check(load, service)


def test_replaced_by_one_with_another_option(service: Service, texts: list[str]) -> None:
    before, (old,) = service.interrupted(), service.actors("replicas")
    with Load(service, texts) as load:
        service.deploy(engine={"max_num_seqs": 12})
        until(lambda: old not in service.actors("replicas"))
        load.await_streams()
    await_hand_over(service, before)
    check(load, service)


def test_a_machine_is_taken_away(service: Service, texts: list[str]) -> None:
    ((old, node),) = service.actors("replicas").items()
    with Load(service, texts) as load:
        assert service.command(f"drain {node} 25") == "done"
        until(lambda: old not in service.actors("replicas"))
        ((new, elsewhere),) = service.actors("replicas").items()
        load.await_streams()
    check(load, service)  # whether anything ran there still when its replacement was ready is chance
    assert (new, elsewhere) != (old, node)
    assert elsewhere != node


def test_drain_node_waits_until_nothing_is_left_there(service: Service) -> None:
    """The node of the test before."""
    (node,) = {path.name for path in service.folder.iterdir() if len(path.name) == 56}
    told = json.loads(service.command(f"drain-node {node}"))
    assert told["code"] == 0
    assert told["seconds"] < 50, "it waited to the end"


def test_ingresses_scaled_down(service: Service, texts: list[str]) -> None:
    assert len(service.actors("ingresses")) == 2
    with Load(service, texts) as load:
        service.deploy(server={"ingresses": 1})
        until(lambda: len(service.actors("ingresses")) == 1)
        load.await_streams()
    assert load.failures == []
    assert load.num_answers > len(ASKED)


def test_an_ingress_ends_every_stream_in_its_time(service: Service) -> None:
    """One that is replaced, and a stream that would go on for longer than it may: an error and the end, no silence."""
    (patient,) = service.actors("ingresses")
    service.deploy(server={"ingress_drain_timeout_s": 2.0})
    until(lambda: patient not in service.actors("ingresses"))
    (old,) = service.actors("ingresses")
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=120)
    body = {**ASKED[0], "model": "", "max_tokens": 8000, "n": 4, "temperature": 1, "ignore_eos": True}
    body["model"] = json.loads(service.get("/v1/models"))["data"][0]["id"]
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    begun = [answer.readline() for _ in range(20)]
    assert answer.status == 200
    deploying = threading.Thread(target=service.deploy, kwargs={"router": {"max_messages": 100}}, daemon=True)
    deploying.start()
    events = [line for line in itertools.chain(begun, answer) if line.startswith(b"data: ")]
    deploying.join(120)
    until(lambda: old not in service.actors("ingresses"))
    assert events[-1].strip() == b"data: [DONE]"
    assert b"shutting down before the answer's end" in events[-2]
