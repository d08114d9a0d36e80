"""The policy as Ray Serve's controller calls it: by its own wrapper, with its own context, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig as ServeConfig
from ray.serve.config import AutoscalingContext

from shoal.cluster import autoscale
from shoal.cluster.autoscale import LOOK_S, STALE_S, ServePolicy, objective_of, serve_autoscaling
from shoal.cluster.autoscale_board import AGAIN_S
from shoal.cluster.autoscale_config import AutoscalingConfig
from shoal.router.load_report import WINDOW_S, Decided, LoadReport, LoadWatch, report_of
from shoal.runtime.stats import Stats


class Controller:
    """What Serve's controller does with a policy, once a second."""

    def __init__(self, **told: Any) -> None:
        self.now = 1000.0
        self.shown: list[Decided] = []
        self.told = AutoscalingConfig.model_validate({"min_replicas": 1, "max_replicas": 9, **told})
        with pytest.warns(DeprecationWarning, match="metrics_interval_s"):  # by environment alone, some day
            self.config = ServeConfig(**serve_autoscaling(self.told))
        policy: Any = self.config.policy.get_policy()
        assert policy.__name__ == "ServePolicy"
        self.wrapped = _apply_autoscaling_config(
            ServePolicy(clock=lambda: self.now, now=lambda: self.now, board=lambda application: self)
        )
        self.state: dict[str, Any] = {}
        self.target = 1

    def show(self, decided: Decided) -> None:
        self.shown.append(decided)

    def ask(self, *reports: LoadReport | None, queued: float = 0.0, age_s: float = 0.0, passed_s: float = 1.0) -> int:
        self.now += passed_s
        replicas: list[Any] = [SimpleNamespace(unique_id=f"r{index}") for index in range(len(reports))]
        told = objective_of({"autoscaling": self.told.model_dump(exclude_unset=True)})
        raw: dict[str, dict[Any, Any]] = {}
        for index, report in enumerate(reports):
            for name, value in (report.as_numbers() | told).items() if report else ():
                raw.setdefault(name, {})[_Key(f"r{index}")] = [SimpleNamespace(timestamp=5e3 - age_s, value=value)]
        context = AutoscalingContext(
            deployment_id=None,  # type: ignore[arg-type]
            deployment_name="replica",
            app_name="shoal-stable",
            current_num_replicas=len(reports),
            target_num_replicas=self.target,
            running_replicas=replicas,
            total_num_requests=queued,
            total_queued_requests=queued,
            aggregated_metrics=None,
            raw_metrics=raw,
            capacity_adjusted_min_replicas=self.told.min_replicas,
            capacity_adjusted_max_replicas=self.told.max_replicas,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=5e3,
            config=self.config,
        )
        decided, self.state = self.wrapped(context)
        self.target = int(decided)
        return self.target


class _Key(SimpleNamespace):
    def __init__(self, unique_id: str) -> None:
        super().__init__(unique_id=unique_id)

    def __hash__(self) -> int:
        return hash(self.unique_id)


FULL = LoadReport(num_running=9, kv_usage=1.0, arrived=9)
IDLE = LoadReport(arrived=3, finished=3)


def test_what_the_policy_wants_is_done_at_once() -> None:
    controller = Controller(kv_usage=0.3)
    assert controller.ask(FULL) == 4, "by more than one, without Serve's delay"
    assert controller.ask(FULL, FULL, FULL, FULL) == 9, "max_replicas"


def test_not_more_often_than_it_is_due() -> None:
    controller = Controller()
    assert controller.ask(IDLE) == 1
    assert controller.ask(FULL, passed_s=LOOK_S / 10) == 1
    assert controller.ask(FULL) == 2


def test_to_zero_and_back() -> None:
    controller = Controller(min_replicas=0, idle_s=20.0)
    said = [controller.ask(IDLE) for _ in range(22)]
    assert said == [1] * 20 + [0] * 2
    assert controller.ask() == 0
    assert controller.ask(queued=1.0) == 1, "Serve's own way, which asks nobody"
    assert controller.ask(None, passed_s=500.0) == 1
    assert controller.ask(IDLE) == 1


def test_an_old_word_is_none() -> None:
    controller = Controller()
    controller.target = 3
    assert controller.ask(FULL, FULL, FULL, age_s=STALE_S + 1) == 3


def test_what_is_declared_changes_in_place() -> None:
    controller = Controller(kv_usage=0.9)
    assert controller.ask(FULL) == 2
    controller.told = controller.told.model_copy(update={"kv_usage": 0.25})
    assert controller.ask(FULL, FULL) == 8


def test_a_line_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, lines = Controller(), []
    monkeypatch.setattr(autoscale.logger, "info", lambda text, *given: lines.append(text % given))
    for _ in range(5):
        controller.ask(FULL, *([IDLE] * (controller.target - 1)))
    assert lines == ["shoal-stable: 1 -> 2 replicas: 1.00 KV caches are in use, to be filled to 0.8"]


def test_what_is_decided_is_shown_when_it_changes_and_now_and_then() -> None:
    controller = Controller(kv_usage=0.5, ttft_s=1.5)
    began = controller.now + 1
    controller.ask(FULL)
    for _ in range(70):
        controller.ask(FULL, IDLE)
    first, *later = controller.shown
    assert (first.replicas, first.reason, first.most, first.ttft_s) == (2, "kv", 9, 1.5)
    assert first.words == "1.00 KV caches are in use, to be filled to 0.5"
    assert {(shown.replicas, shown.reason, shown.since) for shown in controller.shown} == {(2, "kv", began)}
    assert [shown.said_at - began for shown in later] == [AGAIN_S * number for number in range(1, len(later) + 1)]
    assert len(later) == 70 // AGAIN_S
    controller.ask(FULL, FULL)
    assert (controller.shown[-1].replicas, controller.shown[-1].since) == (4, controller.now)


def test_nothing_heavy_is_imported_for_it() -> None:
    """The controller would pay for it in every cluster."""
    code = "import sys, shoal.cluster.autoscale; print([name for name in ('torch', 'ray') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_objective_travels_with_the_reports() -> None:
    assert objective_of(None) == objective_of({"autoscaling": None}) == {}
    told = objective_of({"autoscaling": {"max_replicas": 3, "ttft_s": 0.5}})
    assert told["autoscaling_ttft_s"] == 0.5
    assert not {"autoscaling_min_replicas", "autoscaling_max_replicas"} & told.keys()
    assert all(isinstance(value, float) for value in told.values())
    with pytest.raises(ValidationError):
        objective_of({"autoscaling": {"max_replicas": 3, "ttft": 0.5}})


# What a replica reports


def test_a_report_survives_serve() -> None:
    report = LoadReport(num_running=2, arrived=7, kv_usage=0.25, leaving=True, ttft_s=1.5)
    assert report_of(report.as_numbers() | {"autoscaling_ttft_s": 1.0}) == report
    assert all(isinstance(value, float) for value in report.as_numbers().values())


def test_who_waits_for_a_first_token_counts() -> None:
    now = 0.0
    watch = LoadWatch(clock=lambda: now)
    for request in "abcd":
        watch.came(request)
    now = 1.0
    watch.spoke("a")
    watch.spoke("a")
    now = 5.0
    report = watch.report(Stats())
    assert (report.num_first, report.ttft_s) == (4, 5.0)
    with watch.watching("e"):
        pass
    assert watch.report(Stats()).num_first == 4, "one that has left waits no more"
    now = 1.0 + WINDOW_S + 0.1
    assert watch.report(Stats()).num_first == 3


def test_the_floor_is_the_cheapest_step_seen() -> None:
    watch = LoadWatch(clock=time.monotonic)
    floors = [
        watch.report(Stats(steps=steps, device_s=busy)).floor_s
        for steps, busy in ((20, 0.4), (40, 0.6), (60, 2.0), (61, 2.1))
    ]
    assert floors == pytest.approx([0.02, 0.01, 0.01, 0.01])
    assert watch.report(Stats(steps=5, device_s=0.1)).floor_s == pytest.approx(0.01), "ranks that are new"


def test_totals_are_of_all_generations() -> None:
    stats = Stats(
        num_running=2,
        num_waiting=3,
        finished={"stop": 4, "abort": 1},
        prefix_query_tokens=100,
        prefix_hit_tokens=30,
        generation_tokens=50,
    )
    report = LoadWatch().report(stats, leaving=True)
    assert (report.arrived, report.finished, report.started, report.live) == (10, 5, 7, 5)
    assert (report.computed, report.leaving) == (120, True)
