"""Run by changes.py in a process of its own: a Ray cluster and our applications on it.

The ingresses lie on the head; replicas do, too, or where there are further nodes, on those. Prints a line once `/ready`
is 200, then obeys its standard input until that ends: "tell JSON" applies a config with these changes of its sections,
"deploy JSON" does and waits until all runs, "drain NODE SECONDS" puts down the notice of a node, "drain-node NODE" is
the command of that name; it answers each with a line. "replicas" and "ingresses" answer with what Ray has of them, each
one's node by its process; "ports" with each ingress's own, by its name. Arguments: folder, with a config in it, and how
many further nodes.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.cluster.config import load_config
from shoal.cluster.ray_env import ray_environment

CONFIG = "config.json"
CHANGES_UNTIL_S = 120.0


class Deployment:
    """What is applied: a config and its changes so far."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tree: dict[str, Any] = json.loads(file.read_text())

    @property
    def port(self) -> int:
        return int(self._tree["server"]["port"])

    def tell(self, changes: Mapping[str, Any]) -> None:
        """Of each section what changes; a rollout is told whole."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        from shoal.cluster.serve_config import serve_config

        for section, value in changes.items():
            self._tree[section] = value if section == "rollout" else {**self._tree.get(section, {}), **value}
        self._file.write_text(json.dumps(self._tree))
        config = serve_config(load_config({}, file=self._file))
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config))

    def apply(self, changes: Mapping[str, Any]) -> None:
        """Returns when all runs."""
        from ray import serve

        self.tell(changes)
        deadline = time.monotonic() + CHANGES_UNTIL_S
        time.sleep(1.0)
        while {app.status for app in serve.status().applications.values()} != {"RUNNING"}:
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.2)


def drain_node(node: str, address: str) -> dict[str, Any]:
    """`shoal drain-node --wait`: its exit code and how long it took."""
    began = time.monotonic()
    command = [sys.executable, "-P", "-c", "from shoal.cluster.cli import main; main()", "drain-node", node]
    done = subprocess.run([*command, "--in-s", "60", "--wait"], env={**os.environ, "RAY_ADDRESS": address}, check=False)
    return {"code": done.returncode, "seconds": time.monotonic() - began}


def actors(kind: str) -> dict[int, str]:
    """Processes of replicas or ingresses, and their nodes."""
    from ray._private.state import actors as all_actors

    found = [actor for actor in all_actors().values() if actor["State"] == "ALIVE"]
    return {actor["Pid"]: actor["Address"]["NodeID"] for actor in found if actor["ActorClassName"].endswith(kind)}


def ports() -> dict[str, int]:
    """Where HAProxy finds each ingress."""
    import ray
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    groups = ray.get(client._controller.get_target_groups.remote(from_proxy_manager=True))
    return {target.name: target.port for group in groups for target in group.targets}


def main(folder: Path, num_nodes: int) -> None:
    run_dir = tempfile.mkdtemp(prefix="shoal-")  # a short name: HAProxy has sockets there
    os.environ.update(ray_environment(Path(run_dir), haproxy=True))
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # `ray.init` would make one, a Cluster does not
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from shoal.cluster.serve import status_of

    deployment = Deployment(folder / CONFIG)
    head = {"num_cpus": 2, "include_dashboard": False, "labels": {"shoal": "ingress"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, labels={"shoal": "replica"})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": deployment.port}, proxy_location="HeadOnly")
        deployment.apply({})
        while status_of("127.0.0.1", deployment.port, "/ready") != 200:
            time.sleep(0.1)
        answer("ready")
        for line in sys.stdin:
            command, *rest = line.split(maxsplit=1)
            if command == "tell":
                deployment.tell(json.loads(rest[0]))
                answer("done")
            elif command == "deploy":
                deployment.apply(json.loads(rest[0]))
                answer("done")
            elif command == "drain":
                node, seconds = rest[0].split()
                (folder / node).write_text(seconds)
                answer("done")
            elif command == "drain-node":
                answer(json.dumps(drain_node(rest[0].strip(), str(cluster.address))))
            elif command == "ports":
                answer(json.dumps(ports()))
            else:
                answer(json.dumps(actors({"replicas": ":replica", "ingresses": ":ingress"}[command])))
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(run_dir, ignore_errors=True)


def answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
