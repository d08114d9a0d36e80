"""Simulations of autoscaling over minutes: what is simulated, what Serve's own policy comes to, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.sim_autoscale import AutoscaleReport, run_trace, simulate
from shoal.cluster.sim_autoscale_config import AutoscaleSimConfig, Trace, TraceName, autoscale_sim_config
from shoal.cluster.sim_autoscale_policies import Rays, ongoing_at
from shoal.cluster.sim_autoscale_world import ScaledWorld
from shoal.router.load_report import LoadReport
from shoal.runtime.errors import ConfigError

pytestmark = pytest.mark.slow


def small(**values: Any) -> AutoscaleSimConfig:
    """Eight minutes on slow machines: some hundred requests."""
    told = {"machine": "cpu-demo", "hours": 8 / 60, "prompt_tokens": 1000, "answer_tokens": 40, "ttft_s": 6.0}
    return AutoscaleSimConfig.model_validate({**told, "start_s": 20, "scale_down_after_s": 60, **values})


@pytest.mark.parametrize("trace", ["steady", "burst", "diurnal"])
def test_requests_come_as_the_trace_says(trace: TraceName) -> None:
    moments = Trace(trace, small())
    total = moments.config.requests
    found = [moments.moment(count) for count in range(total)]
    assert all(sooner <= later for sooner, later in pairwise(found))
    assert found[0] >= 0
    assert found[-1] <= moments.seconds
    halves = sum(moment < moments.seconds / 2 for moment in found) / total
    middle = sum(moments.seconds / 4 < moment < 3 * moments.seconds / 4 for moment in found) / total
    if trace == "steady":
        assert (halves, middle) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01))
    elif trace == "diurnal":
        assert halves == pytest.approx(0.5, abs=0.01)
        assert middle > 0.7


def test_bursts_begin_elsewhere_with_another_seed() -> None:
    assert Trace("burst", small()).moment(300) != Trace("burst", small(seed=1)).moment(300)


def test_every_request_is_answered_while_replicas_come_and_go() -> None:
    world = ScaledWorld("burst", "shoal", small())
    for _ in world.run():
        pass
    world.check()
    assert len(world.outcome.ttft_s) == world._trace.config.requests
    assert world.bill.changes > 3
    assert world.bill.most > 4


def figures(trace: TraceName, **values: Any) -> dict[str, AutoscaleReport]:
    config = small(traces=trace, jobs=1, **values)
    return {report.policy: report for report in simulate(config)}


def test_ours_against_serve_s_as_it_comes() -> None:
    found = figures("steady", policies="shoal,ray-default")
    assert found["shoal"].misses <= found["ray-default"].misses + 0.02
    assert found["shoal"].gpu_hours < found["ray-default"].gpu_hours


def test_ours_against_serve_s_as_well_as_it_can_be_set() -> None:
    found = figures("diurnal", policies="shoal,ray-tuned", hours=0.4)
    assert found["shoal"].gpu_hours < 0.8 * found["ray-tuned"].gpu_hours
    assert found["shoal"].misses <= found["ray-tuned"].misses + 0.01


def test_the_seed_decides_everything_and_processes_nothing() -> None:
    config = small(hours=0.05, traces="steady", policies="shoal,ray-tuned", jobs=1)
    first = simulate(config)
    done: list[tuple[int, int]] = []
    again = simulate(config.model_copy(update={"jobs": 2}), on_progress=lambda *share: done.append(share))
    assert again == first
    assert done == [(1, 2), (2, 2)]
    assert run_trace("steady", "shoal", config) == first[0]


def test_serve_s_policy_is_serve_s() -> None:
    """Two requests a replica, thirty seconds up, ten minutes down: Serve's defaults on our clock."""
    policy, reports = Rays(min_replicas=1, max_replicas=20), dict.fromkeys("ab", LoadReport())
    said = [policy.decide(float(now), target=2, reports=reports, ongoing=16) for now in range(60)]
    assert said.index(8) in range(30, 41)
    assert set(said) == {2, 8}
    reports = dict.fromkeys("abcdefgh", LoadReport())
    said = [policy.decide(60.0 + now, target=8, reports=reports, ongoing=2) for now in range(700)]
    assert said.index(1) in range(600, 650)


def test_what_a_tuned_replica_is_given() -> None:
    config = small()
    sim = Trace("steady", config).config
    light, heavy = (ongoing_at(load, config, sim=sim) for load in (0.3, 0.8))
    assert 1 <= light < heavy < config.costs.max_num_seqs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"traces": "steady,tidal"}, "--traces: Input should be 'steady', 'burst' or 'diurnal' (got 'tidal')"),
        ({"hours": 0}, "--hours: Input should be greater than 0 (got 0)"),
        ({"min_replicas": 5, "max_replicas": 4}, "--min-replicas 5 is more than --max-replicas 4"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        autoscale_sim_config(values)
    assert str(refused.value) == message


def test_the_command() -> None:
    flags = ["--hours", "0.03", "--traces", "steady", "--policies", "shoal", "--machine", "cpu-demo", "--jobs", "1"]
    flags += ["--prompt-tokens", "1000"]
    shown = CliRunner().invoke(app, ["simulate-autoscaling", *flags])
    assert shown.exit_code == 0
    assert "late first tokens" in shown.output
    told = json.loads(CliRunner().invoke(app, ["simulate-autoscaling", *flags, "--json"]).stdout)
    (report,) = told["reports"]
    assert (report["trace"], report["policy"]) == ("steady", "shoal")
    assert told["config"]["hours"] == 0.03
