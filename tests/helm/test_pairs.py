"""Every pair of what can be chosen in the chart is rendered together once, and held to what a cluster asks of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache, reduce
from itertools import combinations, product
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shoal.cluster.app import PartArgs
from shoal.cluster.ingress import IngressArgs, UserConfig

from .chart import Values, _merge, manifests, needs_helm, of_kind, pod_templates, ray_service
from .crds import ray_service_schema, repeated, validators
from .kuberay import complaints
from .test_chart import KUBERNETES, OTHERS

pytestmark = [needs_helm, pytest.mark.slow]
PATH = "/models/org/name"
OFF: Values = {}
CHOICES: dict[str, list[Values]] = {
    "redis": [
        OFF,
        {"redis": {"mode": "none"}},
        {"redis": {"tls": {"enabled": True, "existingSecret": "redis-tls"}, "persistence": {"enabled": False}}},
        {"redis": {"mode": "external", "external": {"url": "redis://h:6379"}}},
        {"redis": {"mode": "external", "external": {"url": "rediss://h/1", "caSecret": "ca", "existingSecret": "123"}}},
    ],
    "state": [OFF, {"cluster": {"gcsFaultTolerance": False}}],
    "way in": [
        OFF,
        {"ingress": {"enabled": True}},
        {"ingress": {"enabled": True, "className": "nginx", "host": "llm.example", "tlsSecret": "tls"}},
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gw", "namespace": "gateways"}]}},
        {"cluster": {"upgrade": {"gatewayClassName": "istio"}}, "service": {"type": "LoadBalancer"}},
    ],
    "weights": [
        OFF,
        {"weights": {"hub": {"existingSecret": "hub"}, "cache": {"claimName": "cache"}}},
        {"engine": {"model": PATH}, "weights": {"source": "image"}},
        {"engine": {"model": PATH}, "weights": {"source": "pvc", "pvc": {"claimName": "models", "subPath": "1e3"}}},
        {
            "engine": {"model": f"{PATH}.gguf"},
            "weights": {
                "source": "objectStore",
                "objectStore": {"url": "s3://b/p", "endpoint": "https://s3.example", "existingSecret": "keys"},
            },
        },
    ],
    "grid": [
        OFF,
        {"engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}},
        {
            "engine": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            "cluster": {"replica": {"gpusPerNode": 2}},
        },
        {"engine": {"device": "cpu"}},
    ],
    "scale": [
        OFF,
        {"server": {"replicas": 3, "ingresses": 1}},
        {"autoscaling": {"min_replicas": 0, "max_replicas": 2}},
        {"autoscaling": {"min_replicas": 2, "max_replicas": 8, "idle_s": 30.5}},
    ],
    "beside": [
        OFF,
        {"variants": [{"name": "true"}], "rollout": {"weights": {"stable": 0.5, "true": 0.5}}},
        {
            "variants": [{"name": "a", "engine": {"max_num_seqs": 8}}, {"name": "b", "replicas": 2}],
            "models": [{"name": "n", "served_model_name": ["n"], "autoscaling": {"max_replicas": 1}}],
            "router": {"ladder": [{"load": 2, "model": "n"}]},
            "cluster": {"parts": {"n": {"gpusPerNode": 64, "runtimeClassName": "nvidia"}}},
        },
    ],
    "keys": [
        OFF,
        {"secrets": {"existingSecret": "1e3"}},
        {"server": {"allow_anonymous": True}},
        {"router": {"tenants": [{"name": "t", "keys": ["sha256:" + 64 * "0"], "tokens_per_minute": 1e6}]}},
    ],
    "proxy": [OFF, {"server": {"haproxy": False, "max_surge_percent": 0, "notice": "auto"}}],
    "policy": [
        OFF,
        {"networkPolicy": {"enabled": False}},
        {"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"a": "b"}}}]}},
    ],
    "budget": [OFF, {"podDisruptionBudget": {"enabled": False}}],
    "monitors": [
        OFF,
        {"monitoring": {"serviceMonitor": True, "dashboard": True, "port": 9500}},
        {
            "monitoring": {
                "podMonitor": True,
                "alerts": True,
                "labels": {"release": "p"},
                "runbookUrl": "https://r/o.md",
            }
        },
    ],
    "pods": [
        OFF,
        {"serviceAccount": {"name": "reader"}, "image": {"pullSecrets": [{"name": "registry"}], "tag": "1.0"}},
        {
            "cluster": {
                "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                "replica": {"priorityClassName": "high", "annotations": {"a": "1"}, "drainSeconds": 20, "surge": 0},
                "router": {"affinity": {"podAntiAffinity": {}}, "topologySpreadConstraints": []},
            }
        },
    ],
}


def cover() -> Iterator[tuple[Values, ...]]:
    """Rows with one choice of each kind, so that every two choices meet in one."""
    kinds = list(CHOICES)
    rng = random.Random(7)
    left = {
        pair
        for a, b in combinations(kinds, 2)
        for pair in product([(a, i) for i in range(len(CHOICES[a]))], [(b, i) for i in range(len(CHOICES[b]))])
    }
    while left:
        sure = dict(min(left))
        drawn = [{kind: sure.get(kind, rng.randrange(len(CHOICES[kind]))) for kind in kinds} for _ in range(200)]
        met, row = max(((_met(row, left), row) for row in drawn), key=lambda found: len(found[0]))
        left -= met
        yield tuple(CHOICES[kind][row[kind]] for kind in kinds)


def _met(row: dict[str, int], left: set[Any]) -> set[Any]:
    return set(combinations(row.items(), 2)) & left


ROWS = list(cover())


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_what_is_chosen_together_is_taken_together(row: int) -> None:
    found = manifests(reduce(_merge, ROWS[row], {}))
    for manifest in found:
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    service = ray_service(found)
    assert complaints(service) == []
    rendered = yaml.safe_load(service["spec"]["serveConfigV2"])
    ingress, *parts = rendered["applications"]
    IngressArgs.model_validate(ingress["args"])
    told = UserConfig.model_validate(ingress["deployments"][0]["user_config"])
    assert [each.name for each in told.parts] == [PartArgs.model_validate(part["args"]).part for part in parts]
    pods = [made["spec"] for made in pod_templates(service).values()]
    pods += [each["spec"]["template"]["spec"] for each in of_kind(found, "StatefulSet")]
    for spec in pods:
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            names = [variable["name"] for variable in container.get("env", ())]
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(set(names)) == len(names)
            assert len(set(paths)) == len(paths)
    if "SHOAL_KUBERAY_CRDS" in os.environ:
        folder = Path(os.environ["SHOAL_KUBERAY_CRDS"])
        strictly, schema = _definitions(folder)
        assert not [error.message for error in strictly.iter_errors(service)]
        assert not list(repeated(schema, service))


@cache
def _definitions(folder: Path) -> tuple[Any, Any]:
    """The RayService's schema, strict and as it is."""
    return validators(folder)["ray.io/v1", "RayService"], ray_service_schema(folder)
