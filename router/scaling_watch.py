"""Beside the stations: how many replicas each part of the deployment has and is to have, and why, for `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .load_report import Decided

_PREFIX = "shoal_"


class PartScale(NamedTuple):
    """One part. num_ready: replicas that take work, and stay. decided: None where the number is fixed, or not known."""

    name: str
    num_ready: int
    decided: Decided | None


class ScalingWatch(Collector):
    """As it is known at the moment of the scrape, at the ingress that answers it. now: unix seconds."""

    def __init__(
        self, parts: Callable[[], Iterable[PartScale]] = list, *, now: Callable[[], float] = time.time
    ) -> None:
        self._parts = parts
        self._now = now

    def collect(self) -> Iterator[Metric]:
        ready = _gauge("replicas_ready", "Replicas that take work, and stay.")
        target = _gauge("replicas_target", "Replicas that there are to be, by the autoscaling policy.")
        most = _gauge("replicas_max", "max_replicas of autoscaling.")
        objective = _gauge("ttft_objective_seconds", "ttft_s of autoscaling.")
        unchanged = _gauge("replicas_unchanged_seconds", "Since their target or its reason changed.")
        reason = _gauge("replicas_reason", "1 for what decides the target.", "reason")
        for part in self._parts():
            ready.add_metric([part.name], part.num_ready)
            if (decided := part.decided) is not None:
                target.add_metric([part.name], decided.replicas)
                most.add_metric([part.name], decided.most)
                objective.add_metric([part.name], decided.ttft_s)
                unchanged.add_metric([part.name], max(0.0, self._now() - decided.since))
                reason.add_metric([part.name, decided.reason], 1.0)
        yield from (ready, target, most, objective, unchanged, reason)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, labels=["variant", *labels])
