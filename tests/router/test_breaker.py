"""The breaker's invariants, against a model that remembers everything."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from shoal.router.breaker import Breaker

COOL_S, MAX_COOL_S = 1.0, 8.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(failures: int = 3) -> tuple[Breaker, Clock]:
    clock = Clock()
    rng = random.Random(0)
    return Breaker(failures=failures, cool_s=COOL_S, max_cool_s=MAX_COOL_S, clock=clock, rng=rng), clock


def enter(breaker: Breaker) -> int:
    ticket = breaker.enter()
    assert ticket is not None
    return ticket


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(enter(breaker))


def test_it_opens_at_the_last_of_so_many_failures_in_a_row() -> None:
    breaker, _ = make(failures=3)
    fail(breaker, 2)
    breaker.succeeded(enter(breaker))
    fail(breaker, 2)
    assert not breaker.is_open
    fail(breaker)
    assert breaker.is_open
    assert breaker.enter() is None


def test_one_probe_at_a_time_behind_the_cool_down() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    clock.now += 0.99 * COOL_S / 2
    assert breaker.enter() is None
    clock.now += COOL_S
    assert breaker.probe_in_s == 0.0
    probe = enter(breaker)
    assert breaker.enter() is None
    breaker.left(probe)
    breaker.succeeded(enter(breaker))
    assert not breaker.is_open


def test_a_call_that_began_before_says_nothing_of_now() -> None:
    breaker, clock = make(failures=1)
    calls = [enter(breaker) for _ in range(5)]
    breaker.failed(calls.pop())
    wait_s = breaker.probe_in_s
    breaker.failed(calls.pop())
    breaker.succeeded(calls.pop())
    assert breaker.is_open
    assert breaker.probe_in_s == wait_s
    clock.now += wait_s
    breaker.succeeded(enter(breaker))
    breaker.failed(calls.pop())
    assert not breaker.is_open
    fail(breaker)
    breaker.succeeded(calls.pop())
    assert breaker.is_open


def test_the_cool_down_doubles_up_to_its_limit() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    for longest in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert longest / 2 <= breaker.probe_in_s <= longest
        clock.now += breaker.probe_in_s
        fail(breaker)


def test_what_comes_and_goes_is_probed_ever_less_often_and_what_stays_is_forgiven() -> None:
    breaker, clock = make()
    fail(breaker, 3)
    for longest in (2.0, 4.0):
        clock.now += breaker.probe_in_s
        for _ in range(2):  # the probe, and a call
            breaker.succeeded(enter(breaker))
        fail(breaker, 3)
        assert longest / 2 <= breaker.probe_in_s <= longest
    clock.now += breaker.probe_in_s
    for pause in (0.0, 2 * MAX_COOL_S):
        clock.now += pause
        breaker.succeeded(enter(breaker))
    fail(breaker, 3)
    assert breaker.probe_in_s <= COOL_S


def test_ingresses_do_not_probe_in_step() -> None:
    waits = set()
    for seed in range(20):
        breaker = Breaker(cool_s=COOL_S, clock=Clock(), rng=random.Random(seed))
        fail(breaker, 3)
        waits.add(round(breaker.probe_in_s, 3))
    assert len(waits) > 10


class Machine(RuleBasedStateMachine):
    """Calls that begin and end in any order, at any time. `live` are the tickets that count."""

    tickets = Bundle("tickets")

    @initialize(failures=st.integers(1, 4))
    def begin(self, failures: int) -> None:
        self.limit = failures
        self.breaker, self.clock = make(failures)
        self.live: set[int] = set()  # each call's own number, since tickets of one state are equal
        self.calls = 0
        self.in_a_row = 0
        self.probe: int | None = None

    @rule(target=tickets)
    def enter(self) -> tuple[int, int | None]:
        was_open, due = self.breaker.is_open, self.breaker.probe_in_s == 0.0
        ticket = self.breaker.enter()
        may = not was_open or (due and self.probe is None)
        assert (ticket is not None) == may
        self.calls += 1
        if ticket is not None:
            self.live.add(self.calls)
            if was_open:
                self.probe = self.calls
        return self.calls, ticket

    @rule(call=consumes(tickets), end=st.sampled_from(["succeeded", "failed", "left"]))
    def leave(self, call: tuple[int, int | None], end: str) -> None:
        number, ticket = call
        if ticket is None:
            return
        before = self.breaker.is_open
        {"succeeded": self.breaker.succeeded, "failed": self.breaker.failed, "left": self.breaker.left}[end](ticket)
        after = self.breaker.is_open
        if number not in self.live:
            assert after == before, "a call of another time has changed it"
            return
        self.live.discard(number)
        if before:
            assert number == self.probe, "it was open, and another than the probe counted"
            self.probe = None
            assert after == (end != "succeeded")
        else:
            self.in_a_row = {"succeeded": 0, "failed": self.in_a_row + 1, "left": self.in_a_row}[end]
            assert after == (self.in_a_row >= self.limit)
        if after != before or (before and end == "failed"):
            self.live.clear()
            self.in_a_row = 0

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def a_wait_is_bounded(self) -> None:
        assert 0.0 <= self.breaker.probe_in_s <= MAX_COOL_S


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
