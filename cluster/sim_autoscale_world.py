"""The simulation's world with a number of replicas that changes: a trace of requests, and a policy that is asked.

A replica takes `start_s` to come and is paid for from its start; one that leaves takes nothing new, ends what it has,
and is paid for until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..router.load_report import LoadReport, LoadWatch
from ..runtime.generation import TokenEvent
from .sim_autoscale_config import AutoscaleSimConfig, PolicyName, Trace, TraceName
from .sim_autoscale_policies import select_policy
from .sim_load import Turn
from .sim_replica import SimReplica
from .sim_world import World, _Flow

TICK_S = 1.0


@dataclass(slots=True)
class Bill:
    """What a policy has cost. most: replicas that took work at once."""

    replica_s: float = 0.0
    changes: int = 0
    most: int = 0


class ScaledWorld(World):
    """One trace under one policy. `run` it once."""

    def __init__(self, trace: TraceName, policy: PolicyName, config: AutoscaleSimConfig) -> None:
        self.bill = Bill()
        self._trace = Trace(trace, config)
        self._watches: dict[str, LoadWatch] = {}
        self._draining: dict[str, SimReplica] = {}
        self._starting: list[float] = []  # when each will be there
        self._reports: dict[str, LoadReport | None] = {}
        self._start_s = config.start_s
        sim = self._trace.config
        super().__init__("p2c", sim, config.costs)
        self.policy = select_policy(policy, config, sim=sim)
        self._target = sim.replicas
        self._turns = self._warped(self._turns)

    def run(self) -> Iterator[int]:
        self._at(TICK_S, self._tick)
        return super().run()

    def _warped(self, turns: Iterator[Turn]) -> Iterator[Turn]:
        """The same requests, at the moments of the trace."""
        rate = self._load.rate
        for turn in turns:
            yield Turn(self._trace.moment(turn.at_s * rate), turn.conversation, turn.number, turn.num_turns)

    # Scaling

    def _tick(self) -> None:
        """A second is over: it is paid for, and the policy is asked, with what was reported a second ago."""
        self._at(self.now + TICK_S, self._tick)
        while self._starting and self._starting[0] <= self.now:
            self._starting.pop(0)
            self._restart()
        self._end_drained()
        serving = [name for name in self._replicas if name not in self._draining]
        self.bill.replica_s += TICK_S * (len(self._replicas) + len(self._starting))
        self.bill.most = max(self.bill.most, len(serving))
        target = self.policy.decide(
            self.now,
            target=self._target,
            reports={name: self._reports.get(name) for name in serving},
            ongoing=sum(flow.replica is None or flow.replica.name in serving for flow in self._flows.values()),
        )
        self.bill.changes += target != self._target
        self._target = target
        self._follow(serving)
        self._reports = {name: self._report(name) for name in serving}

    def _follow(self, serving: list[str]) -> None:
        """Start or drain, as the target says: those that are not there yet go first, then the newest."""
        missing = self._target - len(serving) - len(self._starting)
        self._starting += [self.now + self._start_s] * missing
        while missing < 0 and self._starting:
            self._starting.pop()
            missing += 1
        for name in serving[len(serving) + missing :] if missing < 0 else ():
            self._draining[name] = self._replicas[name]
            for ingress in self._ingresses:
                ingress.lose(name)

    def _end_drained(self) -> None:
        busy = {flow.replica.name for flow in self._flows.values() if flow.replica} if self._draining else set()
        for name in [name for name in self._draining if name not in busy]:
            self._settle(self._draining.pop(name))
            del self._replicas[name], self._watches[name]

    def _report(self, name: str) -> LoadReport:
        replica = self._replicas[name]
        before = replica.wakes_at
        report = self._watches[name].report(replica.stats())
        self._watch(replica, before)
        return report

    # What the world does, with an eye on it

    def _join(self) -> SimReplica:
        replica = super()._join()
        self._watches[replica.name] = LoadWatch(clock=lambda: self.now)
        return replica

    def _beat(self, replica: SimReplica) -> None:
        if replica.name not in self._draining:
            super()._beat(replica)

    def _deliver(self, flow: _Flow, attempt: int) -> None:
        if flow.replica is not None and flow.num_sent == attempt:
            self._watches[flow.replica.name].came(flow.request.id)
        super()._deliver(flow, attempt)

    def _hear(self, event: TokenEvent) -> None:
        flow = self._flows[event.id]
        assert flow.replica is not None, "a replica answers what it was sent"
        watch = self._watches[flow.replica.name]
        watch.spoke(event.id)
        super()._hear(event)
