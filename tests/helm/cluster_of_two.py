"""Run by test_deployed.py in a process of its own: Ray with a node for ingresses and one for replicas, as KubeRay makes
them, and the given declarative config sent to it by Ray's own client, as KubeRay does.

Prints a line once the applications run, then waits for the end of its standard input. Arguments: the config's file, a
folder, the dashboard's port.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from shoal.cluster.ray_env import ray_environment


def main(config: dict[str, Any], folder: Path, dashboard: int) -> None:
    os.environ.update(ray_environment(folder, haproxy=False))
    import ray
    from ray.cluster_utils import Cluster
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    head = {
        "num_cpus": 1,
        "labels": {"shoal/part": "router"},
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, labels={"shoal/part": "stable"})
        ray.init(address=cluster.address, log_to_driver=False)
        client = ServeSubmissionClient(f"http://127.0.0.1:{dashboard}")
        client.deploy_applications(config)
        deadline = time.monotonic() + 150
        while set(states := client_states(client)) != {"RUNNING"}:
            assert "DEPLOY_FAILED" not in states, client.get_serve_details()
            assert time.monotonic() < deadline, client.get_serve_details()
            time.sleep(0.2)
        sys.stdout.write("running\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        ray.shutdown()
        cluster.shutdown()


def client_states(client: Any) -> list[str]:
    return [app["status"] for app in client.get_serve_details()["applications"].values()] or ["NONE"]


if __name__ == "__main__":
    main(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]), int(sys.argv[3]))
