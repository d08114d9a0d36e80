"""What KubeRay would send to Ray, sent to a Ray here: the rendered config serves, and the chart's own test passes."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from shoal.cluster.preflight import free_port
from shoal.cluster.processes import adopting_orphans

from ..tiny import tiny_model
from .chart import CHART, manifests, needs_helm, ray_service

KEY = "sk-shoal-of-a-test"


def here(config: str, folder: Path, *, port: int, metrics_port: int) -> str:
    """The rendered config for one machine: its files in the folder, on ports that are free, on loopback."""
    tree = yaml.safe_load(config.replace("/etc/shoal", str(folder)))
    tree["http_options"] = {"host": "127.0.0.1", "port": port}
    tree["applications"][0]["args"]["server"] |= {"metrics_host": "127.0.0.1", "metrics_port": metrics_port}
    return yaml.safe_dump(tree)


@needs_helm
@pytest.mark.ray
@pytest.mark.slow
def test_the_rendered_config_serves(tmp_path: Path) -> None:
    engine = {"device": "cpu", "dtype": "float32", "num_threads": 1, "kv_cache_memory_gb": 0.05, "max_num_seqs": 8}
    values = {
        "engine": {"model": str(tiny_model(tmp_path / "model")), **engine},
        "router": {"served_model_name": ["tiny"]},
        "server": {"haproxy": False, "ingresses": 1},
        "weights": {"source": "image"},
        "redis": {"mode": "none"},
    }
    port, metrics_port, dashboard = (free_port("127.0.0.1", 0) for _ in range(3))
    rendered = ray_service(manifests(values))["spec"]["serveConfigV2"]
    file = tmp_path / "serve.yaml"
    file.write_text(here(rendered, tmp_path, port=port, metrics_port=metrics_port))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "cluster-secret").write_text("s" * 64)
    (tmp_path / "secrets" / "api-key").write_text(KEY)
    script = Path(__file__).with_name("cluster_of_two.py")
    with adopting_orphans():  # whatever becomes of it, nothing of the cluster is left
        cluster = subprocess.Popen(
            [sys.executable, "-P", str(script), str(file), str(tmp_path), str(dashboard)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "t" * 48},
            text=True,
        )
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        assert any(line == "running\n" for line in cluster.stdout)
        url = f"http://127.0.0.1:{port}"
        asked = subprocess.run(
            [sys.executable, "-P", str(CHART / "files" / "ask.py"), url],
            env={**os.environ, "SHOAL_API_KEY": KEY},
            capture_output=True,
            text=True,
            check=False,
        )
        assert asked.returncode == 0, asked.stderr
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/v1/models", timeout=30)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as answer:
            assert b"shoal_" in answer.read()
        cluster.stdin.close()
        cluster.wait(60)
