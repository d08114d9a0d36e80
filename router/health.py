"""Beside the stations: how things stand, in words for `/ready` and in numbers for `/v1/cluster`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge

from .backend import ReplicaState
from .load_report import Decided
from .metrics import RouterMetrics
from .model import Model


def describe_cluster(
    replicas: Mapping[str, ReplicaState],
    metrics: RouterMetrics,
    *,
    variants: Sequence[Mapping[str, Any]],
    parts: Iterable[Model],
    is_draining: bool,
) -> dict[str, Any]:
    """`/v1/cluster`: replicas, variants, parts (variants, further models) as they are known here, and this router."""
    return {
        "replicas": [_replica(replica, state) for replica, state in replicas.items()],
        "variants": variants,
        "parts": [_part(part) for part in parts],
        "router": {
            "draining": is_draining,
            "in_flight": int(_sum(metrics.in_flight)),
            "queued": int(_sum(metrics.admission.queued)),
            "load": _sum(metrics.admission.load),
            "redis_available": bool(_sum(metrics.store.available)),
            "cache": _by_label(metrics.cache.lookups, "status"),
        },
    }


def _part(part: Model) -> dict[str, Any]:
    scale = part.scale
    return {
        "name": part.name,
        "ready": scale.num_ready,
        "held": len(part.sleep.held),
        "queued": len(part.queue),
        "autoscaling": None if scale.decided is None else _decided(scale.decided),
    }


def _decided(decided: Decided) -> dict[str, Any]:
    return {
        "target": decided.replicas,
        "max_replicas": decided.most,
        "reason": decided.reason,
        "words": decided.words,
        "since": round(decided.since, 3),
    }


def _replica(replica: str, state: ReplicaState) -> dict[str, Any]:
    stats = state.stats
    return {
        "id": replica,
        "ready": state.problem is None,
        "state": state.problem or "ready",
        "leaving": state.is_leaving,
        "heard_s": round(state.heard_s, 3),
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "in_flight": state.in_flight,
        "tokens_owed": state.tokens_owed,
        "kv_usage": stats.kv_usage,
        "restarts": stats.restarts,
        "ranks": state.ranks,
    }


def _sum(metric: Counter | Gauge) -> float:
    return sum(sample.value for family in metric.collect() for sample in family.samples)


def _by_label(metric: Counter, label: str) -> dict[str, int]:
    samples = [sample for family in metric.collect() for sample in family.samples]
    return {sample.labels[label]: int(sample.value) for sample in samples if sample.name.endswith("_total")}
