"""`shoal simulate`: many replicas on a virtual clock, one balancer beside the other, before anybody buys them.

The schedulers, block pools, prefix index and balancers are those that serve; the model, its step times, the network and
the clients are not (`sim_*.py`). Balancers do not meet: each has a world of its own, in a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec

from ..router.balance import BalancerName
from ..runtime.errors import EngineError
from .progress import Progress
from .sim_config import SimConfig, StepCosts, sim_config, step_costs
from .sim_load import Load
from .sim_report import Report, report_of, table
from .sim_world import World

_SHOWN = 5  # per cent between two words of progress


def run_simulation(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Simulate what the flags say, with progress on stderr; prints the table, or JSON.

    Raises:
        ConfigError: a flag is out of its limits. EngineError: a process of the simulation has died.
    """
    config = sim_config(values)
    costs = step_costs(config)
    rate = Load(config, costs).rate
    begin = time.perf_counter()
    with Progress() as progress:
        progress.phase("simulating")
        reports = simulate(config, costs, on_progress=lambda share: progress.phase(_words(share)))
    wall_s = time.perf_counter() - begin
    if as_json:
        summary = {"config": config.model_dump(mode="json"), "costs": costs.model_dump(), "rate": rate}
        print(msgspec.json.encode({**summary, "reports": reports, "wall_s": round(wall_s, 1)}).decode())
        return
    print(
        f"{config.replicas} replicas ({config.calibrate or config.machine}), {config.requests} requests at "
        f"{rate:.0f}/s, {config.workload} prompts, seed {config.seed}: simulated in {wall_s:.1f} s\n"
    )
    print(table(reports))


def simulate(
    config: SimConfig, costs: StepCosts, *, on_progress: Callable[[float], None] = lambda share: None
) -> list[Report]:
    """One report for each of the config's balancers. on_progress: told the share that is done, 0 to 1.

    With one process, or one balancer, everything happens in the caller's.

    Raises:
        EngineError: a process has died.
    """
    jobs = min(config.jobs or len(config.balancers), len(config.balancers))
    if jobs > 1:
        return _Jobs(config, costs, on_progress).run(jobs)
    reports = []
    for index, balancer in enumerate(config.balancers):
        world = World(balancer, config, costs)
        for num_ended in world.run():
            on_progress((index + num_ended / config.requests) / len(config.balancers))
        reports.append(report_of(balancer, world.outcome))
    return reports


class _Jobs:
    """Balancers in processes of their own, which say how far they are (a number) and at last their report."""

    def __init__(self, config: SimConfig, costs: StepCosts, on_progress: Callable[[float], None]) -> None:
        self._config = config
        self._costs = costs
        self._on_progress = on_progress
        self._done = dict.fromkeys(config.balancers, 0)
        self._reports: dict[BalancerName, Report] = {}
        self._live: dict[Connection, tuple[BalancerName, BaseProcess]] = {}

    def run(self, jobs: int) -> list[Report]:
        """Raises EngineError: a process has died."""
        to_start = list(self._done)
        try:
            while to_start or self._live:
                while to_start and len(self._live) < jobs:
                    self._start(to_start.pop(0))
                for line in wait(list(self._live)):
                    assert isinstance(line, Connection)
                    self._hear(line)
        finally:
            for line, (_, process) in self._live.items():
                process.terminate()
                process.join()
                line.close()
        return [self._reports[balancer] for balancer in self._config.balancers]

    def _start(self, balancer: BalancerName) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(balancer, self._config, self._costs, theirs), name=f"simulate-{balancer}", daemon=True
        )
        process.start()
        theirs.close()
        self._live[ours] = balancer, process

    def _hear(self, line: Connection) -> None:
        balancer, process = self._live[line]
        try:
            said = msgspec.msgpack.decode(line.recv_bytes(), type=int | Report)
        except EOFError:
            process.join()
            raise EngineError(f"the simulation of {balancer} died with exit code {process.exitcode}") from None
        if isinstance(said, Report):
            self._reports[balancer] = said
            del self._live[line]
            process.join()
            line.close()
            return
        self._done[balancer] = said
        self._on_progress(sum(self._done.values()) / (len(self._done) * self._config.requests))


def _work(balancer: BalancerName, config: SimConfig, costs: StepCosts, line: Connection) -> None:
    """A process: one balancer's world."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    gc.disable()  # nothing here is a cycle, and looking for one costs a tenth of the time
    world = World(balancer, config, costs)
    for num_ended in world.run():
        line.send_bytes(msgspec.msgpack.encode(num_ended))
    line.send_bytes(msgspec.msgpack.encode(report_of(balancer, world.outcome)))


def _words(share: float) -> str:
    return f"simulating: {int(100 * share) // _SHOWN * _SHOWN} %"
