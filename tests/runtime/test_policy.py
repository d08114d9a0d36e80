"""Fair shares among the sequences of one engine, by a model of one that serves the lowest key first."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.policy import OUTPUT_WEIGHT, FairShare, FirstCome, Key, Policy, select_policy


def request(account: str = "a", *, prompt: int = 10, most: int | None = None, **fields: object) -> GenerationRequest:
    return GenerationRequest(
        id="r", prompt=[1] * prompt, params=SamplingParams(max_tokens=most), seed=1, account=account, **fields
    )  # type: ignore[arg-type]


class Engine:
    """Runs `slots` requests at once, whoever has the lowest key first; each ends in its turn."""

    def __init__(self, policy: Policy, slots: int = 4) -> None:
        self.policy = policy
        self.waiting: list[tuple[Key, int, GenerationRequest]] = []
        self.running: list[tuple[Key, int, GenerationRequest]] = []
        self.slots = slots
        self.arrivals = 0
        self.cost: Counter[str] = Counter()
        self.order: list[int] = []

    def add(self, new: GenerationRequest, output: int) -> int:
        heapq.heappush(self.waiting, (self.policy.key(new, self.arrivals), output, new))
        self.arrivals += 1
        self._fill()
        return self.arrivals - 1

    def end_one(self) -> GenerationRequest:
        key, output, ended = self.running.pop(0)
        self.policy.ended(ended, key, output)
        self.cost[ended.account] += int(len(ended.prompt) + OUTPUT_WEIGHT * output)
        self._fill()
        return ended

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            self.running.append(heapq.heappop(self.waiting))
            self.order.append(self.running[-1][0].arrival)


@settings(max_examples=60, deadline=None)
@given(
    weight=st.floats(0.25, 8), outputs=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    names_max=st.booleans(), prompts=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)  # fmt: skip
def test_backlogged_accounts_get_tokens_by_their_shares(
    *, weight: float, outputs: tuple[int, int], names_max: bool, prompts: tuple[int, int]
) -> None:
    """Behind some answers of each: of the first ones it can only guess how long they will be."""
    engine = Engine(FairShare())
    kinds = {
        name: (request(name, prompt=prompt, most=output if names_max else None, share=share), output)
        for name, share, prompt, output in zip("ab", (weight, 1.0), prompts, outputs, strict=True)
    }
    for new, output in list(kinds.values()) * 100:
        engine.add(new, output)
        engine.end_one()
    engine.cost.clear()
    for new, output in list(kinds.values()) * 12:
        engine.add(new, output)
    for _ in range(1000):
        ended = engine.end_one()
        engine.add(*kinds[ended.account])
    largest = max(prompt + OUTPUT_WEIGHT * output for prompt, output in zip(prompts, outputs, strict=True))
    bound = 2 * (engine.slots + 12) * largest * max(1, 1 / weight)
    assert abs(engine.cost["a"] / weight - engine.cost["b"]) <= bound


def test_an_idle_account_saves_nothing_up() -> None:
    engine = Engine(FairShare())
    for _ in range(200):
        engine.add(request("a"), 50)
        if len(engine.running) == 4:
            engine.end_one()
    for _ in range(60):
        engine.add(request("a"), 50)
        engine.add(request("b"), 50)
    served = Counter(engine.end_one().account for _ in range(60))
    assert served["b"] <= 30 + 4


def test_a_flood_holds_up_nobody_and_nobody_starves() -> None:
    engine = Engine(FairShare())
    for _ in range(100):
        engine.add(request("a"), 50)
        engine.end_one()
    flood = [engine.add(request("a"), 50) for _ in range(500)]
    late = engine.add(request("b"), 50)
    for _ in range(8):
        engine.end_one()
    assert late in engine.order
    for _ in range(2000):  # b goes on coming, and still the flood moves
        engine.add(request("b"), 50)
        engine.end_one()
    assert set(flood) <= set(engine.order)


def test_giving_up_what_waits_moves_nobodys_clock() -> None:
    """Else one could send a thousand, take them back, and leave newcomers far behind one's own."""
    policy = FairShare()
    first = request("a")
    keys = [policy.key(first, i) for i in range(1000)]
    for key in keys[500:]:
        policy.ended(first, key, None)
    assert policy.key(request("b"), 1000) < keys[1]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.sampled_from([None, 1, 100])), max_size=40),
)
def test_one_account_is_served_in_order_of_arrival(moves: list[tuple[int, int, int | None]]) -> None:
    fair, plain = Engine(FairShare(), 2), Engine(FirstCome(), 2)
    for ends, output, most in moves:
        for engine in (fair, plain):
            engine.add(request("a", most=most), min(output, most or output))
            for _ in range(min(ends // 10, len(engine.running))):
                engine.end_one()
    assert fair.order == plain.order


def test_priority_stands_before_shares() -> None:
    policy = FairShare()
    late = [policy.key(request("a", priority=-1), i) for i in range(50)]
    assert max(late) < policy.key(request("b"), 50)


@pytest.mark.parametrize("name", ["fcfs", "priority", "fair"])
def test_keys_are_unique(name: str) -> None:
    policy = select_policy(name)  # type: ignore[arg-type]
    keys = [policy.key(request(), i) for i in range(100)]
    assert len({key[:3] for key in keys}) == 100
    assert keys == sorted(keys)
