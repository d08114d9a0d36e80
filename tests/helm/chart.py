"""The chart, rendered by the real helm; and the matrix of values that its tests look at."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "shoal"
HELM = Path(sys.prefix) / "bin" / "helm"
GATEWAY_API = "gateway.networking.k8s.io/v1"

needs_helm = pytest.mark.skipif(not HELM.exists(), reason=f"there is no {HELM}: `make dev` brings it")

Values = dict[str, Any]
PATH = "/models/some-model"
MATRIX: dict[str, Values] = {
    "defaults": {},
    "tp2": {"engine": {"tensor_parallel_size": 2}},
    "tp8-pp2-two-hosts": {
        "engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "pp_layers": [20, 16]},
        "autoscaling": {"min_replicas": 0, "max_replicas": 3, "ttft_s": 1.5},
    },
    "models-and-variants": {
        "engine": {"tensor_parallel_size": 2, "max_model_len": 8192},
        "server": {"replicas": 3, "ingresses": 4, "drain_timeout_s": 12.5, "max_surge_percent": 0},
        "router": {"served_model_name": ["main"], "max_in_flight": 64, "tenants": [{"name": "a", "weight": 2}]},
        "variants": [
            {"name": "canary", "engine": {"kv_cache_dtype": "fp8"}},
            {"name": "next", "engine": {"model": "org/next", "pipeline_parallel_size": 4}, "replicas": 2},
        ],
        "models": [
            {
                "name": "small",
                "engine": {"model": "org/small", "tensor_parallel_size": 1, "speculative_model": "org/draft"},
                "served_model_name": ["small", "tiny"],
                "autoscaling": {"min_replicas": 2, "max_replicas": 5},
            }
        ],
        "rollout": {
            "weights": {"stable": 95, "canary": 5},
            "shadow": {"next": 0.1},
            "sticky_by": "user",
            "rollback": {"max_ttft_s": 2},
        },
        "cluster": {"parts": {"small": {"gpusPerNode": 1, "nodeSelector": {"gpu": "l4"}}}},
    },
    "external-redis-tls": {
        "redis": {
            "mode": "external",
            "external": {"url": "rediss://cache.example:6380/2", "existingSecret": "cache", "caSecret": "cache-ca"},
        }
    },
    "redis-tls": {"redis": {"tls": {"enabled": True}, "persistence": {"enabled": False}}},
    "no-redis": {"redis": {"mode": "none"}},
    "ingress": {
        "ingress": {"enabled": True, "className": "nginx", "host": "llm.example", "tlsSecret": "llm-tls"},
        "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"a": "b"}},
    },
    "httproute": {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}], "hostnames": ["llm.example"]}},
    "incremental": {"cluster": {"upgrade": {"gatewayClassName": "istio"}}},
    "monitoring": {
        "monitoring": {
            "serviceMonitor": True,
            "podMonitor": True,
            "dashboard": True,
            "alerts": True,
            "labels": {"release": "prometheus"},
        }
    },
    "pvc": {
        "engine": {"model": PATH},
        "weights": {"source": "pvc", "pvc": {"claimName": "models", "subPath": "all"}},
    },
    "hub": {"weights": {"hub": {"existingSecret": "hub"}, "cache": {"claimName": "hub-cache"}}},
    "object-store": {
        "engine": {"model": PATH},
        "weights": {
            "source": "objectStore",
            "objectStore": {"url": "s3://bucket/models", "region": "eu", "existingSecret": "bucket"},
        },
        "serviceAccount": {"name": "reader"},
    },
    "existing-secrets": {"secrets": {"existingSecret": "mine"}},
    "cpu": {
        "engine": {"device": "cpu", "tensor_parallel_size": 2},
        "server": {"ingresses": 1, "haproxy": False, "allow_anonymous": True},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "cluster": {
            "gcsFaultTolerance": False,
            "env": [{"name": "OMP_NUM_THREADS", "value": "4"}],
            "head": {"priorityClassName": "high", "tolerations": [{"operator": "Exists"}]},
        },
    },
}


def helm(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Of the chart; nothing of this machine's helm or cluster comes into it."""
    return subprocess.run(
        [str(HELM), *arguments], input=stdin, capture_output=True, text=True, check=False, env={"HOME": "/nonexistent"}
    )


def template(values: Values, *, name: str = "release") -> subprocess.CompletedProcess[str]:
    """`helm template` with the values over the chart's. As JSON, for Python and Go quote YAML differently."""
    return helm("template", name, str(CHART), "-n", "llm", "-a", GATEWAY_API, "-f", "-", stdin=json.dumps(values))


def manifests(values: Values) -> list[dict[str, Any]]:
    """What is rendered."""
    done = template(values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@cache
def case(name: str) -> tuple[dict[str, Any], ...]:
    """The manifests of one case of the matrix."""
    return tuple(manifests(MATRIX[name]))


def of_kind(found: tuple[dict[str, Any], ...] | list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in found if each["kind"] == kind]


def ray_service(found: tuple[dict[str, Any], ...] | list[dict[str, Any]]) -> dict[str, Any]:
    (service,) = of_kind(found, "RayService")
    return service


def group(service: dict[str, Any], name: str) -> dict[str, Any]:
    """A worker group of a RayService."""
    (found,) = [g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == name]
    return dict(found)


def pod_templates(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group -> its pods' template; the head's, too."""
    cluster = service["spec"]["rayClusterConfig"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        **{g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]},
    }


def merged(values: Values) -> Values:
    """The values over the chart's own, as helm merges them."""
    return _merge(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), values)


def _merge(below: Values, above: Values) -> Values:
    both = dict(below)
    for key, value in above.items():
        old = below.get(key)
        both[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
