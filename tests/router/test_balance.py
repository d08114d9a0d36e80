"""Which replica is chosen, and why: by cached prefix against load, on values alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from shoal.router.backend import ReplicaState
from shoal.router.balance import (
    NOISE,
    AnyReplica,
    Balancer,
    LeastLoaded,
    PowerOfTwo,
    PrefixAffinity,
    RoundRobin,
    cost,
    select_balancer,
)
from shoal.router.ledger import Ledger
from shoal.router.meters import RoutingMeter
from shoal.router.prefix_index import PrefixIndex
from shoal.runtime.blocks import Changes
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.stats import Stats

SIZE = 32
NONE: frozenset[str] = frozenset()


def request(num_tokens: int = 1000, *, first: int = 1, tokens: int = 0) -> GenerationRequest:
    """Two with the same `first` share all that the shorter has."""
    log = [first, *range(num_tokens - 1)]
    return GenerationRequest(
        id="a", prompt=log[: num_tokens - tokens], tokens=log[num_tokens - tokens :], params=SamplingParams(), seed=1
    )


class Replicas:
    """What an ingress knows of its replicas: their last word, and its own ledgers beside it."""

    def __init__(self, *names: str) -> None:
        self.index = PrefixIndex(secret=b"s")
        self.problems: dict[str, str] = {}
        self.stats = dict.fromkeys(names, Stats())
        self.ledgers = {name: Ledger(name, self.index) for name in names}
        self.num_sent = 0
        for name in names:
            self.index.join(name, block_size=SIZE)

    def __call__(self) -> dict[str, ReplicaState]:
        return {
            name: ReplicaState(
                problem=self.problems.get(name),
                stats=self.stats[name],
                ranks=[],
                in_flight=0,
                num_sent=ledger.num_sent,
                tokens_sent=ledger.tokens_sent,
                prefill_sent=ledger.prefill_sent,
                num_ended=ledger.num_ended,
                prefill_answered=ledger.prefill_answered,
                prefill_unanswered=ledger.prefill_unanswered,
            )
            for name, ledger in self.ledgers.items()
        }

    def caches(self, name: str, log: GenerationRequest) -> None:
        names = self.index.names(log)
        count = (len(log.prompt) + len(log.tokens)) // SIZE
        self.index.hear(name, Changes(False, b"".join(names[i][:8] for i in range(count)), b""))

    def send(self, name: str | None, log: GenerationRequest) -> None:
        assert name is not None
        self.num_sent += 1
        self.ledgers[name].sent(self.num_sent, log)


def affinity(replicas: Replicas, *, seed: int = 1, **options: Any) -> PrefixAffinity:
    return PrefixAffinity(replicas, replicas.index, rng=random.Random(seed), **options)


BALANCERS: list[Callable[[Replicas], Balancer]] = [
    RoundRobin,
    lambda replicas: LeastLoaded(replicas, rng=random.Random(1)),
    lambda replicas: PowerOfTwo(replicas, rng=random.Random(1)),
    affinity,
]


@pytest.mark.parametrize("build", BALANCERS)
def test_who_has_a_problem_or_failed_this_log_is_left_out(build: Callable[[Replicas], Balancer]) -> None:
    replicas = Replicas("r1", "r2", "r3", "r4")
    balancer = build(replicas)
    replicas.caches("r1", request())
    replicas.caches("r2", request())
    replicas.problems["r1"] = "the engine is draining"
    chosen = {balancer.choose(request(), lost=frozenset({"r2"})) for _ in range(50)}
    assert chosen == {"r3", "r4"}
    assert balancer.choose(request(), lost=frozenset({"r2", "r3", "r4"})) is None
    assert build(Replicas()).choose(request(), lost=NONE) is None


@pytest.mark.parametrize("build", BALANCERS)
def test_of_equals_each_has_its_turn(build: Callable[[Replicas], Balancer]) -> None:
    for names in (("r1", "r2"), ("r1", "r2", "r3", "r4", "r5")):
        balancer = build(Replicas(*names))
        counts = Counter(balancer.choose(request(), lost=NONE) for _ in range(100))
        assert set(counts) == set(names)


def test_round_robin_is_even() -> None:
    balancer = RoundRobin(Replicas("r1", "r2", "r3"))
    assert set(Counter(balancer.choose(request(), lost=NONE) for _ in range(30)).values()) == {10}


def test_two_choices_never_take_the_worst_of_all_and_the_better_of_two() -> None:
    replicas = Replicas("r1", "r2", "r3")
    replicas.stats |= {name: Stats(tokens_owed=owed) for name, owed in (("r1", 10), ("r2", 20), ("r3", 30))}
    balancer = PowerOfTwo(replicas, rng=random.Random(1))
    counts = Counter(balancer.choose(request(), lost=NONE) for _ in range(300))
    assert counts["r1"] > counts["r2"] > 0 == counts["r3"]


def test_a_warm_replica_keeps_its_traffic_until_its_load_makes_a_cold_one_cheaper() -> None:
    replicas = Replicas("cold", "warm")
    balancer = affinity(replicas)
    replicas.caches("warm", request(1000))
    for owed, chosen in ((0, "warm"), (900, "warm"), (1100, "cold")):
        replicas.stats["warm"] = Stats(prefill_tokens_owed=owed)
        assert balancer.choose(request(1000), lost=NONE) == chosen
    replicas.stats["cold"] = Stats(prefill_tokens_owed=500)
    assert balancer.choose(request(1000), lost=NONE) == "warm"


def test_what_has_been_answered_and_has_ended_since_the_last_word_weighs_no_more() -> None:
    replicas = Replicas("cold", "warm")
    balancer = affinity(replicas)
    replicas.caches("warm", request(1000))
    others = [request(600, first=7) for _ in range(40)]
    for log in others:
        replicas.send("warm", log)
    replicas.stats["warm"] = Stats(num_waiting=40, prefill_tokens_owed=24_000)
    replicas.ledgers["warm"].beat(40)
    assert balancer.choose(request(1000), lost=NONE) == "cold"
    for stream in range(1, 41):
        replicas.ledgers["warm"].answered(stream)
    assert replicas()["warm"].prefill_tokens_owed < 24_000
    assert balancer.choose(request(1000), lost=NONE) == "cold", "40 rows in its batch"
    for stream in range(1, 41):
        replicas.ledgers["warm"].ended(stream)
    replicas.stats["warm"] = Stats(num_waiting=40)
    assert replicas()["warm"].num_generations == 0
    assert balancer.choose(request(1000), lost=NONE) == "warm"


def test_running_answers_and_the_queue_weigh_too() -> None:
    replicas = Replicas("cold", "warm")
    balancer = affinity(replicas)
    replicas.caches("warm", request(1000))
    replicas.stats["warm"] = Stats(num_running=10)
    assert balancer.choose(request(1000), lost=NONE) == "warm"
    for stats in (Stats(num_running=60), Stats(num_waiting=60)):
        replicas.stats["warm"] = stats
        assert balancer.choose(request(1000), lost=NONE) == "cold"


def test_a_full_cache_drives_newcomers_away_before_it_is_the_longer_way() -> None:
    replicas = Replicas("cold", "warm")
    balancer = affinity(replicas)
    replicas.caches("warm", request(1000))
    free, full = Stats(num_blocks=100, block_size=SIZE), Stats(num_blocks=100, num_blocks_held=100, block_size=SIZE)
    replicas.stats |= {"cold": free, "warm": full}
    assert balancer.choose(request(1600), lost=NONE) == "cold"
    replicas.stats["cold"] = full
    assert balancer.choose(request(1600), lost=NONE) == "warm"


def test_the_deeper_prefix_goes_before_the_shorter() -> None:
    replicas = Replicas("r1", "r2", "r3")
    balancer = affinity(replicas)
    replicas.caches("r1", request(500))
    replicas.caches("r2", request(900))
    assert {balancer.choose(request(1000), lost=NONE) for _ in range(20)} == {"r2"}
    assert balancer.choose(request(1000), lost=frozenset({"r2"})) == "r1"


def test_a_log_goes_on_where_its_answer_is_cached() -> None:
    replicas = Replicas("r1", "r2")
    replicas.caches("r1", request(500))
    replicas.caches("r2", request(900))
    assert affinity(replicas).choose(request(901, tokens=450), lost=NONE) == "r2"


def test_many_at_once_with_one_prefix_stay_while_it_pays_and_then_spread() -> None:
    replicas = Replicas("r1", "r2", "r3", "r4")
    balancer = affinity(replicas)
    replicas.caches("r1", request(960))
    chosen = []
    for _ in range(100):
        log = request(1000)
        chosen.append(balancer.choose(log, lost=NONE))
        replicas.send(chosen[-1], log)
    assert set(chosen[:20]) == {"r1"}, "20 rows in its batch cost less than to compute the prompt once more"
    counts = Counter(chosen)
    assert min(counts.values()) > 15
    assert max(counts.values()) < 45


def test_the_second_of_two_equal_prompts_follows_the_first() -> None:
    for seed in range(10):
        replicas = Replicas("r1", "r2", "r3", "r4")
        balancer = affinity(replicas, seed=seed)
        first, second = request(1000), request(1000)
        chosen = balancer.choose(first, lost=NONE)
        replicas.send(chosen, first)
        replicas.stats[str(chosen)] = Stats(num_waiting=1)  # it has said that it waits, and nothing of its cache
        replicas.ledgers[str(chosen)].beat(1)
        other = balancer.choose(second, lost=NONE)
        assert other == chosen or replicas.ledgers[str(chosen)].prefill_unanswered >= 1000 - SIZE


def test_ingresses_that_know_of_loads_too_late_do_not_all_run_to_the_emptiest() -> None:
    replicas = Replicas(*(f"r{i}" for i in range(8)))
    replicas.stats |= {f"r{i}": Stats(prefill_tokens_owed=100 * i) for i in range(8)}
    chosen = Counter(affinity(replicas, seed=seed).choose(request(), lost=NONE) for seed in range(100))
    assert chosen["r0"] < 50
    assert len(chosen) >= 5


def test_replicas_that_do_not_publish_are_chosen_by_load() -> None:
    replicas = Replicas("r1", "r2")
    for name in ("r1", "r2"):
        replicas.index.leave(name)
    replicas.stats["r1"] = Stats(prefill_tokens_owed=10_000)
    balancer = affinity(replicas)
    assert {balancer.choose(request(1000), lost=NONE) for _ in range(8)} == {"r2"}


def test_equals_take_turns_whatever_little_they_differ_by() -> None:
    replicas = Replicas("r1", "r2", "r3")
    replicas.stats["r1"] = Stats(prefill_tokens_owed=1500)
    balancer = affinity(replicas)
    chosen = Counter(balancer.choose(request(1000), lost=NONE) for _ in range(9))
    assert set(chosen.values()) == {3}, "news that old is no reason to leave the turn"


def test_a_choice_is_counted_with_what_it_expects() -> None:
    registry = CollectorRegistry()
    replicas = Replicas("r1", "r2")
    balancer = affinity(replicas, on_choice=RoutingMeter(registry).chose)
    replicas.caches("r1", request(1000))
    balancer.choose(request(1000), lost=NONE)
    balancer.choose(request(100, first=2), lost=NONE)
    values = {
        "shoal_routing_decisions_total": {"prefix": 1.0, "load": 1.0},
        "shoal_routing_prompt_tokens_total": 1100.0,
        "shoal_routing_expected_hit_tokens_total": 992.0,
    }
    for name, value in values.items():
        if isinstance(value, dict):
            assert {reason: registry.get_sample_value(name, {"reason": reason}) for reason in value} == value
        else:
            assert registry.get_sample_value(name) == value


@pytest.mark.parametrize(
    ("name", "kind"),
    [("prefix", PrefixAffinity), ("p2c", PowerOfTwo), ("round-robin", RoundRobin), ("least-loaded", LeastLoaded)],
)
def test_the_config_names_them(name: Any, kind: type) -> None:
    replicas = Replicas("r1")
    assert type(select_balancer(name, replicas, replicas.index, rng=random.Random(1))) is kind
    assert AnyReplica().choose(request(), lost=NONE) is None


loads = st.builds(
    Stats,
    num_running=st.integers(0, 50),
    num_waiting=st.integers(0, 50),
    prefill_tokens_owed=st.integers(0, 5000),
    num_blocks=st.just(100),
    num_blocks_held=st.integers(0, 100),
    block_size=st.just(SIZE),
)


@given(stats=st.lists(loads, min_size=1, max_size=6), cached=st.lists(st.integers(0, 30), min_size=6, max_size=6))
def test_no_choice_is_dearer_than_any_replica_with_a_prefix_of_its_own_depth(
    stats: list[Stats], cached: list[int]
) -> None:
    """Of each depth two are looked at: with one or two of each, none is clearly cheaper, whatever the dice say."""
    names = [f"r{i}" for i in range(len(stats))]
    replicas = Replicas(*names)
    replicas.stats |= dict(zip(names, stats, strict=True))
    for name, blocks in zip(names, cached, strict=False):
        if blocks:
            replicas.caches(name, request(blocks * SIZE))
    log = request(1000)
    chosen = affinity(replicas).choose(log, lost=NONE)
    found = replicas.index.match(log)
    costs = {name: cost(state, 1000 - SIZE * found.get(name, 0)) for name, state in replicas().items()}
    depths = Counter(found.get(name, 0) for name in names)
    for name in names:
        noise = NOISE * (1000 - SIZE * found.get(name, 0))
        assert depths[found.get(name, 0)] > 2 or costs[str(chosen)] <= costs[name] + noise
