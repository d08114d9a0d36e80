"""`/metrics` after mixed traffic: the counts are what was done, and no label is a client's to choose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from shoal.router.backend import ReplicaState
from shoal.router.config import RouterConfig
from shoal.router.metrics import RouterMetrics
from shoal.router.metrics_doc import document
from shoal.router.vllm_names import NAMES
from shoal.runtime.errors import RowFailed
from shoal.runtime.generation import GenerationRequest, TokenEvent
from shoal.runtime.stats import Stats

from .fakes import ANSWER, MODEL, Server, request_bytes, wait_for

ROOT = Path(__file__).parent.parent.parent
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY, PROMPT = "sesame-street", "zanzibar"
HEADERS = {"authorization": f"Bearer {KEY}"}


class Scraped:
    """One answer of /metrics, parsed."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of the name that have these labels."""
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())


def scrape(server: Server) -> Scraped:
    return Scraped(server.get("/metrics", **HEADERS).body.decode())


@pytest.fixture(scope="module")
def after() -> Iterator[tuple[Scraped, list[Any]]]:
    """(the scrape, the usages that clients were told) after some of everything."""
    with Server(RouterConfig(served_model_name=(MODEL,), api_keys=(KEY,))) as server:
        usages = list(traffic(server))
        wait_for(lambda: scrape(server).sum("shoal_clients_gone_total"), "the client's leave to be noticed")
        wait_for(lambda: scrape(server).sum("shoal_router_in_flight") == 0, "the end of all flights")
        yield scrape(server), usages


def traffic(server: Server) -> Iterator[Any]:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    for _ in range(3):
        yield server.post(CHAT, chat, **HEADERS).json["usage"]
    yield server.post(COMPLETIONS, {"model": MODEL, "prompt": [PROMPT, "b"], "n": 2, "max_tokens": 5}, **HEADERS).json[
        "usage"
    ]
    stream = chat | {"stream": True, "stream_options": {"include_usage": True}}
    yield server.post(CHAT, stream, **HEADERS).chunks[-1]["usage"]
    assert server.post(CHAT, chat, authorization="Bearer wrong").status == 401
    assert server.post(CHAT, chat | {"model": PROMPT}, **HEADERS).status == 404
    assert server.post(CHAT, chat | {"temperature": "warm"}, **HEADERS).status == 400
    assert server.get(f"/{PROMPT}", **HEADERS).status == 404

    def fail(request: GenerationRequest, i: int) -> None:
        if i == 3:
            raise RowFailed("a NaN in the logits")

    server.backend.before = fail
    assert b"a NaN" in server.post(CHAT, stream, **HEADERS).body
    server.backend.before = None
    server.backend.delay_s = 0.01
    with server.connect() as sock:
        sock.sendall(request_bytes("POST", CHAT, json.dumps(stream).encode(), **HEADERS))
        assert b"200" in sock.recv(100)


def test_counts_are_what_was_done(after: tuple[Scraped, list[Any]]) -> None:
    metrics, usages = after
    for route, status, number in (
        (CHAT, "200", 6),
        (COMPLETIONS, "200", 1),
        (CHAT, "404", 1),
        (CHAT, "400", 1),
        ("other", "401", 1),
        ("other", "404", 1),
    ):
        assert metrics.sum("shoal_http_responses_total", route=route, status=status) == number, (route, status)
    assert metrics.sum("shoal_stream_errors_total") == 1
    assert metrics.sum("shoal_clients_gone_total") == 1
    assert metrics.sum("shoal_e2e_request_latency_seconds_count") == 7
    assert metrics.sum("shoal_time_to_first_token_seconds_count") == 3 + 4 + 1 + 1 + 1
    assert metrics.sum("shoal_request_prompt_tokens_count") == 3 + 2 + 1 + 1 + 1
    chats = usages[0]["prompt_tokens"]
    assert metrics.sum("shoal_request_prompt_tokens_sum") == 6 * chats + usages[3]["prompt_tokens"]
    assert metrics.sum("shoal_request_generation_tokens_count") == 10
    for reason, number in (("stop", 4), ("length", 4), ("incomplete", 2)):
        assert metrics.sum("shoal_choices_finished_total", finished_reason=reason) == number, reason
    assert [usage["completion_tokens"] for usage in usages] == [len(ANSWER) + 1] * 3 + [20, len(ANSWER) + 1]


def test_lengths_and_gaps_add_up(after: tuple[Scraped, list[Any]]) -> None:
    """A choice of n tokens has n - 1 gaps, the interrupted ones too."""
    metrics, _ = after
    tokens = metrics.sum("shoal_request_generation_tokens_sum")
    choices = metrics.sum("shoal_request_generation_tokens_count")
    assert metrics.sum("shoal_inter_token_latency_seconds_count") == tokens - choices
    told = 4 * (len(ANSWER) + 1) + 20 + 3  # whole, cut to 5, failed at the fourth
    assert told + 1 <= tokens < told + len(ANSWER)  # and some of what the client did not wait for


def test_no_label_holds_what_a_client_wrote(after: tuple[Scraped, list[Any]]) -> None:
    values = {value for sample in after[0].samples for value in sample.labels.values()}
    assert {CHAT, "200", "other"} <= values
    assert not [value for value in values if PROMPT in value or KEY in value or "wrong" in value]


def test_every_metric_is_documented(after: tuple[Scraped, list[Any]]) -> None:
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    assert page == document(), "write it anew: python -m shoal.router.metrics_doc > docs/METRICS.md"
    for family in after[0].families.values():
        assert family.documentation, family.name
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"| `{name}` |" in page


def test_vllm_s_names_say_what_ours_say() -> None:
    metrics = RouterMetrics(vllm_model="m")
    choice: Any = SimpleNamespace(last_event=None, first_event=None)
    for _ in range(4):
        metrics.part("stable").landed(choice, TokenEvent(id="x", start=0, tokens=[1]), 0.0)
    stats = {"r1": Stats(num_running=3, generation_tokens=7, steps=1, num_blocks=4, num_blocks_held=1)}
    scraped = Scraped(rendered(metrics, stats).decode())
    for ours, names in NAMES.items():
        for name in names:
            copy, family = scraped.families[name], scraped.families[ours]
            assert copy.type == family.type
            assert [s.value for s in copy.samples] == [s.value for s in family.samples]
            assert all(s.labels["model_name"] == "m" and "replica" not in s.labels for s in copy.samples)
    assert scraped.sum("vllm:num_requests_running", engine="r1") == 3
    assert scraped.sum("vllm:kv_cache_usage_perc", engine="r1") == 0.25
    assert scraped.sum("vllm:generation_tokens_total") == 7
    assert scraped.sum("vllm:inter_token_latency_seconds_count") == 3
    assert scraped.sum("vllm:time_to_first_token_seconds_bucket", le="+Inf") == 1


def test_vllm_s_names_are_there_on_request_only() -> None:
    assert not [name for name in Scraped(rendered(RouterMetrics()).decode()).families if name.startswith("vllm")]


def test_replicas_as_they_stand_at_the_scrape() -> None:
    states = {"a": state(None, 0.1), "b": state("the engine is draining", 0.5)}
    metrics = RouterMetrics()
    metrics.watch(lambda: states)
    scraped = Scraped(rendered(metrics).decode())
    assert [scraped.sum("shoal_replica_ready", replica=replica) for replica in "ab"] == [1, 0]
    assert scraped.sum("shoal_replica_heard_seconds", replica="b") == 0.5
    del states["b"]
    assert "shoal_replica_ready" in (after := Scraped(rendered(metrics).decode())).families
    assert not [s for s in after.samples if s.labels.get("replica") == "b"]


def state(problem: str | None, heard_s: float) -> ReplicaState:
    return ReplicaState(problem=problem, stats=Stats(), ranks=[], in_flight=0, tokens_sent=0, heard_s=heard_s)


def rendered(metrics: RouterMetrics, stats: dict[str, Stats] | None = None) -> bytes:
    metrics.tell(stats or {})
    return metrics.text()
