"""Beside the stations: what the ingress measures and what replicas report, as Prometheus text.

One registry for each process; whichever ingress answers speaks for all (chorus.py), and replicas report with their
heartbeats. Totals of a replica that has been gone for a while, or that starts again from zero, are folded into
`replica="departed"`, so that a sum over replicas never falls. docs/METRICS.md lists all of it (metrics_doc.py).
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.generation import TokenEvent
from ..runtime.stats import Stats
from .backend import ReplicaState
from .body import ClientGone
from .chorus import DEPARTED, Chorus, Words
from .last_words import LastWords, Word
from .meters import AdmissionMeter, CacheMeter, HoldMeter, ResumeMeter, RoutingMeter, StoreMeter, VariantMeter
from .request_log import Exchange, kind_of
from .scaling_watch import PartScale, ScalingWatch
from .text import Choice
from .vllm_names import BothNames, OurNames

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "shoal_"
_MAX_GONE = 256
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_E2E_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # cached answers take 5 ms
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_GAUGES = {
    "num_requests_running": ("Generations in the running batch.", "num_running"),
    "num_requests_waiting": ("Generations waiting for a place in the batch.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", "kv_usage"),
    "kv_cache_blocks": ("KV blocks there are.", "num_blocks"),
    "spec_acceptance_length": ("Tokens that a row with guesses has brought, on average.", "acceptance_length"),
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
    "spec_drafts": ("Rows that carried guesses.", "spec_drafts"),
    "spec_drafted_tokens": ("Tokens guessed.", "spec_drafted_tokens"),
    "spec_accepted_tokens": ("Guesses that were right.", "spec_accepted_tokens"),
    "engine_steps": ("Steps of the engine.", "steps"),
    "engine_host_seconds": ("Seconds spent scheduling and updating.", "host_s"),
    "engine_device_seconds": ("Seconds spent computing.", "device_s"),
}
_TALLIES = {
    "request_success": ("Generations that ended, by reason.", "finished", ["finished_reason"]),
    "rank_failures": ("Failures of ranks.", "rank_failures", ["cause", "rank", "station"]),
}


Peers = Callable[[bytes], Awaitable[list[bytes]]]
"""Tells all other ingresses what this one knows (`RouterMetrics.tell`), and returns what those tell that answer."""


Shares = Mapping[str, float]


async def nobody(telling: bytes) -> list[bytes]:
    """The null `Peers`: this ingress is alone."""
    return []


class RouterMetrics:
    """What one ingress counts. Called on the way of every token: keep it to one histogram an event.

    ingress: its id where there are several. vllm_model: the model's name where metrics are wanted under vLLM's names,
    too. clock: of intervals. now: unix seconds.
    """

    def __init__(
        self,
        *,
        ingress: str = "",
        vllm_model: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self.registry = CollectorRegistry()
        self.replicas = ReplicaBook(now=now)
        self._ingress = ingress
        self._chorus = Chorus(OurNames(self.registry), ingress=ingress, now=now)
        self._parts: list[Collector] = [self._chorus, self.replicas]
        served = Together(self._parts)
        self._served = served if vllm_model is None else BothNames(served, model=vllm_model)
        ProcessCollector(registry=self.registry)
        self.ttft = self._by_part("time_to_first_token_seconds", "From the request to a first token.", _TTFT_S)
        self.itl = self._by_part("inter_token_latency_seconds", "Between two tokens of one choice.", _ITL_S)
        self.e2e = self._by_part("e2e_request_latency_seconds", "From the request to its end.", _E2E_S)
        self.prompt_length = self._by_part("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_length = self._by_part("request_generation_tokens", "Tokens of a choice.", _TOKENS)
        self.in_flight = Gauge(_PREFIX + "router_in_flight", "Generations admitted.", registry=self.registry)
        self.finished = self._counter("choices_finished", "Choices as clients got them, by reason.", "finished_reason")
        self.responses = self._counter("http_responses", "Answers by route and status.", "route", "status")
        self.stream_errors = self._counter("stream_errors", "Streams that ended with an error event.")
        self.clients_gone = self._counter("clients_gone", "Requests whose client left before their end.")
        self.store = StoreMeter(self.registry)
        self.cache = CacheMeter(self.registry)
        self.resume = ResumeMeter(self.registry)
        self.admission = AdmissionMeter(self.registry)
        self.routing = RoutingMeter(self.registry)
        self.variants = VariantMeter(self.registry)
        self.held = HoldMeter(self.registry)
        self._served_parts: dict[str, PartMetrics] = {}

    def watch(
        self,
        replicas: Callable[[], Mapping[str, ReplicaState]],
        shares: Callable[[], Shares] = dict,
        scales: Callable[[], Iterable[PartScale]] = list,
    ) -> None:
        """Tell of the connected replicas, too, of the variants' shares, and of how many replicas parts are to have. All
        are asked at every scrape."""
        self._parts += [ReplicaWatch(replicas), ShareWatch(shares), ScalingWatch(scales)]

    def part(self, name: str) -> PartMetrics:
        """Of the variant or further model of that name, which is the deployment's and no client's."""
        part = self._served_parts.get(name)
        if part is None:
            part = self._served_parts[name] = PartMetrics(self, name, clock=self._clock)
        return part

    def answered(self, route: str, status: int) -> None:
        self.responses.labels(route, str(status)).inc()

    def ended(self, exchange: Exchange) -> None:
        """A request is over, however it ended."""
        if isinstance(exchange.error, ClientGone):
            self.clients_gone.inc()
        if exchange.part is None or exchange.job is None or exchange.flight is None:
            return
        if exchange.error is not None and not isinstance(exchange.error, ClientGone):
            self.variants.errors.labels(exchange.part, kind_of(exchange.error)).inc()
        part = self.part(exchange.part)
        for prompt in exchange.job.prompts:
            part.prompt_length.observe(len(prompt.ids))
        for choice in exchange.flight.choices:
            part.output_length.observe(choice.num_tokens)
            self.finished.labels(choice.finish_reason or "incomplete").inc()

    def tell(self, stats: Mapping[str, Stats]) -> bytes:
        """All that is known here, for other ingresses. `stats`: of the replicas that are connected."""
        self.replicas.update(stats)
        return _encode(Telling(self._ingress, self._chorus.tell(), self.replicas.tell()))

    def hear(self, telling: bytes) -> str | None:
        """What another ingress tells; returns which. One of another version may not be understood: None."""
        try:
            heard = _decode(telling)
        except msgspec.MsgspecError:
            return None
        self._chorus.hear(heard.ingresses)
        self.replicas.hear(heard.replicas)
        return heard.ingress

    def text(self, tellings: Iterable[bytes] = ()) -> bytes:
        """Prometheus text, as of the last `tell`. `tellings`: of all other ingresses that are there now."""
        self._chorus.see(teller for telling in tellings if (teller := self.hear(telling)) is not None)
        return generate_latest(self._served)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self.registry)

    def _by_part(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, ["variant"], buckets=buckets, registry=self.registry)


class PartMetrics:
    """What one ingress counts of one variant or further model: the series of it, looked up once."""

    def __init__(self, metrics: RouterMetrics, name: str, *, clock: Callable[[], float]) -> None:
        self.e2e = metrics.e2e.labels(name)
        self.prompt_length = metrics.prompt_length.labels(name)
        self.output_length = metrics.output_length.labels(name)
        self._ttft = metrics.ttft.labels(name)
        self._itl = metrics.itl.labels(name)
        self._clock = clock

    def landed(self, choice: Choice, event: TokenEvent, arrived: float) -> None:
        """An event has reached the router; `arrived` is when its request did, on the same clock."""
        now = self._clock()
        if not event.tokens:
            return
        if choice.last_event is None:
            choice.first_event = now
            self._ttft.observe(now - arrived)
        else:
            self._itl.observe((now - choice.last_event) / len(event.tokens))
        choice.last_event = now


class Telling(msgspec.Struct, frozen=True, array_like=True):
    """What one ingress tells another."""

    ingress: str
    ingresses: Words
    replicas: dict[str, Word[Stats]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Telling).decode


class Together(Collector):
    """The families of all parts."""

    def __init__(self, parts: Iterable[Collector]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        for part in self._parts:
            yield from part.collect()


class ReplicaWatch(Collector):
    """Which replicas are connected, and how they stand at the moment of the scrape."""

    def __init__(self, replicas: Callable[[], Mapping[str, ReplicaState]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        states = self._replicas()
        ready = GaugeMetricFamily(
            _PREFIX + "replica_ready",
            "1 where it takes work, 0 where it is only connected.",
            labels=["replica"],
        )
        heard = GaugeMetricFamily(
            _PREFIX + "replica_heard_seconds", "Since anything came from the replica.", labels=["replica"]
        )
        for replica, state in states.items():
            ready.add_metric([replica], float(state.problem is None))
            heard.add_metric([replica], state.heard_s)
        yield from (ready, heard)


class ShareWatch(Collector):
    """What part of the requests each variant gets at the moment of the scrape, at the ingress that answers it."""

    def __init__(self, shares: Callable[[], Shares]) -> None:
        self._shares = shares

    def collect(self) -> Iterator[Metric]:
        share = GaugeMetricFamily(
            _PREFIX + "variant_share", "Share of the requests that a variant gets, 0 to 1.", labels=["variant"]
        )
        for variant, part in self._shares().items():
            share.add_metric([variant], part)
        yield share


class ReplicaBook(Collector):
    """The last word of every replica, and the totals of those that are gone."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._live: Mapping[str, Stats] = {}
        self._words: LastWords[Stats] = LastWords(keep=_MAX_GONE, add=_added, now=now)
        self._restarted = Stats()  # totals of those that started again, before they did

    def update(self, stats: Mapping[str, Stats]) -> None:
        """`stats`: of those that are there now."""
        self._live = dict(stats)
        for replica, last in stats.items():
            known = self._words.words.get(replica)
            if known is not None and last.steps < known.said.steps:  # it started again from zero
                self._restarted = _added(self._restarted, known.said)
            self._words.say(replica, last)

    def tell(self) -> dict[str, Word[Stats]]:
        """For another ingress, which may not have met all of them."""
        return self._words.words

    def hear(self, words: Mapping[str, Word[Stats]]) -> None:
        """What another ingress told; of those that are there it is known better here."""
        self._words.hear({replica: word for replica, word in words.items() if replica not in self._live})

    def collect(self) -> Iterator[Metric]:
        recent, departed = self._words.recent(), reduce(_added, self._words.departed(), self._restarted)
        for name, (text, field) in _GAUGES.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["replica"])
            for replica, stats in self._live.items():
                gauge.add_metric([replica], float(getattr(stats, field)))
            yield gauge
        for name, (text, field) in _TOTALS.items():
            total = CounterMetricFamily(_PREFIX + name, text, labels=["replica"])
            for replica, stats in [(DEPARTED, departed), *recent.items()]:
                total.add_metric([replica], float(getattr(stats, field)))
            yield total
        for name, (text, field, labels) in _TALLIES.items():
            tally = CounterMetricFamily(_PREFIX + name, text, labels=["replica", *labels])
            for replica, stats in [(DEPARTED, departed), *recent.items()]:
                for kind, count in getattr(stats, field).items():
                    tally.add_metric([replica, *kind.split(",")], count)
            yield tally


def _added(one: Stats, other: Stats) -> Stats:
    """The totals of both."""
    totals: dict[str, Any] = {field: getattr(one, field) + getattr(other, field) for _, field in _TOTALS.values()}
    for _, field, _ in _TALLIES.values():
        totals[field] = dict(Tally(getattr(one, field)) + Tally(getattr(other, field)))
    return Stats(**totals)
