"""Beside the stations: several ingresses' metrics as one, so that `/metrics` is the same whichever of them answers.

At a scrape an ingress tells the others what it has counted, hears what they have and what they remember of those that
are gone, and answers for all: each series has the label `ingress`, totals of the departed are added up under
`departed`. No scrape shows what only one of them knows, so sums never fall, whoever dies and whoever answers next.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .last_words import LastWords, Word

DEPARTED = "departed"
_MAX_DEPARTED = 32
_TOTALS = ("counter", "histogram")


class Series(msgspec.Struct, frozen=True, array_like=True):
    """One number."""

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric of one ingress."""

    name: str
    kind: str
    text: str
    series: list[Series]


Words = dict[str, Word[list[Family]]]


class Chorus(Collector):
    """`own`: what this ingress counts. `ingress`: its id; empty where it is alone, and then no label is added."""

    def __init__(self, own: Collector, *, ingress: str = "", now: Callable[[], float] = time.time) -> None:
        self._own = own
        self._ingress = ingress
        self._words: LastWords[list[Family]] = LastWords(keep=_MAX_DEPARTED, add=_added, now=now)
        self._present = {ingress}

    def tell(self) -> Words:
        """The last word of every ingress, as far as it is known here; this one's is of now."""
        self._words.say(self._ingress, [_family(metric) for metric in self._own.collect()])
        return self._words.words

    def hear(self, words: Words) -> None:
        """What another ingress knows."""
        self._words.hear(words)

    def see(self, present: Iterable[str]) -> None:
        """Which others are there now."""
        self._present = {self._ingress, *present}

    def collect(self) -> Iterator[Metric]:
        """Gauges of those that are there, totals of all; this one's as of when it told them last."""
        merged: dict[str, Metric] = {}
        for ingress, families in self._words.recent().items():
            label = {"ingress": ingress} if ingress else {}
            for family in families:
                if family.kind in _TOTALS or ingress in self._present:
                    metric = merged.setdefault(family.name, Metric(family.name, family.text, family.kind))
                    for series in family.series:
                        metric.add_sample(series.name, series.labels | label, series.value)
        for family in _added(*self._words.departed()):
            metric = merged.setdefault(family.name, Metric(family.name, family.text, family.kind))
            for series in family.series:
                metric.add_sample(series.name, series.labels | {"ingress": DEPARTED}, series.value)
        yield from merged.values()


def _added(*tellings: list[Family]) -> list[Family]:
    """Totals of many ingresses, added up."""
    families: dict[str, Family] = {}
    values: dict[str, defaultdict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in chain(*tellings):
        if family.kind in _TOTALS:
            families[family.name] = family
            sums = values.setdefault(family.name, defaultdict(float))
            for series in family.series:
                sums[series.name, tuple(series.labels.items())] += series.value
    return [
        Family(name, family.kind, family.text, [Series(s, dict(labels), v) for (s, labels), v in values[name].items()])
        for name, family in families.items()
    ]


def _family(metric: Metric) -> Family:
    series = [Series(sample.name, sample.labels, sample.value) for sample in metric.samples]
    return Family(metric.name, metric.type, metric.documentation, series)
