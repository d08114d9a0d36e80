"""What leaves: nodes that Ray drains, and replicas that Serve shuts down. Whoever has a part there hears of it in time.

Ray's own list of draining nodes is where all word of a machine's end meets: a cloud's notice (notice.py), `shoal
drain-node`, Ray's autoscaler. Serve starts replacements for what lies on such nodes. Each of our processes looks at the
list itself, for a replica of several stages lies on several nodes, and Serve looks at one of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..router.replica import Depart
from ..runtime.errors import StartupError
from .notice import Notice, select_notice, watch

logger = logging.getLogger("shoal.cluster")

LOOK_EVERY_S = 1.0
CALL_TIMEOUT_S = 5.0


class RayNodes:
    """Ray's list of nodes that are to go, kept by its GCS. Calls block; they raise ConnectionError where it is down."""

    def __init__(self) -> None:
        """Call it where Ray is connected."""
        import ray

        context = ray.get_runtime_context()
        self.here: str = context.get_node_id()
        core: Any = import_module("ray._raylet")
        self._gcs: Any = core.GcsClient(address=context.gcs_address)

    def drain(self, node: str, notice: Notice) -> None:
        """Nothing new is placed on that node, and what is there moves. Raises StartupError: Ray refuses."""
        messages: Any = import_module("ray.core.generated.autoscaler_pb2")
        deadline_ms = 0 if notice.deadline is None else max(1, round(notice.deadline * 1000))
        reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        with _gcs_errors():
            accepted, why = self._gcs.drain_node(node, reason, notice.reason, deadline_ms)
        if not accepted:
            raise StartupError(f"Ray does not drain node {node}: {why}")

    def is_empty(self, node: str) -> bool:
        """Whether nothing lies there that asked for a part of the node."""
        state: Any = import_module("ray._private.state")
        return bool(state.total_resources_per_node().get(node) == state.available_resources_per_node().get(node))

    def draining(self) -> Mapping[str, float | None]:
        """Node to the unix time when it goes; None: nobody says."""
        with _gcs_errors():
            found: Mapping[str, int] = self._gcs.get_draining_nodes(timeout=CALL_TIMEOUT_S)
        return {node: deadline / 1000 if deadline else None for node, deadline in found.items()}


@contextmanager
def _gcs_errors() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise ConnectionError(f"the GCS does not answer: {type(error).__name__}") from None


async def report_notices(source: str, nodes: RayNodes) -> None:
    """Tell Ray for ever what `source` (`server.notice`) says of this machine; `{node}` in it is the node's id."""

    async def tell(notice: Notice) -> None:
        logger.warning("this machine is to go (%s): Ray drains node %s", notice.reason, nodes.here)
        try:
            await asyncio.to_thread(nodes.drain, nodes.here, notice)
        except StartupError as error:
            logger.error("%s", error)

    await watch(await select_notice(source.replace("{node}", nodes.here)), tell)


async def watch_nodes(source: str, depart: Depart, also: Callable[[], Iterable[str]] = tuple) -> None:
    """Call `depart` when this node, or one of those that `also` names, is to go; and again where it is sooner.

    source: see `report_notices`, which runs along.
    """
    try:
        nodes = RayNodes()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(report_notices(source, nodes))
            tasks.create_task(follow(nodes.draining, lambda: {nodes.here, *also()}, depart))
    except Exception:
        logger.exception("no word of a machine's end will be heard here any more")
        raise


async def follow(
    draining: Callable[[], Mapping[str, float | None]],
    ours: Callable[[], set[str]],
    depart: Depart,
    *,
    now: Callable[[], float] = time.time,
) -> None:
    """Look for ever which nodes drain."""
    told: dict[str, float | None] = {}
    async with asyncio.TaskGroup() as departures:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                found = await asyncio.to_thread(draining)
            except ConnectionError as error:
                logger.debug("which nodes drain is not known: %s", error)
                continue
            for node in sorted(found.keys() & ours()):
                if node not in told or told[node] != found[node]:
                    told[node] = deadline = found[node]
                    departures.create_task(_depart(depart, None if deadline is None else deadline - now()))


async def _depart(depart: Depart, left_s: float | None) -> None:
    await depart(left_s)


def on_shutdown(call: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a Serve replica: have `call` run in this event loop from when Serve begins to shut the replica down.

    Serve itself only waits for the requests that run, and ends the process once the time is over: whoever streams then
    would see an end of file for an end.
    """
    replica: Any = import_module("ray.serve._private.replica").Replica
    shut_down = replica.perform_graceful_shutdown
    loop = asyncio.get_running_loop()
    tasks: list[Any] = []

    async def perform(self: Any) -> None:
        if not tasks:
            tasks.append(asyncio.run_coroutine_threadsafe(call(), loop))
        await shut_down(self)

    replica.perform_graceful_shutdown = perform
