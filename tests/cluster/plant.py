"""A part of a deployment as its autoscaling sees it: replicas that work off what comes, in simulated seconds.

Each does at most `FULL` seconds of work in a second, behind a queue of its own; steps cost a floor on top. Exact and
without chance but for the arrivals, so what a policy ought to come to can be worked out by hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.cluster.autoscale_config import AutoscalingConfig
from shoal.cluster.scaling import Decision, Scaling, View
from shoal.router.load_report import LoadReport

FULL = 0.9
FLOOR_S = 0.01
COST_S = 0.2  # work of a generation
TOKENS = 100  # of a generation


@dataclass
class Worker:
    """One replica. backlog: work that is yet to be done, in seconds."""

    backlog: float = 0.0
    arrived: int = 0
    done_s: float = 0.0
    seconds: int = 0
    leaving: bool = False

    def take(self, count: int) -> None:
        self.arrived += count
        self.backlog += count * COST_S

    def pass_a_second(self) -> None:
        done = min(FULL, self.backlog)
        self.backlog -= done
        self.done_s += done
        self.seconds += 1

    def report(self, *, ttft_s: float | None = None, kv_usage: float = 0.1, owed: int | None = None) -> LoadReport:
        live = round(self.backlog / COST_S)
        steps = self.seconds * 5
        return LoadReport(
            num_running=min(live, 2),
            num_waiting=max(0, live - 2),
            tokens_owed=live * TOKENS if owed is None else owed,
            kv_usage=kv_usage,
            arrived=self.arrived,
            finished=self.arrived - live,
            computed=round(self.done_s / COST_S * TOKENS),
            steps=steps,
            busy_s=self.done_s + steps * FLOOR_S,
            floor_s=FLOOR_S,
            num_first=10,
            ttft_s=0.1 + self.backlog / FULL if ttft_s is None else ttft_s,
            leaving=self.leaving,
        )


@dataclass
class Plant:
    """A part under a policy. start_s: until a replica that is wanted is there."""

    config: AutoscalingConfig
    replicas: int = 1
    start_s: float = 30.0
    seed: int = 0
    ttft_s: float | None = None
    kv_usage: float = 0.1
    now: float = 1000.0
    decisions: list[tuple[float, Decision]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scaling = Scaling(self.config)
        self.target = self.replicas
        self.num_made = 0
        self.workers: dict[str, Worker] = {}
        self.draining: dict[str, Worker] = {}
        self.starting: list[float] = []
        self.rng = random.Random(self.seed)
        for _ in range(self.replicas):
            self.add()

    def add(self) -> None:
        self.num_made += 1
        self.workers[f"r{self.num_made}"] = Worker()

    @property
    def changes(self) -> list[tuple[float, int]]:
        """When the target changed, and to what."""
        found, last = [], self.replicas
        for now, decision in self.decisions:
            if decision.replicas != last:
                found.append((now, decision.replicas))
            last = decision.replicas
        return found

    def run(self, seconds: int, rate: Callable[[float], float] | float, *, noisy: bool = False) -> Plant:
        """Pass so much time under so many requests a second."""
        owed = 0.0
        for _ in range(seconds):
            a_second = rate(self.now) if callable(rate) else rate
            owed += self._poisson(a_second) if noisy else a_second
            count, owed = int(owed), owed - int(owed)
            self._pass_a_second(count)
            self.decide()
        return self

    def decide(self) -> Decision:
        """Ask the policy now, and follow it."""
        reports: dict[str, LoadReport | None] = {
            name: worker.report(ttft_s=self.ttft_s, kv_usage=self.kv_usage) if worker.seconds else None
            for name, worker in self.workers.items()
        }
        decision = self.scaling.decide(View(target=self.target, replicas=reports), self.now)
        self.decisions.append((self.now, decision))
        self.target = decision.replicas
        self.starting += [self.now + self.start_s] * (self.target - len(self.workers) - len(self.starting))
        while self.target < len(self.workers) + len(self.starting):
            if self.starting:
                self.starting.pop()
            else:
                name, worker = self.workers.popitem()
                self.draining[name] = worker
        return decision

    def _pass_a_second(self, count: int) -> None:
        self.now += 1.0
        while self.starting and self.starting[0] <= self.now:
            self.starting.pop(0)
            self.add()
        takers = [worker for worker in self.workers.values() if not worker.leaving]
        assert takers or not count, "nobody is there for what comes"
        for index in range(count):
            takers[(index + int(self.now)) % len(takers)].take(1)
        for worker in [*self.workers.values(), *self.draining.values()]:
            worker.pass_a_second()

    def _poisson(self, mean: float) -> int:
        count, at = 0, self.rng.expovariate(mean) if mean else 2.0
        while at < 1.0:
            count += 1
            at += self.rng.expovariate(mean)
        return count
