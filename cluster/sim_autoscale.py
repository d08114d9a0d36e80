"""`shoal simulate-autoscaling`: our policy beside Ray Serve's, over traces of requests, before anybody pays for it.

The schedulers, block pools and balancers are those that serve, and so are the policies; the model, its step times and
the clients are not (`sim_*.py`). Every policy is given the same requests at the same moments.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from .progress import Progress
from .sim_autoscale_config import AutoscaleSimConfig, PolicyName, TraceName, autoscale_sim_config
from .sim_autoscale_world import ScaledWorld
from .table import table_lines

Case = tuple[TraceName, PolicyName, AutoscaleSimConfig]


def run_autoscale_simulation(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Simulate what the flags say, with progress on stderr; prints the table, or JSON.

    Raises:
        ConfigError: a flag is out of its limits.
    """
    config = autoscale_sim_config(values)
    begin = time.perf_counter()
    with Progress() as progress:
        progress.phase("simulating")
        reports = simulate(config, on_progress=lambda done, of: progress.phase(f"simulated {done} of {of}"))
    wall_s = round(time.perf_counter() - begin, 1)
    if as_json:
        print(msgspec.json.encode({"config": config.model_dump(), "reports": reports, "wall_s": wall_s}).decode())
        return
    print(
        f"{config.hours:g} h of prompts of {config.prompt_tokens} and answers of {config.answer_tokens} tokens on "
        f"{config.machine}, a replica comes in {config.start_s:g} s, first tokens in {config.ttft_s:g} s are the "
        f"objective, seed {config.seed}: simulated in {wall_s} s\n"
    )
    print(table(reports))


def simulate(
    config: AutoscaleSimConfig, *, on_progress: Callable[[int, int], None] = lambda done, of: None
) -> list[AutoscaleReport]:
    """A report for each policy under each trace. on_progress: told how many of how many are done.

    With one process everything happens in the caller's.
    """
    cases: list[Case] = [(trace, policy, config) for trace in config.traces for policy in config.policies]
    jobs = min(config.jobs or os.cpu_count() or 1, len(cases))
    if jobs == 1:
        return _collected(map(_run, cases), cases, on_progress)
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_leave_signals) as pool:
        return _collected(pool.imap(_run, cases), cases, on_progress)


def _collected(
    runs: Iterable[AutoscaleReport], cases: Sequence[Case], on_progress: Callable[[int, int], None]
) -> list[AutoscaleReport]:
    reports: list[AutoscaleReport] = []
    for report in runs:
        reports.append(report)
        on_progress(len(reports), len(cases))
    return reports


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    gc.disable()  # nothing here is a cycle, and looking for one costs a tenth of the time


def _run(case: Case) -> AutoscaleReport:
    return run_trace(*case)


class AutoscaleReport(msgspec.Struct, frozen=True, kw_only=True):
    """One policy under one trace.

    misses: share of the requests whose first token came later than the objective, or that were refused. gpu_hours: of
    replicas of one GPU each, from their start to their end. changes: of the number wanted.
    """

    trace: str
    policy: str
    requests: int
    misses: float
    ttft_p90_s: float
    gpu_hours: float
    changes: int
    most_replicas: int


def run_trace(trace: TraceName, policy: PolicyName, config: AutoscaleSimConfig) -> AutoscaleReport:
    """Simulate to the end."""
    world = ScaledWorld(trace, policy, config)
    for _ in world.run():
        pass
    took = sorted(world.outcome.ttft_s)
    refused = world.outcome.refused
    late = sum(seconds > config.ttft_s for seconds in took)
    return AutoscaleReport(
        trace=trace,
        policy=policy,
        requests=len(took) + refused,
        misses=(late + refused) / max(1, len(took) + refused),
        ttft_p90_s=took[int(0.9 * len(took))] if took else 0.0,
        gpu_hours=world.bill.replica_s / 3600,
        changes=world.bill.changes,
        most_replicas=world.bill.most,
    )


def table(reports: Sequence[AutoscaleReport]) -> str:
    """A line for each policy under each trace."""
    rows = [
        (
            report.trace,
            report.policy,
            f"{report.misses:.2%}",
            f"{report.ttft_p90_s:.2f}",
            f"{report.gpu_hours:.2f}",
            str(report.changes),
            str(report.most_replicas),
        )
        for report in reports
    ]
    names = ("trace", "policy", "late first tokens", "p90, s", "GPU hours", "changes", "most replicas")
    return "\n".join(table_lines(names, rows))
