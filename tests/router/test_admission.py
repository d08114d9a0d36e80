"""Admission on a clock of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.admission import Admission, Ticket
from shoal.runtime.errors import QueueFull, Unavailable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_cap_holds_and_names_its_numbers() -> None:
    admission = Admission(4, clock=Clock())
    ticket = admission.enter(3)
    with pytest.raises(QueueFull, match="3 generations are in flight and 2 more were asked for; at most 4"):
        admission.enter(2)
    admission.check()
    admission.enter(1)
    with pytest.raises(QueueFull):
        admission.check()
    ticket.close()
    assert admission.in_flight == 1


def test_a_ticket_closes_once() -> None:
    admission = Admission(4, clock=Clock())
    ticket = admission.enter(2)
    ticket.close()
    ticket.close()
    assert admission.in_flight == 0


def test_a_request_over_the_cap_runs_alone() -> None:
    admission = Admission(4, clock=Clock())
    ticket = admission.enter(10)
    with pytest.raises(QueueFull):
        admission.enter(1)
    ticket.close()
    first = admission.enter(1)
    with pytest.raises(QueueFull):
        admission.enter(10)
    first.close()


def test_retry_after_follows_the_pace() -> None:
    clock = Clock()
    admission = Admission(2, clock=clock)
    tickets = [admission.enter(1), admission.enter(1)]
    for _ in range(100):  # one ends every two seconds
        clock.now += 2.0
        tickets.pop(0).close()
        tickets.append(admission.enter(1))
    with pytest.raises(QueueFull) as refusal:
        admission.enter(1)
    assert refusal.value.retry_after == pytest.approx(2.0, rel=0.1)


def test_retry_after_is_bounded() -> None:
    clock = Clock()
    admission = Admission(1, clock=clock)
    for _ in range(3):
        ticket = admission.enter(1)
        clock.now += 1e6
        ticket.close()
    admission.enter(1)
    with pytest.raises(QueueFull) as refusal:
        admission.enter(1)
    assert refusal.value.retry_after == 30.0


def test_idle_time_is_no_pace() -> None:
    clock = Clock()
    admission = Admission(1, clock=clock)
    for _ in range(3):
        clock.now += 1e6
        ticket = admission.enter(1)
        clock.now += 2.0
        ticket.close()
    admission.enter(1)
    with pytest.raises(QueueFull) as refusal:
        admission.enter(1)
    assert refusal.value.retry_after == pytest.approx(2.0)


def test_draining_refuses_all_and_lets_the_rest_end() -> None:
    admission = Admission(4, clock=Clock())
    ticket = admission.enter(1)
    admission.drain()
    for refused in (admission.check, lambda: admission.enter(1)):
        with pytest.raises(Unavailable, match="draining"):
            refused()
    ticket.close()
    assert admission.in_flight == 0


@given(st.lists(st.one_of(st.integers(1, 6), st.just(0)), max_size=60), st.integers(1, 8))
def test_in_flight_is_the_sum_of_open_tickets(moves: list[int], cap: int) -> None:
    clock = Clock()
    admission = Admission(cap, clock=clock)
    open_: list[Ticket] = []
    for move in moves:
        clock.now += 0.1
        if move == 0:
            if open_:
                open_.pop().close()
            continue
        fits = not open_ or admission.in_flight + move <= cap
        if fits:
            open_.append(admission.enter(move))
        else:
            with pytest.raises(QueueFull) as refusal:
                admission.enter(move)
            assert 0.1 <= refusal.value.retry_after <= 30
        assert admission.in_flight == sum(ticket.weight for ticket in open_)
        assert admission.in_flight <= cap or len(open_) == 1
