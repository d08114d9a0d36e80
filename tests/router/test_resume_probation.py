"""Whose fault a lost replica was: the rules, on their own."""

from __future__ import annotations

import random

import pytest

from shoal.router.probation import PAST, Probation, Verdict


def lose(probation: Probation, replica: str, logs: dict[str, int]) -> dict[str, Verdict]:
    """That replica is lost with these logs, of so many tokens, in flight; they hear of it in this order."""
    return {log: probation.judge(log, replica, length=length) for log, length in logs.items()}


def test_all_in_flight_are_suspects_and_go_one_at_a_time() -> None:
    probation = Probation()
    assert set(lose(probation, "r1", {"a": 5, "b": 7}).values()) == {Verdict.SUSPECT}
    assert [probation.may_go(log) for log in ("a", "b", "other")] == [True, False, True]
    probation.move("a", "r2")
    assert not probation.clear("a", length=5 + PAST - 1)
    assert not probation.may_go("b")
    assert probation.clear("a", length=5 + PAST)
    assert probation.may_go("b")
    assert probation.num_suspects == 1
    assert probation.clear("b")  # its client has left
    assert probation.num_suspects == 0


@pytest.mark.parametrize("order", [("a", "c", "d"), ("c", "d", "a"), ("c", "a", "d")])
def test_who_is_on_trial_is_guilty_and_its_neighbours_are_not(order: tuple[str, ...]) -> None:
    """In whatever order they hear of it."""
    probation = Probation()
    lose(probation, "r1", {"a": 5, "b": 7})
    probation.move("a", "r2")
    verdicts = lose(probation, "r2", dict.fromkeys(order, 3))
    assert verdicts == {"a": Verdict.GUILTY, "c": Verdict.INNOCENT, "d": Verdict.INNOCENT}
    assert not probation.may_go("b")
    probation.clear("a")
    assert probation.may_go("b")


def test_a_loss_elsewhere_makes_suspects_of_its_own() -> None:
    probation = Probation()
    lose(probation, "r1", {"a": 5})
    probation.move("a", "r2")
    assert lose(probation, "r3", {"c": 1}) == {"c": Verdict.SUSPECT}
    assert not probation.may_go("c")


def test_a_trial_that_was_handed_over_goes_on_elsewhere() -> None:
    probation = Probation()
    lose(probation, "r1", {"a": 5})
    probation.move("a", "r2")
    probation.move("a", None)
    assert lose(probation, "r2", {"c": 1}) == {"c": Verdict.SUSPECT}
    probation.move("a", "r3")
    assert lose(probation, "r3", {"a": 5}) == {"a": Verdict.GUILTY}


def test_a_cleared_suspect_is_like_any_other_log() -> None:
    probation = Probation()
    lose(probation, "r1", {"a": 5})
    probation.move("a", "r2")
    probation.clear("a", length=100)
    assert lose(probation, "r2", {"a": 100, "c": 1}) == {"a": Verdict.SUSPECT, "c": Verdict.SUSPECT}


def test_a_replica_that_is_back_under_its_name_has_another_end() -> None:
    """Its connection broke during a trial, and it lived on: who ends it for good is a suspect."""
    probation = Probation()
    lose(probation, "r1", {"a": 5})
    probation.move("a", "r2")
    assert lose(probation, "r2", {"a": 5, "c": 1}) == {"a": Verdict.GUILTY, "c": Verdict.INNOCENT}
    probation.clear("a")
    probation.move("c", "r2")
    assert lose(probation, "r2", {"c": 2}) == {"c": Verdict.SUSPECT}


@pytest.mark.parametrize("seed", range(20))
def test_a_poison_is_found_with_the_second_replica(seed: int) -> None:
    """Random fleets: logs die, are cleared and come, while one of them ends its replica at a certain length."""
    rng, probation = random.Random(seed), Probation()
    where = {f"l{i}": f"r{rng.randrange(3)}" for i in range(12)} | {"poison": "r0"}
    lengths = dict.fromkeys(where, 0)
    deaths, num_replicas = 0, 3
    for _ in range(400):
        for log in [log for log in where if not where[log] and probation.may_go(log)]:
            where[log] = f"r{rng.randrange(num_replicas)}"
            probation.move(log, where[log])
        log = rng.choice([log for log in where if where[log]])
        lengths[log] += 1
        if log == "poison" and lengths[log] > 9:
            deaths, lost, num_replicas = deaths + 1, where[log], num_replicas + 1
            there = [other for other in where if where[other] == lost]
            rng.shuffle(there)
            for other in there:
                where[other] = ""
                if probation.judge(other, lost, length=min(lengths[other], 9)) is Verdict.GUILTY:
                    assert other == "poison"
                    del where[other]
                    probation.clear(other)
        else:
            probation.clear(log, length=lengths[log])
    assert "poison" not in where
    assert deaths == 2
