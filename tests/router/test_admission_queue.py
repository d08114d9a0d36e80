"""The queue itself: whose turn it is, who is put out, and how fast places come free. Pure, on a clock of its own."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.fair_queue import Entry, FairQueue, Pace
from shoal.router.tenant import Tenant
from shoal.runtime.errors import QueueFull
from shoal.runtime.policy import OUTPUT_WEIGHT


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str, **fields: object) -> Tenant:
    return Tenant(name=name, salt="", **fields)  # type: ignore[arg-type]


ANN, BOB = tenant("ann"), tenant("bob")


def queue(max_in_flight: int = 1, max_waiting: int = 10**9, clock: Clock | None = None) -> FairQueue:
    return FairQueue(max_in_flight, max_waiting, clock=clock or Clock())


def offer(to: FairQueue, owner: Tenant = ANN, weight: int = 1, *, priority: int = 0, prompt: int = 0) -> Entry:
    entry = Entry(owner, weight=weight, priority=priority, prompt_tokens=prompt)
    to.offer(entry)
    return entry


def run_backlogged(
    tenants: dict[str, Tenant], num_ends: int, *, output: dict[str, int], places: int = 4
) -> Counter[str]:
    """Cost served by tenant, where all have work all the time."""
    line = queue(places)
    running: list[Entry] = []
    for owner in tenants.values():
        for _ in range(2 * places):
            running += line.offer(Entry(owner, prompt_tokens=10))[0]
    cost: Counter[str] = Counter()
    for _ in range(num_ends):
        entry = running.pop(0)
        name = entry.tenant.name
        line.charge(entry.tenant, output=output[name])
        cost[name] += int(10 + OUTPUT_WEIGHT * output[name])
        running += line.offer(Entry(entry.tenant, prompt_tokens=10))[0]
        running += line.leave(entry)
    return cost


def test_tenants_take_turns_by_tokens_not_by_requests() -> None:
    cost = run_backlogged({"ann": ANN, "bob": BOB}, 2000, output={"ann": 200, "bob": 20})
    bound = 2 * 4 * (10 + OUTPUT_WEIGHT * 200)  # twice what can be in flight: the paper's, for its theorem 4.4
    assert abs(cost["ann"] - cost["bob"]) <= bound


@settings(max_examples=40, deadline=None)
@given(st.floats(0.25, 8), st.integers(1, 200), st.integers(1, 200))
def test_shares_are_as_the_weights(weight: float, ann_output: int, bob_output: int) -> None:
    output = {"ann": ann_output, "bob": bob_output}
    cost = run_backlogged({"ann": tenant("ann", weight=weight), "bob": BOB}, 1500, output=output)
    largest = max(10 + OUTPUT_WEIGHT * tokens for tokens in output.values())
    assert abs(cost["ann"] / weight - cost["bob"]) <= 2 * 4 * largest * max(1, 1 / weight)


def test_idleness_saves_nothing_up() -> None:
    line = queue()
    running = offer(line)
    for _ in range(100):  # ann alone, for long
        line.charge(ANN, output=100)
        line.leave(running)
        running = offer(line)
    anns = [offer(line) for _ in range(50)]
    bobs = [offer(line, BOB) for _ in range(50)]
    order: list[str] = []
    for _ in range(20):
        line.charge(running.tenant, output=100)
        (running,) = line.leave(running)
        order.append(running.tenant.name)
    assert 9 <= order.count("ann") <= 11
    assert anns[0].in_flight
    assert bobs[0].in_flight


def test_a_light_user_does_not_save_up_either() -> None:
    """Bob is never idle, but never waits: his counter is lifted each time he comes."""
    line = queue(2)
    bob = offer(line, BOB)
    for _ in range(50):
        ann = offer(line)
        line.charge(ANN, output=100)
        line.leave(ann)
        line.leave(bob)
        bob = offer(line, BOB)
    running = [bob, offer(line)]
    for _ in range(20):
        offer(line), offer(line, BOB)
    order = []
    for _ in range(10):
        line.charge(running[0].tenant, output=100)
        running += line.leave(running.pop(0))
        order.append(running[-1].tenant.name)
    assert 4 <= order.count("ann") <= 6


def test_classes_go_first_and_tenants_are_served_in_order_of_arrival() -> None:
    line = queue()
    running = offer(line)
    later = [offer(line, priority=1), offer(line, priority=1)]
    first = [offer(line, BOB), offer(line), offer(line, BOB)]
    order = []
    for _ in range(5):
        (running,) = line.leave(running)
        order.append(running)
    assert order[:3] == first
    assert order[3:] == later


def test_the_longest_line_gives_way_and_nobody_else() -> None:
    line = queue(1, 3)
    offer(line)
    anns = [offer(line) for _ in range(3)]
    with pytest.raises(QueueFull, match="1 generations are in flight, 3 wait and 1 more"):
        offer(line)
    bob = Entry(BOB)
    assert line.offer(bob) == ([], [anns[2]])
    with pytest.raises(QueueFull):
        offer(line, BOB)
    vip = Entry(ANN, priority=-1)
    assert line.offer(vip) == ([], [anns[1]])
    with pytest.raises(QueueFull):
        offer(line, tenant("carl"), priority=1)


def test_a_whole_class_may_give_way_and_then_the_next() -> None:
    line = queue(1, 4)
    offer(line, weight=4)
    last, middle = offer(line, priority=2), offer(line, BOB, 3, priority=1)
    assert line.offer(Entry(ANN, weight=2)) == ([], [last, middle])
    with pytest.raises(QueueFull):
        offer(line, BOB, 5)


def test_a_tenants_own_cap() -> None:
    capped = tenant("capped", max_in_flight=2)
    line = queue(8)
    entries = [offer(line, capped), offer(line, capped)]
    with pytest.raises(QueueFull, match="2 generations of capped are here and 1 more were asked for; at most 2"):
        offer(line, capped)
    offer(line, ANN)
    line.leave(entries[0])
    offer(line, capped)


def test_a_request_over_the_cap_runs_alone() -> None:
    line = queue(4)
    heavy = offer(line, weight=10)
    light = offer(line)
    assert heavy.in_flight
    assert not light.in_flight
    assert line.leave(heavy) == [light]


@pytest.mark.parametrize("weight", [1, 4])
def test_retry_after_follows_the_pace(weight: int) -> None:
    """Four places, each held for eight seconds: one comes free every two, however they are bundled."""
    clock = Clock()
    line = queue(4, 0, clock)
    entries = [offer(line, weight=weight) for _ in range(4 // weight)]
    for _ in range(100):
        clock.now += 2.0 * weight
        line.leave(entries.pop(0))
        entries.append(offer(line, weight=weight))
    with pytest.raises(QueueFull) as refusal:
        offer(line)
    assert refusal.value.retry_after == pytest.approx(2.0, rel=0.1)


def test_idle_time_and_an_empty_house_are_no_pace() -> None:
    clock = Clock()
    line = queue(4, 0, clock)
    for _ in range(3):  # one of four places is used, and a quiet night between
        clock.now += 10_000
        entry = offer(line)
        clock.now += 8.0
        line.leave(entry)
    offer(line, weight=4)
    assert line.retry_after(1) == pytest.approx(2.0, rel=0.01)


def test_bunches_are_no_pace() -> None:
    clock = Clock()
    line = queue(100, 0, clock)
    for _ in range(5):
        entries = [offer(line) for _ in range(100)]
        clock.now += 20.0
        for entry in entries:
            line.leave(entry)
    offer(line, weight=100)
    assert line.retry_after(10) == pytest.approx(2.0, rel=0.1)


def test_retry_after_is_bounded() -> None:
    clock = Clock()
    pace = Pace(1, clock=clock)
    assert pace.wait(3) is None
    pace.change(1)
    clock.now += 1e6
    pace.change(0, ended=1)
    assert pace.retry_after(1) == 30.0
    clock.now += 1e9
    pace.change(0)
    assert pace.retry_after(0.001) == 0.1


moves = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 2), st.integers(1, 5), st.integers(0, 1)),
        st.tuples(st.just("leave"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("serve"), st.integers(0, 2), st.integers(1, 50), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(moves, st.integers(1, 6), st.integers(0, 8))
def test_whatever_comes_caps_hold_and_everyone_ends(program: list[tuple], places: int, waiting: int) -> None:  # type: ignore[type-arg]
    tenants = [tenant("a", weight=2.0), tenant("b"), tenant("c", max_in_flight=6)]
    clock = Clock()
    line = queue(places, waiting, clock)
    here: list[Entry] = []
    waits: list[float] = []

    def holds() -> None:
        running = [entry for entry in here if entry.in_flight]
        assert line.in_flight == sum(entry.weight for entry in running)
        assert line.waiting == sum(entry.weight for entry in here if not entry.in_flight)
        assert line.in_flight <= places or len(running) == 1
        assert line.waiting <= waiting
        assert line.load == (line.in_flight + line.waiting) / places
        assert sum(e.weight for e in here if e.tenant.name == "c") <= 6 or sum(e.tenant.name == "c" for e in here) == 1
        ahead: set[tuple[str, int]] = set()  # of one tenant and class nobody overtakes
        for entry in here:
            key = (entry.tenant.name, entry.priority)
            assert not (entry.in_flight and key in ahead), "overtaken by a later one of its own"
            if not entry.in_flight:
                ahead.add(key)

    for move, which, amount, priority in program:
        clock.now += 0.5
        if move == "offer":
            entry = Entry(tenants[which], weight=amount, priority=priority, prompt_tokens=amount)
            try:
                admitted, out = line.offer(entry, patience_s=math.inf)
            except QueueFull as refusal:
                waits.append(refusal.retry_after)
            else:
                here = [*(e for e in here if e not in out), entry]
                assert all(other.in_flight for other in admitted)
                assert not any(other.in_flight for other in out), "who has a place was put out"
        elif move == "leave" and here:
            entry = here.pop(which % len(here))
            line.leave(entry)
        elif move == "serve":
            line.charge(tenants[which], output=amount)
        holds()
    for _ in range(len(here)):
        running = next((entry for entry in here if entry.in_flight), None)
        assert running is not None, "nobody has a place and somebody waits"
        here.remove(running)
        line.leave(running)
        holds()
    assert (line.in_flight, line.waiting) == (0, 0)
    assert all(0.1 <= wait <= 30 for wait in waits)
