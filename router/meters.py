"""What the stations count, one small class each, all in the ingress's registry. A station is handed its own alone."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .waiters import Waiters

PREFIX = "shoal_"
_PAUSE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30)
_POSITION = (0, 1, 4, 16, 64, 256, 1024, 4096)
_STORE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


class _Meter:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self._registry)


class StoreMeter(_Meter):
    """Redis, as the router sees it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.errors = self._counter("redis_errors", "Calls to Redis that failed.", "kind")
        self.available = self._gauge("redis_available", "Whether Redis is asked: 0 while it does not answer.")
        self.writable = self._gauge("redis_writable", "Whether Redis is asked to write: 0 while it will not.")
        self.seconds = self._histogram("redis_call_seconds", "Calls to Redis that succeeded.", _STORE_S)


class CacheMeter(_Meter):
    """The response cache and shared flights."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.lookups = self._counter("response_cache_requests", "Logs, by where they came from.", "status")
        self.stored = self._counter("response_cache_stored", "Finished logs that were stored.")
        self.stored_bytes = self._counter("response_cache_stored_bytes", "Bytes of logs that were stored.")
        self.rejected = self._counter("response_cache_rejected", "Values that were not used or not kept.", "reason")
        self.flights = self._gauge("flights", "Logs being made or tailed here that others may share.")
        self.takeovers = self._counter("flight_takeovers", "Flights continued here when their leader was gone.")


class ResumeMeter(_Meter):
    """Logs that went on elsewhere."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.losses = self._counter("generations_interrupted", "Generations whose replica stopped them.", "cause")
        self.resumed = self._counter("generations_resumed", "Generations that went on elsewhere.")
        self.given_up = self._counter("generations_given_up", "Generations that did not.", "reason")
        self.suspects = self._gauge("suspects", "Generations that go on one at a time: they may end replicas.")
        self.pause = self._histogram("resume_pause_seconds", "From the loss to the next token.", _PAUSE_S)


class HoldMeter(_Meter):
    """Requests that wait for a part that sleeps, by part. As everywhere, the label `variant` is a part's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.requests = self._gauge("held_requests", "Generations that wait for a part's first replica.", "variant")
        self.seconds = self._gauge("held_seconds", "The longest of those waits.", "variant")

    def watch(self, part: str, held: Waiters) -> None:
        """Tell of these from now on."""
        self.requests.labels(part).set_function(lambda: len(held))
        self.seconds.labels(part).set_function(lambda: held.longest_s)

    def forget(self, part: str) -> None:
        """There is no such part any more."""
        self.requests.remove(part)
        self.seconds.remove(part)


class AdmissionMeter(_Meter):
    """The router's queue and its tenants."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.queued = self._gauge("router_queued", "Generations that wait for a place.", "tenant")
        self.wait = self._histogram("router_queue_seconds", "Waits for a place.", _WAIT_S)
        self.requests = self._counter(
            "tenant_requests", "Requests by tenant and what became of them.", "tenant", "outcome"
        )
        self.tokens = self._counter("tenant_tokens", "Tokens by tenant.", "tenant", "kind")
        self.degraded = self._counter("degraded_requests", "Requests that were given less under load.", "rung")
        self.load = self._gauge("router_load", "Generations in flight or waiting, as a share of max_in_flight.")


class RoutingMeter(_Meter):
    """Which replica, and why."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.decisions = self._counter("routing_decisions", "Choices of a replica, by what decided.", "reason")
        self.prompt_tokens = self._counter("routing_prompt_tokens", "Prompt tokens of routed generations.")
        self.expected_hits = self._counter("routing_expected_hit_tokens", "Those expected in the replica's cache.")

    def chose(self, num_tokens: int, num_spared: int) -> None:
        """A replica was chosen whose cache spares so many of a log's tokens."""
        self.decisions.labels("prefix" if num_spared else "load").inc()
        self.prompt_tokens.inc(num_tokens)
        self.expected_hits.inc(num_spared)


class VariantMeter(_Meter):
    """Which variant, and how variants fare. A label `variant` is the name of a part of the deployment."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.errors = self._counter(
            "request_errors", "Requests that ended with an error, by its kind.", "variant", "kind"
        )
        self.passed_over = self._counter(
            "variant_passed_over",
            "Requests that were a variant's by the weights and went on to another.",
            "variant",
            "why",
        )
        self.rollbacks = self._counter("variant_rollbacks", "Variants taken back, by the bound.", "variant", "bound")
        self.shadows = self._counter(
            "shadow_generations", "Generations copied to a variant, by what became of them.", "variant", "outcome"
        )
        self.shadow_position = self._histogram(
            "shadow_difference_position", "First token in which a copy differs.", _POSITION, "variant"
        )
