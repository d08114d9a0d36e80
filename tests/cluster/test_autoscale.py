"""The autoscaling policy over a part that can be worked out by hand: what it must do, and a test of these tests."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.cluster import scaling as policy
from shoal.cluster.autoscale_config import AutoscalingConfig
from shoal.cluster.scaling import FIRST_LOAD, HIGHEST_LOAD, KEEP, LOWEST_LOAD, SETTLE_S, SHARE, Decision, Scaling, View
from shoal.router.load_report import LoadReport

from .plant import COST_S, FULL, Plant, Worker


def told(**fields: Any) -> AutoscalingConfig:
    return AutoscalingConfig.model_validate({"min_replicas": 1, "max_replicas": 16, **fields})


def needed(rate: float, load: float = FIRST_LOAD) -> int:
    """Replicas for so many requests a second."""
    return math.ceil(rate * COST_S / load)


# Up


def test_a_step_is_followed_at_once_by_as_many_as_it_takes() -> None:
    plant = Plant(told(), replicas=2).run(600, 5.0)
    assert plant.target == 2
    plant.run(10, 25.0)
    assert plant.target >= needed(25.0)
    assert max(after - before for before, after in pairs(plant)) > 1


def test_what_waits_is_worked_off() -> None:
    plant = Plant(told(max_replicas=32), replicas=2).run(600, 5.0).run(60, 25.0)
    assert plant.target >= needed(25.0) + 5
    plant.run(100, 25.0)
    assert sum(worker.backlog for worker in plant.workers.values()) < 3


def test_it_is_enough_and_not_much_too_much() -> None:
    before = 0
    for rate in (1, 3, 6, 12, 24, 40):
        plant = Plant(told(scale_down_after_s=60), replicas=3).run(900, float(rate))
        assert needed(rate) <= plant.target <= needed(1.3 * rate) + 1
        assert plant.target >= before, "more work, fewer replicas"
        before = plant.target


def test_wanted_for_long_enough() -> None:
    plant = Plant(told(scale_up_after_s=40), replicas=2).run(300, 5.0)
    plant.run(5, 25.0).run(200, 5.0)
    assert plant.changes == []
    assert "settle" in {decision.reason for _, decision in plant.decisions}
    plant.run(60, 20.0)
    assert plant.target >= needed(20.0)


def test_replicas_on_their_way_are_not_asked_for_again() -> None:
    plant = Plant(told(), replicas=2, start_s=300, ttft_s=9.0).run(10, 4.0)
    assert plant.target == 3
    plant.run(200, 4.0)
    assert plant.target == 3


def test_full_caches() -> None:
    plant = Plant(told(kv_usage=0.8), replicas=4, kv_usage=0.95).run(3, 2.0)
    assert (plant.target, plant.decisions[-1][1].reason) == (5, "kv")


def test_late_first_tokens_at_a_load_that_should_do() -> None:
    plant = Plant(told(ttft_s=1.0), replicas=4, start_s=5).run(300, 10.0)
    assert plant.target == 4
    plant.ttft_s = 3.0
    plant.run(120, 10.0)
    assert plant.target > 4
    assert LOWEST_LOAD <= plant.scaling.max_load < FIRST_LOAD
    lowered = plant.scaling.max_load
    plant.ttft_s = 0.2
    plant.run(900, 0.98 * plant.target * lowered / COST_S)
    assert plant.scaling.max_load > lowered


# Before the replicas


def before(plant: Plant, queued: int, *, waits_s: float = 0.1) -> dict[str, LoadReport | None]:
    """What calm replicas report while so many wait at the ingresses."""
    reports = {name: worker.report() for name, worker in plant.workers.items()}
    return {name: replace(report, num_queued=queued, queued_s=waits_s) for name, report in reports.items()}


def test_what_waits_before_the_replicas_has_come() -> None:
    """A router that lets in no more than 5 a second keeps the replicas calm, whatever comes."""
    plant = Plant(told(max_replicas=32), replicas=2).run(600, 5.0)
    target = 2
    for second in range(1, 11):
        plant._pass_a_second(5)
        decision = plant.scaling.decide(View(target=target, replicas=before(plant, 20 * second)), plant.now)
        target = decision.replicas
    assert target >= needed(25.0)
    assert float(decision.words.split()[0]) > 15, "requests a second"


def test_every_replica_says_the_same_of_the_queue() -> None:
    plant = Plant(told(max_replicas=32), replicas=4).run(300, 12.0)
    for second in range(400):
        plant._pass_a_second(12)
        view = View(target=4, replicas=before(plant, min(30, second // 10)))
        assert plant.scaling.decide(view, plant.now).replicas == 4


def test_who_is_late_before_the_replicas_is_late() -> None:
    plant = Plant(told(ttft_s=1.0), replicas=3).run(300, 8.0)
    assert plant.target == 3
    decision = plant.scaling.decide(View(target=3, replicas=before(plant, 4, waits_s=1.5)), plant.now + 1)
    assert (decision.replicas, decision.reason) == (4, "ttft")


def test_a_queue_is_work() -> None:
    scaling, worker = Scaling(told(min_replicas=0, idle_s=50)), Worker()
    for second in range(200):
        view = View(target=1, replicas={"a": replace(worker.report(), num_queued=1)})
        assert scaling.decide(view, float(second)).replicas == 1


def test_a_queue_that_was_there_before_us_is_no_news() -> None:
    plant = Plant(told(max_replicas=32), replicas=2).run(300, 5.0)
    scaling = Scaling(plant.config)
    for _ in range(20):
        plant._pass_a_second(5)
        assert scaling.decide(View(target=2, replicas=before(plant, 8)), plant.now).replicas <= 3


# Down


def test_down_slowly_and_only_after_fewer_sufficed() -> None:
    config = told(scale_down_after_s=200)
    plant = Plant(config, replicas=8).run(400, 24.0)
    begun = plant.now
    plant.run(1500, 4.0)
    steps = [(now, target) for now, target in plant.changes if now > begun]
    assert steps[0][0] - begun >= 200
    assert plant.target == needed(4.0)
    moments, targets = zip(*steps, strict=True)
    assert all(later - sooner >= SETTLE_S for sooner, later in pairwise(moments))
    for before, after in zip((8, *targets), targets, strict=False):
        assert 0 < before - after <= max(1, before // SHARE)


def test_what_comes_back_in_the_meantime_keeps_them() -> None:
    plant = Plant(told(scale_down_after_s=200), replicas=8).run(400, 24.0)
    plant.run(1200, lambda now: 24.0 if now % 150 < 40 else 4.0)
    assert plant.target >= needed(20.0)


def test_caches_that_fill_now_and_then_keep_them() -> None:
    plant = Plant(told(kv_usage=0.8, scale_down_after_s=200), replicas=4)
    for _ in range(12):
        for seconds, plant.kv_usage in ((20, 0.75), (80, 0.1)):
            plant.run(seconds, 2.0)
    assert plant.target == 4
    plant.run(600, 2.0)
    assert plant.target < 4


def burst(plant: Plant) -> Plant:
    return plant.run(600, 5.0).run(60, 25.0)


def test_what_came_faster_than_replicas_could_is_expected_again() -> None:
    patience_s = 60
    plant = burst(Plant(told(max_replicas=32, scale_down_after_s=patience_s), replicas=2))
    plant.run((KEEP - 1) * patience_s, 5.0)
    assert plant.target >= needed(25.0)
    plant.run(60, 25.0)
    assert sum(worker.backlog for worker in plant.workers.values()) < 3, "the next one is met"
    plant.run((KEEP + 5) * patience_s + 32 * round(SETTLE_S), 5.0)
    assert plant.target <= needed(1.3 * 5.0), "and forgotten some day"


def test_what_was_followed_in_time_is_not_kept_for_long() -> None:
    plant = Plant(told(max_replicas=32, scale_down_after_s=60), replicas=2).run(600, 5.0)
    begun = plant.now
    plant.run(1800, lambda now: 5.0 + 20.0 * (now - begun) / 1800)
    assert plant.target >= needed(25.0, HIGHEST_LOAD)
    plant.run(60 + 20 * round(SETTLE_S), 5.0)
    assert plant.target <= needed(1.3 * 5.0)


def test_a_noisy_steady_load_is_left_alone() -> None:
    for seed, rate in enumerate((2.0, 9.0, 30.0)):
        plant = Plant(told(scale_down_after_s=120), replicas=needed(rate) + 1, seed=seed).run(900, rate, noisy=True)
        settled = plant.now
        plant.run(3600, rate, noisy=True)
        assert len([now for now, _ in plant.changes if now > settled]) <= 2


def owing(plant: Plant, owed: int) -> dict[str, LoadReport | None]:
    return {name: worker.report(owed=owed) for name, worker in plant.workers.items()}


def test_nobody_leaves_while_the_last_ones_still_owe() -> None:
    plant = Plant(told(scale_down_after_s=60), replicas=8).run(100, 8.0)
    held = plant.target
    assert held - 1 > needed(8.0)
    (gone, _), *_ = plant.workers.items()
    view = View(target=held, replicas=owing(plant, 20_000))
    plant.scaling.decide(view, plant.now)
    left = {name: report for name, report in owing(plant, 10).items() if name != gone}
    for second in range(1, 38):  # 20,000 tokens are 40 s of work
        assert plant.scaling.decide(View(target=held - 1, replicas=left), plant.now + second).replicas >= held - 1


def test_what_leavers_hand_over_is_work() -> None:
    plant = Plant(told(), replicas=2).run(300, 5.0)
    for _ in range(3):
        plant._pass_a_second(5)
        leaving = {"old": LoadReport(leaving=True, tokens_owed=120_000)}  # 240 s of work, in a minute
        decision = plant.scaling.decide(View(target=2, replicas=owing(plant, 10) | leaving), plant.now)
    assert decision.replicas >= needed(5.0) + 4


def test_what_a_leaver_owes_must_fit() -> None:
    """Two would do for what comes, but not with what the third would hand over."""
    for owed, fits in ((10, True), (50_000, False)):
        plant = Plant(told(scale_down_after_s=60), replicas=3).run(50, 5.0)
        target = 3
        for second in range(1, 200):
            plant._pass_a_second(5)
            target = plant.scaling.decide(View(target=3, replicas=owing(plant, owed)), plant.now).replicas
            if target < 3:
                break
            assert second < 199 or not fits
        assert (target < 3) == fits


def test_nobody_goes_while_some_are_on_their_way() -> None:
    for num_there, goes in ((8, True), (7, False)):
        plant = Plant(told(scale_down_after_s=60), replicas=8).run(50, 8.0)
        for _ in range(200):
            plant._pass_a_second(8)
            there = dict(list(owing(plant, 10).items())[:num_there])
            target = plant.scaling.decide(View(target=8, replicas=there), plant.now).replicas
            if target < 8:
                break
        assert (target < 8) == goes


def test_late_first_tokens_ask_for_one_more_than_those_that_stay() -> None:
    plant = Plant(told(ttft_s=1.0), replicas=3).run(300, 6.0)
    late = {name: worker.report(ttft_s=3.0, owed=10) for name, worker in plant.workers.items()}
    leaving = {name: replace(report, leaving=name == "r1") for name, report in late.items()}
    assert plant.scaling.decide(View(target=2, replicas=leaving), plant.now + 1).replicas == 3


def test_who_leaves_is_no_capacity() -> None:
    plant = Plant(told(), replicas=4, start_s=1e9).run(300, 12.0)
    assert plant.target == 4
    for worker in list(plant.workers.values())[:2]:
        worker.leaving = True
    plant.run(5, 12.0)
    assert plant.target >= 4
    view = View(target=2, replicas={name: worker.report() for name, worker in plant.workers.items()})
    assert plant.scaling.decide(view, plant.now + 1).replicas >= 4


def test_when_all_leave_as_many_are_wanted() -> None:
    plant = Plant(told(), replicas=3).run(300, 9.0)
    for worker in plant.workers.values():
        worker.leaving = True
    assert plant.decide().replicas >= 3


# Bounds, and what is not known


@pytest.mark.parametrize("seed", range(5))
def test_always_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    low = rng.randrange(1, 4)
    config = told(min_replicas=low, max_replicas=low + rng.randrange(5), scale_down_after_s=30)
    plant = Plant(config, replicas=low, start_s=10, seed=seed)
    for _ in range(12):
        plant.run(60, rng.choice([0.0, 1.0, 8.0, 40.0]), noisy=True)
    assert all(config.min_replicas <= target.replicas <= config.max_replicas for _, target in plant.decisions)
    assert {target.replicas for _, target in plant.decisions} & {config.max_replicas}


def test_without_a_word_nothing_changes() -> None:
    scaling = Scaling(told(scale_down_after_s=0))
    for second in range(100):
        decision = scaling.decide(View(target=5, replicas=dict.fromkeys("abcde")), float(second))
        assert (decision.replicas, decision.reason) == (5, "unknown")


def test_what_was_before_is_no_news() -> None:
    """A controller that starts anew finds replicas that have worked for days."""
    plant = Plant(told(), replicas=2).run(300, 5.0)
    plant.scaling = Scaling(plant.config)
    plant.run(100, 5.0)
    assert plant.changes == []


def test_ranks_that_start_anew_are_no_negative_work() -> None:
    plant = Plant(told(), replicas=2).run(100, 5.0)
    for worker in plant.workers.values():
        worker.seconds, worker.done_s, worker.arrived = 1, 0.0, 0
    plant.run(100, 5.0)
    assert plant.target == 2


def test_every_decision_has_a_reason_in_words() -> None:
    plant = Plant(told(max_replicas=3), replicas=1).run(300, 2.0).run(60, 30.0)
    decision = plant.decisions[-1][1]
    assert (decision.replicas, decision.reason) == (3, "max")
    assert "max_replicas" in decision.words
    assert re.search(r"30 requests/s of (0.2|0.19\d) s come, \d+ wait", decision.words)


# To zero and back


def idle(config: AutoscalingConfig, seconds: int, *, target: int = 1) -> tuple[Scaling, list[Decision]]:
    scaling, worker = Scaling(config), Worker()
    found = []
    for second in range(seconds):
        worker.pass_a_second()
        found.append(scaling.decide(View(target=target, replicas={"a": worker.report()}), float(second)))
    return scaling, found


def test_the_last_one_goes_when_nobody_has_asked_for_long() -> None:
    _, decisions = idle(told(min_replicas=0, idle_s=50), 60)
    assert [decision.replicas for decision in decisions] == [1] * 50 + [0] * 10
    assert decisions[-1].reason == "idle"
    _, decisions = idle(told(min_replicas=1, idle_s=50), 60)
    assert {decision.replicas for decision in decisions} == {1}


def test_any_work_keeps_it() -> None:
    plant = Plant(told(min_replicas=0, idle_s=50)).run(600, lambda now: 1.0 if now % 40 == 0 else 0.0)
    assert plant.changes == []
    plant.run(60, 0.0)
    assert plant.target == 0


def test_asleep_until_somebody_waits() -> None:
    scaling, _ = idle(told(min_replicas=0, idle_s=50), 60)
    assert scaling.decide(View(target=0, replicas={}), 60.0).replicas == 0
    decision = scaling.decide(View(target=0, replicas={}, queued=1.0), 61.0)
    assert (decision.replicas, decision.reason) == (1, "wake")
    for second in range(62, 100):  # it starts, whether or not somebody still waits
        assert scaling.decide(View(target=1, replicas={}), float(second)).replicas == 1
    assert scaling.decide(View(target=1, replicas={}), 120.0).replicas == 0, "nobody wants it any more"


def test_one_that_was_just_woken_is_not_put_to_sleep() -> None:
    """Serve wakes a part without a question, so the policy has last seen work long ago."""
    scaling, _ = idle(told(min_replicas=0, idle_s=50), 60)
    assert scaling.decide(View(target=1, replicas={"b": None}), 500.0).replicas == 1
    assert scaling.decide(View(target=1, replicas={"b": LoadReport()}), 501.0).replicas == 1


# These tests, tested


def pairs(plant: Plant) -> list[tuple[int, int]]:
    targets = [plant.replicas, *(target for _, target in plant.changes)]
    return list(pairwise(targets))


def _at_once(self: Scaling, level: Any) -> None:
    self._sufficed.clear()
    self._sufficed.append(level)


def _for_long(self: Scaling, level: Any, remember: Any = Scaling._remember) -> None:
    remember(self, level._replace(keep=KEEP))


def _in_a_minute(self: Scaling, now: float, *, doubt: float = 0.0) -> tuple[float, float]:
    minute = self._rate(60.0, now)
    return minute.work_s / minute.seconds, minute.arrived / minute.seconds


BUGS: dict[str, tuple[str, Any, Callable[[], None]]] = {
    "fewer at once": ("Scaling._remember", _at_once, test_down_slowly_and_only_after_fewer_sufficed),
    "all the way at once": ("SHARE", 1, test_down_slowly_and_only_after_fewer_sufficed),
    "no rest between steps": ("SETTLE_S", 0.0, test_down_slowly_and_only_after_fewer_sufficed),
    "drains are forgotten": (
        "Scaling._handed",
        lambda self, view: 0.0,
        test_nobody_leaves_while_the_last_ones_still_owe,
    ),
    "a hand-over is free": ("Scaling._holds", lambda *_: True, test_what_a_leaver_owes_must_fit),
    "noise is news": ("math.sqrt", lambda count: 0.0, test_a_noisy_steady_load_is_left_alone),
    "minutes only": ("Scaling._coming", _in_a_minute, test_a_step_is_followed_at_once_by_as_many_as_it_takes),
    "what waits is not seen": ("CLEAR_S", 1e9, test_what_waits_is_worked_off),
    "the load is never learned": (
        "Scaling._learn",
        lambda *_: None,
        test_late_first_tokens_at_a_load_that_should_do,
    ),
    "a burst is soon forgotten": ("KEEP", 1, test_what_came_faster_than_replicas_could_is_expected_again),
    "everything is kept as long": (
        "Scaling._remember",
        _for_long,
        test_what_was_followed_in_time_is_not_kept_for_long,
    ),
    "sleep at any time": ("Scaling._is_idle", lambda self, now: True, test_any_work_keeps_it),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, caught_by = BUGS[bug]
    owner: Any = policy
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, last, value)
    with pytest.raises(AssertionError):
        caught_by()


def test_the_plant_is_what_it_says() -> None:
    plant = Plant(told(max_replicas=1)).run(100, 3.0)
    (worker,) = plant.workers.values()
    assert worker.done_s == pytest.approx(100 * 3 * COST_S, rel=0.02)
    plant.run(100, 10.0)
    assert worker.backlog == pytest.approx(100 * (10 * COST_S - FULL), rel=0.02)
