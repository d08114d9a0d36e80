"""Several ingresses, any of which may be asked, or die: one truth, and no total that ever falls."""

from __future__ import annotations

import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.router.last_words import FORGOTTEN, GRACE_S, LastWords, Word
from shoal.router.metrics import RouterMetrics
from shoal.runtime.stats import Stats

Key = tuple[str, frozenset[tuple[str, str]]]


class Fleet:
    """Ingresses on one clock. `scrape` asks one of them, which exchanges words with the others."""

    def __init__(self, *ids: str) -> None:
        self.clock = 1_000_000.0
        self.replicas: dict[str, Stats] = {}
        self.ingresses: dict[str, RouterMetrics] = {}
        for id in ids:
            self.start(id)

    def start(self, id: str) -> None:
        self.ingresses[id] = RouterMetrics(ingress=id, now=lambda: self.clock)

    def scrape(self, id: str, hung: str = "") -> dict[Key, float]:
        asked, others = self.ingresses[id], [o for i, o in self.ingresses.items() if i not in (id, hung)]
        told = asked.tell(self.replicas)
        answers = []
        for other in others:
            other.hear(told)
            answers.append(other.tell(self.replicas))
        families = text_string_to_metric_families(asked.text(answers).decode())
        return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def total(scraped: dict[Key, float], name: str, **labels: str) -> float:
    return sum(value for (found, of), value in scraped.items() if found == name and labels.items() <= dict(of).items())


def test_any_of_them_answers_for_all() -> None:
    fleet = Fleet("a", "b")
    fleet.ingresses["a"].answered("/x", 200)
    fleet.ingresses["b"].answered("/x", 200)
    fleet.ingresses["b"].answered("/x", 500)
    fleet.ingresses["b"].part("stable").e2e.observe(0.3)
    for id in "ab":
        scraped = fleet.scrape(id)
        assert total(scraped, "shoal_http_responses_total") == 3
        assert total(scraped, "shoal_http_responses_total", ingress="b", status="500") == 1
        assert total(scraped, "shoal_e2e_request_latency_seconds_bucket", le="0.5") == 1
        assert {dict(of)["ingress"] for name, of in scraped if name == "shoal_router_in_flight"} == {"a", "b"}


def test_the_dead_are_remembered_by_whoever_comes_later() -> None:
    fleet = Fleet("a", "b")
    fleet.ingresses["b"].answered("/x", 200)
    fleet.replicas = {"r1": Stats(steps=1, generation_tokens=7, finished={"stop": 2})}
    fleet.scrape("b")
    del fleet.ingresses["b"]
    fleet.replicas = {}
    late = fleet.scrape("a")
    assert total(late, "shoal_http_responses_total", ingress="b") == 1
    assert not total(late, "shoal_router_in_flight", ingress="b")
    fleet.start("c")
    fleet.scrape("a")
    del fleet.ingresses["a"]
    fleet.clock += GRACE_S + 1
    gone = fleet.scrape("c")
    assert total(gone, "shoal_http_responses_total", ingress="departed", status="200") == 1
    assert total(gone, "shoal_http_responses_total") == 1
    assert total(gone, "shoal_generation_tokens_total", replica="departed") == 7
    assert total(gone, "shoal_request_success_total") == 2


def test_one_that_hangs_keeps_its_totals_and_loses_its_gauges() -> None:
    fleet = Fleet("a", "b")
    fleet.ingresses["b"].answered("/x", 200)
    fleet.scrape("a")
    scraped = fleet.scrape("a", hung="b")
    assert total(scraped, "shoal_http_responses_total", ingress="b") == 1
    assert not [of for name, of in scraped if name == "shoal_router_in_flight" and ("ingress", "b") in of]


@pytest.mark.parametrize("seed", range(4))
def test_no_total_ever_falls(seed: int) -> None:
    """Deaths, births and hours of silence: as long as somebody lives who was there, the next scrape shows no less."""
    rng = random.Random(seed)
    fleet = Fleet("i0", "i1")
    born, before, done = 2, 0.0, 0
    witnesses = set(fleet.ingresses)
    for _ in range(40):
        fleet.clock += rng.choice([0, 1, 15, GRACE_S + 1])
        for _ in range(rng.randrange(4)):
            rng.choice(list(fleet.ingresses.values())).answered("/x", 200)
            done += 1
        victim = rng.choice(list(fleet.ingresses))
        if rng.random() < 0.4 and witnesses - {victim}:
            del fleet.ingresses[victim]
            witnesses.discard(victim)
        if rng.random() < 0.4:
            fleet.start(f"i{born}")
            born += 1
        if rng.random() < 0.5:
            now = total(fleet.scrape(rng.choice(list(fleet.ingresses))), "shoal_http_responses_total")
            assert before <= now <= done
            before, witnesses = now, set(fleet.ingresses)
    assert before


def test_what_is_not_understood_is_left_out() -> None:
    metrics = RouterMetrics(ingress="a")
    metrics.answered("/x", 200)
    metrics.tell({})
    assert b'status="200"} 1.0' in metrics.text([b"", b"\xc1", b"\x93\x01\x02\x03"])


def test_totals_of_many_dead_are_known_to_whoever_comes_later() -> None:
    """More of them than are remembered one by one."""
    fleet = Fleet("old")
    fleet.replicas = {f"r{i}": Stats(steps=1, generation_tokens=2, finished={"stop": 1}) for i in range(300)}
    for number in range(36):
        fleet.start(f"i{number}")
        fleet.ingresses[f"i{number}"].answered("/x", 200)
        fleet.ingresses[f"i{number}"].part("stable").e2e.observe(0.3)
        fleet.scrape("old")
        del fleet.ingresses[f"i{number}"]
        fleet.replicas = {}
        fleet.clock += GRACE_S + 1
    fleet.start("young")
    told = len(fleet.ingresses["old"].tell({}))
    fleet.scrape("young")
    del fleet.ingresses["old"]
    scraped = fleet.scrape("young")
    assert total(scraped, "shoal_http_responses_total", route="/x") == 36
    assert total(scraped, "shoal_e2e_request_latency_seconds_bucket", le="0.5") == 36
    assert total(scraped, "shoal_generation_tokens_total") == 600
    assert total(scraped, "shoal_request_success_total") == 300
    assert len(fleet.ingresses["young"].tell({})) < 2 * told


def test_last_words() -> None:
    clock = 1000.0
    words: LastWords[str] = LastWords(keep=1, add=str.__add__, now=lambda: clock)
    words.say("a", "a1")
    words.hear({"a": Word(999.0, "a0"), "b": Word(500.0, "b"), "c": Word(600.0, "c")})
    assert words.recent() == {"a": "a1"}  # the newer one counts
    assert words.departed() == ["c", "b"]
    words.hear({"b": Word(500.0, "b")})  # somebody else has not forgotten it yet
    assert words.words == {"a": Word(1000.0, "a1"), "c": Word(600.0, "c"), FORGOTTEN: Word(500.0, "b")}
    words.hear({FORGOTTEN: Word(400.0, "z")})  # nor so many
    late: LastWords[str] = LastWords(keep=1, add=str.__add__, now=lambda: clock)
    late.hear({"b": Word(500.0, "b")})
    late.hear(words.words)
    assert late.words == words.words
    words.hear({"c": Word(900.0, "c2")})  # it was only late
    assert words.recent() == {"a": "a1", "c": "c2"}
