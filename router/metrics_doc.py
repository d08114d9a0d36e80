"""Writes docs/METRICS.md: `python -m shoal.router.metrics_doc > docs/METRICS.md`. A test compares the two."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from .metrics import ReplicaBook, ReplicaWatch, RouterMetrics, ShareWatch
from .scaling_watch import ScalingWatch
from .vllm_names import NAMES

_HEAD = """\
# Metrics

`GET /metrics` on the public port needs an API key where one is set; on `--metrics-port` it does not. The ingress
answers for the whole service. Totals of replicas that are gone are kept under `replica="departed"`, so that sums never
fall. Latencies and lengths are those that clients see: answers from the cache count, too. `variant` is the part of the
deployment that answered: `stable`, a variant by its name, or a further model by its own.
"""
_VLLM = """\
## vLLM's names

With `vllm_metrics: true` these are served as well, with the labels `model_name` and, of a replica's, `engine`. Names
of counters end in `_total` on both sides.

| vLLM | here |
|---|---|
"""


class Declared(NamedTuple):
    """One family: `name` as its series are called, but for a histogram's suffixes."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def sections() -> list[tuple[str, list[Declared]]]:
    """(title, families): every one that `/metrics` may hold."""
    metrics = RouterMetrics()
    made = [
        ("Requests", _wrapped(metrics)),
        ("Admission and tenants", _wrapped(metrics.admission)),
        ("Response cache and shared flights", _wrapped(metrics.cache)),
        ("Redis", _wrapped(metrics.store)),
        ("Variants", chain(_wrapped(metrics.variants), _families(ShareWatch(dict).collect()))),
        ("Autoscaling", chain(_wrapped(metrics.held), _families(ScalingWatch().collect()))),
        ("Choice of a replica", _wrapped(metrics.routing)),
        ("Replicas that were lost", _wrapped(metrics.resume)),
        ("Replicas", _families(chain(ReplicaWatch(dict).collect(), ReplicaBook().collect()))),
        ("The ingress's process", _families(ProcessCollector(registry=CollectorRegistry()).collect())),
    ]
    return [(title, list(families)) for title, families in made]


def document() -> str:
    """The page: every family with its labels and its help text."""
    pages = [_HEAD, *(_section(title, families) for title, families in sections())]
    vllm = [f"| `{name}` | `{ours}` |\n" for ours, names in NAMES.items() for name in names]
    return "\n".join([*pages, _VLLM + "".join(vllm)])


def _section(title: str, families: Iterable[Declared]) -> str:
    table = "".join(
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |\n"
        for name, kind, labels, text in families
    )
    return f"## {title}\n\n| name | type | labels | what |\n|---|---|---|---|\n{table}"


# Label names are no public part of prometheus_client; a new version of it may break this page and nothing else.


def _wrapped(owner: object) -> Iterator[Declared]:
    """Metrics that are attributes of `owner`."""
    for metric in vars(owner).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            yield _row(family, metric._labelnames)


def _families(families: Iterable[Metric]) -> Iterator[Declared]:
    for family in families:
        yield _row(family, vars(family)["_labelnames"])


def _row(family: Metric, labels: Iterable[str]) -> Declared:
    name = family.name + ("_total" if family.type == "counter" else "")
    return Declared(name, family.type, tuple(labels), family.documentation)


if __name__ == "__main__":
    sys.stdout.write(document())
