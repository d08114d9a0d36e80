"""Where a replica's ranks live on Ray: one bundle of its placement group a stage, and in each an agent that starts
them.

A bundle lies on one node, so the shards of a stage share one (tensor parallelism stays inside a node) while stages may
be spread (pipelines cross nodes). An agent is an actor that does next to nothing: it starts its stage's ranks as
processes, which therefore carry no Ray worker inside, tells how they ended, and is gone, they with it, when the replica
is. Ray calls bring ranks up and take them down; what happens in between travels on the replica's own wires.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..parallel.control import RankStart
from ..parallel.grid import Grid
from ..parallel.launcher import ProcessLauncher
from ..runtime.errors import StartupError

log = logging.getLogger(__name__)

CPUS_A_RANK = 0.1  # cores are shared out by threads, not by Ray
ENGINE_CPUS = 0.1
CALL_TIMEOUT_S = 10.0
PATIENCE_S = 5.0  # before the operator is told what is waited for


def bundles(grid: Grid, *, gpus: bool) -> list[dict[str, float]]:
    """What a replica asks of Ray: the engine's bundle, then one for each stage."""
    stage: dict[str, float] = {"CPU": CPUS_A_RANK * grid.tp}
    if gpus:
        stage["GPU"] = grid.tp
    return [{"CPU": ENGINE_CPUS}, *[stage] * grid.pp]


def cpus_needed(replicas: int, grid: Grid) -> int:
    """Of Ray's CPUs, for all replicas and the ingress."""
    each = ENGINE_CPUS + (CPUS_A_RANK * grid.size if grid.size > 1 else 0)
    return math.ceil(replicas * each + 1)


class RayLauncher:
    """A `parallel.launcher.Launcher` in the bundles of the calling actor's placement group."""

    def __init__(self, grid: Grid, *, gpus: bool) -> None:
        """Call it in the replica's actor."""
        context = ray.get_runtime_context()
        self.node: str = context.get_node_id()
        self.address: str = ray.util.get_node_ip_address()
        self._grid = grid
        self._gpus = gpus
        group = ray.util.get_current_placement_group()
        assert group is not None, "a replica of several ranks is deployed with a placement group"
        self._group: PlacementGroup = group
        self._agents: list[Any] = []

    def launch(self, starts: Sequence[RankStart]) -> None:
        self._agents = [self._agent(stage) for stage in range(self._grid.pp)]
        tp = self._grid.tp
        calls = [
            agent.launch.remote([msgspec.msgpack.encode(start) for start in starts[stage * tp : (stage + 1) * tp]])
            for stage, agent in enumerate(self._agents)
        ]
        self._await(calls)

    def _agent(self, stage: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=1 + stage)
        num_gpus = self._grid.tp if self._gpus else 0
        options = {"num_cpus": CPUS_A_RANK * self._grid.tp, "num_gpus": num_gpus, "max_concurrency": 4}
        return ray.remote(StageAgent).options(scheduling_strategy=place, **options).remote()

    def _await(self, calls: list[Any]) -> None:
        """A node may have to come first (again): say so, and wait. Whoever starts the group has the deadline."""
        began = time.monotonic()
        waiting = calls
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE_S)
            try:
                ray.get(done)
            except RayError as error:
                raise StartupError(f"Ray did not start the ranks: {type(error).__name__}: {error}"[:500]) from None
            if waiting:
                seconds = time.monotonic() - began
                log.info("waiting for Ray to place %d of %d stages (%.0f s)", len(waiting), len(calls), seconds)

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        status: int | None = self._ask("exit_status", rank, timeout_s)
        return status

    def last_words(self, rank: int) -> str:
        return self._ask("last_words", rank) or ""

    def _ask(self, method: str, rank: int, *args: Any) -> Any:
        """None where the agent, or its node, is gone as well."""
        if not self._agents:
            return None
        agent = self._agents[rank // self._grid.tp]
        try:
            return ray.get(getattr(agent, method).remote(rank, *args), timeout=CALL_TIMEOUT_S)
        except (RayError, GetTimeoutError):
            return None

    def kill(self) -> None:
        agents, self._agents = self._agents, []
        calls = [agent.kill.remote() for agent in agents]
        ray.wait(calls, num_returns=len(calls), timeout=CALL_TIMEOUT_S) if calls else None
        for agent in agents:
            ray.kill(agent)


class StageAgent:
    """The actor in a stage's bundle: a `ProcessLauncher` behind Ray calls, on whatever node the bundle lies."""

    def __init__(self) -> None:
        devices = ray.get_gpu_ids()
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
        self._launcher = ProcessLauncher(environment=environment)
        self._node = ray.get_runtime_context().get_node_id()

    def launch(self, starts: list[bytes]) -> None:
        decoded = [msgspec.msgpack.decode(start, type=RankStart) for start in starts]
        self._launcher.launch([msgspec.structs.replace(start, node=self._node) for start in decoded])

    def exit_status(self, rank: int, timeout_s: float) -> int | None:
        return self._launcher.exit_status(rank, timeout_s=timeout_s)

    def last_words(self, rank: int) -> str:
        return self._launcher.last_words(rank)

    def kill(self) -> None:
        self._launcher.kill()
