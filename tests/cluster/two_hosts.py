"""Run by test_two_hosts.py on the first of two hosts that Ray runs on: our app, with a stage on each.

Prints a line once `/ready` is 200, then holds what it holds until its standard input ends. Arguments: model, this
host's address, the other's, the port to serve on, a folder.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shoal.cluster.app import on_device
from shoal.cluster.board import Board
from shoal.cluster.config import load_config
from shoal.cluster.serve import run_targets, status_of

START_S = 120
READY_S = 100.0


class Lodger:
    """An actor that does nothing but hold a part of a node."""


def main(model: str, here: str, there: str, port: int, folder: Path) -> None:
    signal.alarm(START_S)  # ends it: nobody waits for ever
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
    ray.init(address=f"{here}:6379", log_to_driver=False)
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, "Ray has no second node")
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}
    # A stage asks for 0.2 CPUs, engine and ingress for 0.1 each, and each node has one. First there is room for the
    # ingress alone, then here for engine and stage, and there for no more than a stage.
    lodgers = [occupy(nodes[here], 0.6), occupy(nodes[there], 0.75)]
    last = occupy(nodes[there], 0.25)
    ray.get([lodger.__ray_ready__.remote() for lodger in (*lodgers, last)])
    serve.start(http_options={"host": here, "port": port}, proxy_location="HeadOnly")
    board = Board(folder / "board")
    serve.run_many(run_targets(config, board), wait_for_applications_running=False)
    until(lambda: status_of(here, port, "/health") == 200, "no ingress")
    ray.kill(last)
    until(lambda: status_of(here, port, "/ready") == 200, "not ready")
    signal.alarm(0)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


def occupy(node: str, cpus: float) -> Any:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Lodger).options(num_cpus=cpus, scheduling_strategy=place).remote()


def until(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
