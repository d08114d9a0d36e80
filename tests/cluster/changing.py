"""Run by test_change_without_loss.py in a process of its own: a Ray cluster of three nodes and our applications on it.

The ingresses lie on the head, replicas on the others. Prints a line once `/ready` is 200, then obeys its standard
input until that ends: "deploy JSON" applies a config with these changes of its sections, "drain NODE SECONDS" puts down
the notice of a node, "drain-node NODE" is the command of that name; it answers each with a line. "replicas" and
"ingresses" answer with what Ray has of them, each one's node by its process. Arguments: model, port, folder.
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

CHANGES_UNTIL_S = 120.0


class Deployment:
    """What is applied: a config and its changes so far."""

    def __init__(self, model: str, port: int, folder: Path) -> None:
        self._port = port
        secret = folder / "secret"
        secret.write_text("s" * 64)
        secret.chmod(0o600)
        self._values: dict[tuple[str, str], Any] = {
            ("router", "secret_file"): str(secret),
            ("server", "redis_url"): "none",
            ("server", "port"): port,
            ("server", "replicas"): 2,
            ("server", "ingresses"): 2,
            ("server", "drain_timeout_s"): 0.4,
            ("server", "ingress_drain_timeout_s"): 120.0,
            ("server", "notice"): f"file:{folder}/{{node}}",
            ("server", "node_labels"): {"shoal": "replica"},
            ("server", "ingress_node_labels"): {"shoal": "ingress"},
            ("engine", "model"): model,
            ("engine", "dtype"): "float32",
            ("engine", "device"): "cpu",
            ("engine", "deterministic"): True,
            ("engine", "num_threads"): 1,
            ("engine", "kv_cache_memory_gb"): 0.05,
            ("engine", "max_num_seqs"): 16,
        }

    def apply(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        from shoal.cluster.serve_config import serve_config

        for section, fields in changes.items():
            self._values |= {(section, name): value for name, value in fields.items()}
        config = serve_config(load_config(self._values))
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config))
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


def main(model: str, port: int, folder: Path) -> None:
    run_dir = tempfile.mkdtemp(prefix="shoal-")  # a short name: HAProxy has sockets there
    os.environ.update(ray_environment(Path(run_dir), haproxy=True))
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # `ray.init` would make one, a Cluster does not
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from shoal.cluster.serve import status_of

    head = {"num_cpus": 2, "include_dashboard": False, "labels": {"shoal": "ingress"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, labels={"shoal": "replica"})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        deployment = Deployment(model, port, folder)
        deployment.apply({})
        while status_of("127.0.0.1", port, "/ready") != 200:
            time.sleep(0.1)
        answer("ready")
        for line in sys.stdin:
            command, *rest = line.split(maxsplit=1)
            if command == "deploy":
                deployment.apply(json.loads(rest[0]))
                answer("done")
            elif command == "drain":
                node, seconds = rest[0].split()
                (folder / node).write_text(seconds)
                answer("done")
            elif command == "drain-node":
                answer(json.dumps(drain_node(rest[0].strip(), str(cluster.address))))
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
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
