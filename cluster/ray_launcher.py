"""Where a replica's ranks live on Ray: one bundle of its placement group a stage, and in each an agent that starts
them.

A bundle lies on one node, so the shards of a stage share one (tensor parallelism stays inside a node) while stages may
be spread (pipelines cross nodes). An agent is an actor that does next to nothing: it starts its stage's ranks as
processes, which therefore carry no Ray worker inside, tells how they ended, and is gone, they with it, when the replica
is. Ray calls bring ranks up and take them down; what happens in between travels on the replica's own wires.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
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
from .draining import RayNodes, report_notices

log = logging.getLogger(__name__)

CPUS_A_RANK = 0.1  # cores are shared out by threads, not by Ray
ENGINE_CPUS = 0.1
CALL_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 2.0  # a node that is cut off does not answer, and until then nobody is told that the group has failed
PATIENCE_S = 5.0  # before the operator is told what is waited for
AGAIN_S = 0.5
LOOK_EVERY_S = 1.0


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

    def __init__(self, grid: Grid, *, gpus: bool, timeout_s: float, notice: str = "none") -> None:
        """Call it in the replica's actor. timeout_s: to wait for room. notice: see `draining.report_notices`."""
        context = ray.get_runtime_context()
        self.node: str = context.get_node_id()
        self.address: str = ray.util.get_node_ip_address()
        self._grid = grid
        self._gpus = gpus
        self._timeout_s = timeout_s
        self._notice = notice
        group = ray.util.get_current_placement_group()
        assert group is not None, "a replica of several ranks is deployed with a placement group"
        self._group: PlacementGroup = group
        self._agents: dict[int, Any] = {}  # by stage; kept from one start to the next, as their nurseries are
        self._asked_at: dict[int, float] = {}

    def warm(self) -> None:
        """Nothing: agents warm themselves while they are being placed."""

    def launch(self, starts: Sequence[RankStart]) -> None:
        """Raises StartupError."""
        self._place_agents()
        tp = self._grid.tp
        calls = [
            agent.launch.remote([msgspec.msgpack.encode(start) for start in starts[stage * tp : (stage + 1) * tp]])
            for stage, agent in self._agents.items()
        ]
        try:
            ray.get(calls, timeout=CALL_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            raise StartupError(f"the ranks could not be started: {_first_line(error)}") from None

    def _place_agents(self) -> None:
        """An agent in each stage's bundle, wherever Ray puts it; where a node has left, once there is another."""
        began = time.monotonic()
        waiting: dict[Any, int] = {}
        for stage in range(self._grid.pp):
            if stage not in self._agents:
                self._agents[stage] = self._agent(stage)
            waiting[self._agents[stage].is_placed.remote()] = stage
        while waiting:
            answers, _ = ray.wait(list(waiting), timeout=PATIENCE_S)
            for answer in answers:
                stage = waiting.pop(answer)
                try:
                    ray.get(answer)
                except RayError:  # its node has just gone, and Ray had not noticed yet
                    time.sleep(AGAIN_S)
                    self._agents[stage] = self._agent(stage)
                    waiting[self._agents[stage].is_placed.remote()] = stage
            seconds = time.monotonic() - began
            if waiting and seconds > self._timeout_s:
                raise StartupError(
                    f"after {seconds:.0f} s (--start-timeout-s) Ray has no room for {self._wanted(waiting.values())}"
                )
            if waiting and not answers:
                log.info("waiting %.0f s for Ray to have room for %s", seconds, self._wanted(waiting.values()))

    def _agent(self, stage: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=1 + stage)
        num_gpus = self._grid.tp if self._gpus else 0
        options = {"num_cpus": CPUS_A_RANK * self._grid.tp, "num_gpus": num_gpus, "max_concurrency": 4}
        return ray.remote(StageAgent).options(scheduling_strategy=place, **options).remote(self._notice)

    def _wanted(self, stages: Iterable[int]) -> str:
        bundle = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles(self._grid, gpus=self._gpus)[1].items())
        return f"stage {' and '.join(map(str, sorted(stages)))}: {bundle} each, on one node"

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        now = time.monotonic()
        if timeout_s == 0 and now < self._asked_at.get(rank, 0.0) + LOOK_EVERY_S:  # a call to Ray is no glance
            return None
        self._asked_at[rank] = now
        status: int | None = self._ask("exit_status", rank, timeout_s)
        return status

    def last_words(self, rank: int) -> str:
        return self._ask("last_words", rank) or ""

    def _ask(self, method: str, rank: int, *args: Any) -> Any:
        """None where the agent, or its node, is gone as well."""
        agent = self._agents.get(rank // self._grid.tp)
        if agent is None:
            return None
        try:
            return ray.get(getattr(agent, method).remote(rank, *args), timeout=CALL_TIMEOUT_S)
        except (RayError, GetTimeoutError):
            return None

    def kill(self) -> None:
        """Agents that confirm it stay for the next start."""
        calls = {agent.kill.remote(): stage for stage, agent in self._agents.items()}
        deadline = time.monotonic() + KILL_TIMEOUT_S
        for call, stage in calls.items():
            try:
                ray.get(call, timeout=max(deadline - time.monotonic(), 0.0))
            except (RayError, GetTimeoutError):  # gone with its node, or deaf
                ray.kill(self._agents.pop(stage))

    def close(self) -> None:
        self.kill()
        for agent in self._agents.values():
            ray.kill(agent)
        self._agents.clear()


def _report_notices(source: str) -> None:
    asyncio.run(report_notices(source, RayNodes()))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class StageAgent:
    """The actor in a stage's bundle: a `ProcessLauncher` behind Ray calls, on whatever node the bundle lies."""

    def __init__(self, notice: str = "none") -> None:
        devices = ray.get_gpu_ids()
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
        self._launcher = ProcessLauncher(environment=environment, preload=("shoal.runtime.rank",))
        self._launcher.warm()
        self._node = ray.get_runtime_context().get_node_id()
        listen = threading.Thread(target=_report_notices, args=(notice,), name="shoal-notice", daemon=True)
        listen.start()

    def is_placed(self) -> bool:
        """Answers once the agent runs."""
        return True

    def launch(self, starts: list[bytes]) -> None:
        decoded = [msgspec.msgpack.decode(start, type=RankStart) for start in starts]
        self._launcher.launch([msgspec.structs.replace(start, node=self._node) for start in decoded])

    def exit_status(self, rank: int, timeout_s: float) -> int | None:
        return self._launcher.exit_status(rank, timeout_s=timeout_s)

    def last_words(self, rank: int) -> str:
        return self._launcher.last_words(rank)

    def kill(self) -> None:
        self._launcher.kill()
