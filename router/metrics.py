"""Beside the stations: what the ingress measures and what replicas report, as Prometheus text.

One registry for each process. Names are those that dashboards for vLLM use, with our prefix. Totals of a replica that
is gone, or that starts again from zero, are folded into `replica="departed"`, so that a sum over replicas never falls.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.generation import TokenEvent
from ..runtime.stats import Stats
from .meters import AdmissionMeter, CacheMeter, ResumeMeter, RoutingMeter, StoreMeter
from .text import Choice

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DEPARTED = "departed"
_PREFIX = "shoal_"
_MAX_GONE = 256
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "num_requests_running": ("Generations in the running batch.", "num_running"),
    "num_requests_waiting": ("Generations waiting for a place in the batch.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", "kv_usage"),
    "kv_cache_blocks": ("KV blocks there are.", "num_blocks"),
    "tokens_owed": ("The most that live generations may still cost, in tokens.", "tokens_owed"),
}
_TOTALS = {
    "prompt_tokens": ("Prompt tokens computed.", "prompt_tokens"),
    "generation_tokens": ("Tokens generated.", "generation_tokens"),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_query_tokens"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    "num_preemptions": ("Generations preempted for want of KV blocks.", "preemptions"),
    "rank_restarts": ("Restarts of all ranks.", "restarts"),
    "generations_quarantined": ("Generations that ran alone after a failure.", "quarantined"),
    "generations_poisoned": ("Generations ended for making ranks fail.", "poisoned"),
    "engine_steps": ("Steps of the engine.", "steps"),
    "engine_host_seconds": ("Seconds spent scheduling and updating.", "host_s"),
    "engine_device_seconds": ("Seconds spent computing.", "device_s"),
}
_TALLIES = {
    "request_success": ("Generations that ended, by reason.", "finished", ["finished_reason"]),
    "rank_failures": ("Failures of ranks.", "rank_failures", ["cause", "rank", "station"]),
}


class RouterMetrics:
    """What one ingress counts. Called on the way of every token: keep it to one histogram an event."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.replicas = ReplicaBook()
        self.registry.register(self.replicas)
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From the request to a choice's first token.", _TTFT_S
        )
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of one choice.", _ITL_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "From the request to its end.", _E2E_S)
        self.in_flight = Gauge(_PREFIX + "router_in_flight", "Generations admitted.", registry=self.registry)
        self.responses = Counter(
            _PREFIX + "http_responses", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.stream_errors = Counter(
            _PREFIX + "stream_errors", "Streams that ended with an error event.", registry=self.registry
        )
        self.store = StoreMeter(self.registry)
        self.cache = CacheMeter(self.registry)
        self.resume = ResumeMeter(self.registry)
        self.admission = AdmissionMeter(self.registry)
        self.routing = RoutingMeter(self.registry)

    def answered(self, route: str, status: int) -> None:
        self.responses.labels(route, str(status)).inc()

    def landed(self, choice: Choice, event: TokenEvent, arrived: float) -> None:
        """An event has reached the router; `arrived` is when its request did, on time.monotonic's clock."""
        now = time.monotonic()
        if not event.tokens:
            return
        if choice.last_event is None:
            self.ttft.observe(now - arrived)
        else:
            self.itl.observe((now - choice.last_event) / len(event.tokens))
        choice.last_event = now

    def render(self, stats: Mapping[str, Stats]) -> bytes:
        self.replicas.update(stats)
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, buckets=buckets, registry=self.registry)


class ReplicaBook(Collector):
    """The last word of every replica, and the totals of those that are gone."""

    def __init__(self) -> None:
        self._live: dict[str, Stats] = {}
        self._gone: dict[str, Stats] = {}  # may come back: a replica that was only late with its answer
        self._departed: Tally[str] = Tally()
        self._departed_tallies: dict[str, Tally[str]] = {field: Tally() for _, field, _ in _TALLIES.values()}

    def update(self, stats: Mapping[str, Stats]) -> None:
        for replica, last in [*self._live.items(), *self._gone.items()]:
            now = stats.get(replica)
            if now is not None and now.steps < last.steps:  # it started again from zero
                self._fold(last)
            elif now is None:
                self._gone[replica] = last
        for replica in stats:
            self._gone.pop(replica, None)
        while len(self._gone) > _MAX_GONE:
            self._fold(self._gone.pop(next(iter(self._gone))))
        self._live = dict(stats)

    def collect(self) -> Iterator[Metric]:
        for name, (text, field) in _GAUGES.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["replica"])
            for replica, stats in self._live.items():
                gauge.add_metric([replica], float(getattr(stats, field)))
            yield gauge
        for name, (text, field) in _TOTALS.items():
            total = CounterMetricFamily(_PREFIX + name, text, labels=["replica"])
            gone = sum(float(getattr(stats, field)) for stats in self._gone.values())
            total.add_metric([DEPARTED], gone + self._departed[field])
            for replica, stats in self._live.items():
                total.add_metric([replica], float(getattr(stats, field)))
            yield total
        for name, (text, field, labels) in _TALLIES.items():
            yield self._tally(CounterMetricFamily(_PREFIX + name, text, labels=["replica", *labels]), field)

    def _tally(self, total: CounterMetricFamily, field: str) -> Metric:
        gone = self._departed_tallies[field].copy()
        for stats in self._gone.values():
            gone.update(getattr(stats, field))
        for kind, count in gone.items():
            total.add_metric([DEPARTED, *kind.split(",")], count)
        for replica, stats in self._live.items():
            for kind, count in getattr(stats, field).items():
                total.add_metric([replica, *kind.split(",")], count)
        return total

    def _fold(self, last: Stats) -> None:
        self._departed.update({field: getattr(last, field) for _, field in _TOTALS.values()})
        for _, field, _ in _TALLIES.values():
            self._departed_tallies[field].update(getattr(last, field))
