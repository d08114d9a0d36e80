"""`shoal drain-node`: an operator's, or a hook's, word that a machine is about to go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import StartupError

if TYPE_CHECKING:
    from .draining import RayNodes

POLL_S = 0.5


def drain_node(
    node: Annotated[str | None, typer.Argument(metavar="NODE", help="Ray's id of it; default: this machine.")] = None,
    *,
    in_s: Annotated[float, typer.Option("--in-s", min=0, help="Seconds until it goes.")] = 60.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing lies there, or it is time.")] = False,
) -> None:
    """Move everything off a node of the running Ray cluster, before it is taken away.

    Replacements start elsewhere first, what is new goes to others at once, and what still runs shortly before the end
    is handed over. It cannot be taken back: end Ray on the node, and start it again.
    """
    deadline = time.time() + in_s
    nodes, node = _tell(node, deadline)
    print(f"{node} goes in {in_s:g} s: Ray drains it", flush=True)
    while wait and time.time() < deadline and not nodes.is_empty(node):
        time.sleep(POLL_S)


def _tell(node: str | None, deadline: float) -> tuple[RayNodes, str]:
    """Raises StartupError: there is no cluster here, or it refuses."""
    import ray

    from .draining import RayNodes
    from .notice import Notice

    try:
        ray.init(address="auto", log_to_driver=False, configure_logging=False)
        nodes = RayNodes()
        nodes.drain(node or nodes.here, Notice(deadline, "shoal drain-node"))
    except (ConnectionError, RuntimeError) as error:
        raise StartupError(f"no Ray cluster is reached from here: {error}") from None
    return nodes, node or nodes.here
