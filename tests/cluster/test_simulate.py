"""Simulations of a few replicas and some hundred requests: nothing is lost or left to chance, and prefixes tell.

All time is virtual; what is asserted of it is asserted of the model.
"""

import json
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.sim_config import MACHINES, SimConfig, StepCosts, step_costs
from shoal.cluster.sim_load import Load
from shoal.cluster.sim_report import Report, report_of
from shoal.cluster.sim_scheduler import LeapingScheduler
from shoal.cluster.sim_world import Outcome, World
from shoal.cluster.simulate import simulate
from shoal.router.balance import BalancerName
from shoal.runtime.errors import ConfigError

BALANCERS: list[BalancerName] = ["prefix", "p2c", "round-robin", "least-loaded"]
TIGHT = MACHINES["h100-8b"].model_copy(update={"kv_tokens": 4_000, "block_size": 16})


def small(**values: Any) -> SimConfig:
    return SimConfig.model_validate(
        {"replicas": 4, "requests": 300, "tenants": 32, "system_tokens": 256, "turns": 2, "answer_tokens": 80, **values}
    )


def run(balancer: BalancerName, config: SimConfig, costs: StepCosts | None = None) -> Outcome:
    world = World(balancer, config, costs or step_costs(config))
    for _ in world.run():
        pass
    world.check()
    return world.outcome


def asked_tokens(config: SimConfig, costs: StepCosts) -> int:
    """What all answers come to, by the load alone."""
    load, total = Load(config, costs), 0
    for turn in load.turns():
        prompt, end = load.script(turn.conversation, turn.num_turns).ends[turn.number]
        total += end - prompt
    return total


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("faults", [{}, {"kill_every": 0.3, "restart_s": 0.5}, {"workload": "unique"}], ids=str)
@pytest.mark.parametrize("costs", [MACHINES["h100-8b"], TIGHT], ids=["roomy", "tight"])
def test_every_request_ends_once_with_every_token(
    balancer: BalancerName, faults: dict[str, Any], costs: StepCosts
) -> None:
    config = small(load=4, **faults)
    outcome = run(balancer, config, costs)
    assert (len(outcome.e2e_s), len(outcome.ttft_s), outcome.refused) == (config.requests, config.requests, 0)
    assert outcome.output_tokens == asked_tokens(config, costs)
    # Each token is the first of its request or has a gap before it, on whichever replica it was drawn.
    assert len(outcome.ttft_s) + sum(outcome.gaps.counts) == outcome.output_tokens
    assert min(outcome.ttft_s) > costs.base_s
    assert (outcome.kills > 0) == (config.kill_every is not None)
    assert (outcome.interrupted >= outcome.resumed > 0) == (config.kill_every is not None)


def test_memory_was_tight() -> None:
    """The cases above do preempt."""
    assert run("round-robin", small(load=4), TIGHT).preemptions > 0


@pytest.mark.parametrize("costs", [MACHINES["h100-8b"], TIGHT], ids=["roomy", "tight"])
def test_taking_steps_together_changes_nothing(costs: StepCosts, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(load=4, kill_every=0.3, restart_s=0.5)
    together = report_of("round-robin", run("round-robin", config, costs))
    leaps: list[int] = []
    monkeypatch.setattr(LeapingScheduler, "leap", lambda self, steps: leaps.append(steps))
    monkeypatch.setattr(LeapingScheduler, "stretch", lambda self: None)
    alone = report_of("round-robin", run("round-robin", config, costs))
    assert not leaps
    assert alone.itl_s.p99 == pytest.approx(together.itl_s.p99)  # differences of moments, so not to the last bit
    assert msgspec.structs.replace(alone, itl_s=together.itl_s) == together


def test_steps_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    leap, leaps = LeapingScheduler.leap, []
    monkeypatch.setattr(LeapingScheduler, "leap", lambda self, steps: (leaps.append(steps), leap(self, steps)))
    outcome = run("round-robin", small())
    assert sum(leaps) > outcome.steps / 2


def test_the_seed_decides_everything_and_processes_nothing() -> None:
    config = small(balancers="prefix,p2c", kill_every=0.5, restart_s=0.5, jobs=1)
    costs = step_costs(config)
    first = simulate(config, costs)
    assert [report.balancer for report in first] == ["prefix", "p2c"]
    shares: list[float] = []
    assert simulate(config.model_copy(update={"jobs": 2}), costs, on_progress=shares.append) == first
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert simulate(config.model_copy(update={"seed": 1}), costs) != first


def figures(**values: Any) -> dict[str, Report]:
    """A pool of 8 replicas, each of which may be too small for the prompts of all tenants."""
    loads = {"replicas": 8, "requests": 800, "tenants": 128, "system_tokens": 1024, "answer_tokens": 16}
    config = small(**loads, balancers="prefix,p2c,round-robin", jobs=1, **values)
    return {report.balancer: report for report in simulate(config, step_costs(config))}


def test_prefixes_that_repeat_are_found() -> None:
    shared = figures(load=0.6)
    for other in ("p2c", "round-robin"):
        assert shared["prefix"].hit_rate > 1.3 * shared[other].hit_rate
        # In so short a run most of the slowest are the first of their tenant, wherever they go.
        assert shared["prefix"].ttft_s.p50 < 0.85 * shared[other].ttft_s.p50


def test_prompts_that_do_not_repeat_cost_nothing() -> None:
    unique = figures(load=0.6, workload="unique")
    assert all(report.hit_rate == 0 for report in unique.values())
    assert unique["prefix"].ttft_s.p90 < 1.1 * unique["p2c"].ttft_s.p90


def test_a_full_queue_refuses() -> None:
    config = small(load=50, max_queued=0)
    costs = MACHINES["h100-8b"].model_copy(update={"max_num_seqs": 4})
    outcome = run("p2c", config, costs)
    assert outcome.refused > 0
    assert len(outcome.e2e_s) + outcome.refused == config.requests


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_requests_come_at_the_rate_and_as_unevenly_as_asked(burstiness: float) -> None:
    config = small(requests=20_000, burstiness=burstiness)
    load = Load(config, step_costs(config))
    moments = [turn.at_s for turn in load.turns()]
    gaps = [late - early for early, late in zip([0.0, *moments], moments, strict=False)]
    assert fmean(gaps) == pytest.approx(1 / load.rate, rel=0.15)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness, rel=0.15)


def test_turns_of_a_conversation_begin_with_those_before() -> None:
    config = small()
    load = Load(config, step_costs(config))
    turns = list(load.turns())
    seen: dict[int, int] = {}
    for turn in turns:
        assert turn.number == seen.get(turn.conversation, turn.number - 1) + 1 < turn.num_turns + 1
        seen[turn.conversation] = turn.number
    script = load.script(turns[0].conversation, turns[0].num_turns)
    assert script.tokens == load.script(turns[0].conversation, turns[0].num_turns).tokens
    assert all(end <= later for (_, end), (later, _) in zip(script.ends, script.ends[1:], strict=False))
    assert max(len(load.script(turn.conversation, turn.num_turns).tokens) for turn in turns) <= config.max_model_len


SMALL = ["--replicas", "2", "--requests", "40", "--system-tokens", "100", "--tenants", "4", "--jobs", "1"]


def test_the_table() -> None:
    faults = ["--kill-every", "0.2", "--restart-s", "0.1"]
    result = CliRunner().invoke(app, ["simulate", *SMALL, "--balancers", "round-robin,prefix", *faults])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    head = next(line.split() for line in lines if "prefix" in line and "round-robin" in line)
    assert head == ["round-robin", "prefix"]
    for name in ("prefix hit rate", "time to first token", "between tokens", "whole request", "killed"):
        assert any(name in line for line in lines)
    assert "simulating: 50 %" in result.stderr


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    slow = {**MACHINES["h100-8b"].model_dump(), "base_s": 1.0}
    file.write_text(json.dumps(slow))
    result = CliRunner().invoke(app, ["simulate", *SMALL, "--json", "--balancers", "p2c", "--calibrate", str(file)])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["costs"] == slow
    assert said["config"]["replicas"] == 2
    (report,) = said["reports"]
    assert (report["balancer"], report["answered"], report["refused"]) == ("p2c", 40, 0)
    assert report["ttft_s"]["p50"] >= 1.0
    assert report["itl_s"]["p50"] >= 1.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", "0"], ["--replicas", "greater than or equal to 1", "got 0"]),
        (["--load", "0"], ["--load", "greater than 0", "got 0.0"]),
        (["--load", "nan"], ["--load", "nan"]),
        (["--balancers", "prefix,best"], ["--balancers", "'round-robin'", "got 'best'"]),
        (["--kill-every", "-1"], ["--kill-every", "greater than 0"]),
        (["--kill-every", "0.1"], ["--restart-s 8", "below 6.4"]),
        (["--system-tokens", "200000"], ["--system-tokens 200000", "a replica holds 400000"]),
        (["--calibrate", "/no/such"], ["--calibrate /no/such", "No such file"]),
    ],
)
def test_refusals_name_the_flag_the_value_and_the_limit(flags: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, ["simulate", *flags])
    assert isinstance(result.exception, ConfigError), result.output
    for word in words:
        assert word in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ["not JSON"]), ('{"base_s": 1}', ["prefill_token_s"]), ("[]", ["the root"])],
)
def test_step_times_that_are_none(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    result = CliRunner().invoke(app, ["simulate", "--calibrate", str(file)])
    assert isinstance(result.exception, ConfigError), result.output
    for word in (str(file), *words):
        assert word in str(result.exception)
