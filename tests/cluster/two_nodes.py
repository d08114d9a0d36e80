"""Run by test_two_nodes.py in a process of its own: a Ray cluster of two nodes, and our app with a stage on each.

Prints a line once `/ready` is 200, then obeys its standard input until that ends: "leave" takes the second node away,
"join" adds another. Arguments: model, port, folder.
"""

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from shoal.cluster.board import Board
from shoal.cluster.config import load_config
from shoal.cluster.ray_env import ray_environment


def main(model: str, port: int, folder: Path) -> None:
    os.environ.update(ray_environment(folder, haproxy=False))
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # `ray.init` would make one, a Cluster does not
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from shoal.cluster.app import on_device
    from shoal.cluster.serve import run_targets, status_of

    overrides = {
        ("router", "secret"): "s" * 64,
        ("server", "redis_url"): "none",
        ("engine", "model"): model,
        ("engine", "dtype"): "float32",
        ("engine", "device"): "cpu",
        ("engine", "max_model_len"): 256,
        ("engine", "tensor_parallel_size"): 2,
        ("engine", "pipeline_parallel_size"): 2,
        ("server", "haproxy"): False,
    }
    config = on_device(load_config(overrides), num_gpus=0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    # A stage asks for 0.2 CPUs, engine and ingress for 0.1 each. The ingress has to be on the first node, as the second
    # one is full; then there is room for a stage, and so the first has room for the other and the engine.
    first = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != second.node_id)
    lodgers = [occupy(ray, first, 0.6), occupy(ray, second.node_id, 0.75), occupy(ray, second.node_id, 0.25)]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        board = Board(folder / "board")
        serve.run_many(run_targets(config, board), wait_for_applications_running=False)
        while status_of("127.0.0.1", port, "/health") != 200:
            time.sleep(0.2)
        ray.kill(lodgers.pop())
        deadline = time.monotonic() + 180
        while status_of("127.0.0.1", port, "/ready") != 200:
            assert time.monotonic() < deadline, board.refusal
            time.sleep(0.2)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for command in sys.stdin:
            if command.strip() == "leave":
                cluster.remove_node(second, allow_graceful=False)
            else:
                second = cluster.add_node(num_cpus=1)
            sys.stdout.write(command)
            sys.stdout.flush()
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def occupy(ray: Any, node: str, cpus: float) -> Any:
    """An actor that does nothing but hold a part of a node, from now on."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Lodger:
        pass

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    lodger = ray.remote(Lodger).options(num_cpus=cpus, scheduling_strategy=place).remote()
    ray.get(lodger.__ray_ready__.remote())
    return lodger


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
