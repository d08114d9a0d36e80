"""What KubeRay's controller asks of a RayService beyond the schema, so that what is rendered here is not refused there.

After ray-operator 1.7, controllers/ray/utils/validation.go and controllers/ray/common.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME = 47
TAKEN = {"num-cpus", "num-gpus", "memory", "resources"}
FAULT_TOLERANCE = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def complaints(service: Mapping[str, Any]) -> list[str]:
    """A sentence for each rule that the RayService breaks."""
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    return [
        *_names(service["metadata"]["name"]),
        *_cluster(cluster, service["metadata"].get("annotations", {})),
        *(sentence for group in _groups(cluster) for sentence in _group(group)),
        *_upgrade(spec.get("upgradeStrategy", {}), cluster),
    ]


def _names(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME:
        yield f"the name {name} is longer than {MAX_NAME}"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name} is no DNS 1035 label"


def _cluster(cluster: Mapping[str, Any], annotations: Mapping[str, str]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    if "upgradeStrategy" in cluster:
        yield "rayClusterConfig.upgradeStrategy is the RayService's to say"
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name is KubeRay's"
    container = head["template"]["spec"]["containers"][0]
    if "serve" not in {port["name"] for port in container.get("ports", ())}:
        yield "the head has no port named serve, so there is no service"
    names = {variable["name"] for variable in container.get("env", ())}
    if names & FAULT_TOLERANCE:
        yield f"the head's env has {sorted(names & FAULT_TOLERANCE)}: gcsFaultToleranceOptions say it"
    if "gcsFaultToleranceOptions" in cluster and "ray.io/ft-enabled" in annotations:
        yield "fault tolerance is asked for by annotation and by gcsFaultToleranceOptions"
    if "redis-password" in head["rayStartParams"]:
        yield "rayStartParams has redis-password"
    if "RAY_enable_autoscaler_v2" in names and "version" in cluster.get("autoscalerOptions", {}):
        yield "the autoscaler's version is said twice"
    if cluster.get("authOptions", {}).get("mode") != "token" or not cluster.get("rayVersion"):
        yield "authOptions.mode token with a rayVersion is wanted"
    groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(set(groups)) < len(groups):
        yield f"groups of one name: {groups}"


def _group(group: Mapping[str, Any]) -> Iterator[str]:
    name = group.get("groupName", "head")
    params = group["rayStartParams"]
    if TAKEN & params.keys() and group.get("resources"):
        yield f"{name}: resources are said in rayStartParams and in resources"
    if "labels" in params:
        yield f"{name}: rayStartParams.labels; labels are said at the top"
    if not all(isinstance(value, str) for value in params.values()):
        yield f"{name}: rayStartParams are strings"
    for key, value in group.get("labels", {}).items():
        if not (LABEL_KEY.fullmatch(key) and LABEL_VALUE.fullmatch(value)):
            yield f"{name}: label {key}={value}"
    if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy is not Never, as autoscaler v2 wants"
    if "groupName" in group:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None or not 0 <= least <= most:
            yield f"{name}: minReplicas {least}, maxReplicas {most}"
        if not least or group["replicas"] < least:
            yield from () if least == 0 else (f"{name}: replicas {group['replicas']} of at least {least}",)


def _upgrade(upgrade: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[str]:
    if upgrade.get("type") not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        yield f"upgradeStrategy.type {upgrade.get('type')}"
    if upgrade.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = upgrade.get("clusterUpgradeOptions", {})
    if not cluster.get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs the autoscaler"
    if not options.get("gatewayClassName"):
        yield "an incremental upgrade needs gatewayClassName"
    if not 0 <= options.get("stepSizePercent", -1) <= options.get("maxSurgePercent", 100) <= 100:
        yield f"steps of {options.get('stepSizePercent')} % of {options.get('maxSurgePercent')}"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds must be more than 0"


def _groups(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
