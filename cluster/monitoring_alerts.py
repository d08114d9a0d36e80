"""The alert rules: what somebody must look at, each with a section in docs/OPERATING.md that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .monitoring_query import REQUESTS, happened, increase, once, quantile, rate

RUNBOOK = "docs/OPERATING.md"
SERVICE = ("namespace", "job")
"""One service of several that a Prometheus may watch."""
_BY = f"by ({', '.join(SERVICE)})"
_ON = f"on ({', '.join(SERVICE)})"
_REFUSED = f'{REQUESTS}, status=~"429|503"'
_UNAVAILABLE = f'{REQUESTS}, status="503"'
_FAILED = f'{REQUESTS}, status=~"5..", status!="503"'
_UNKNOWN = 'status="401"'
_UNREADABLE = 'reason="unreadable"'

Severity = Literal["critical", "warning", "info"]
"""Clients suffer now; they will, or a spare is gone; worth knowing."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. after: `expr` has held for so long. summary: one sentence, a template of Prometheus."""

    name: str
    expr: str
    after: str
    severity: Severity
    summary: str

    @property
    def anchor(self) -> str:
        """Of its section in the runbook."""
        return self.name.lower()

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        annotations = {"summary": self.summary, "runbook_url": f"{RUNBOOK}#{self.anchor}"}
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.after,
            "labels": {"severity": self.severity},
            "annotations": annotations,
        }


def rules(alerts: Sequence[Alert]) -> dict[str, Any]:
    """A file of rules: one group."""
    return {"groups": [{"name": "shoal", "rules": [alert.rule() for alert in alerts]}]}


def all_alerts() -> list[Alert]:
    """Every alert, worst first in each group."""
    return [*_service(), *_capacity(), *_scaling(), *_failures(), *_redis(), *_rollout()]


def _service() -> list[Alert]:
    responses = "shoal_http_responses_total"
    all_responses = rate(responses, REQUESTS, over="5m", by=SERVICE)
    broken = f"({rate(responses, _FAILED, over='5m', by=SERVICE)} or {all_responses} * 0)"
    broken_streams = rate("shoal_stream_errors_total", over="5m", by=SERVICE)
    wanted = f"({rate(responses, _UNAVAILABLE, over='5m', by=SERVICE)} > 0 or sum {_BY} (shoal_router_in_flight) > 0)"
    no_replica = f"count {_BY} (shoal_router_in_flight) unless count {_BY} (shoal_replica_ready == 1)"
    return [
        Alert(
            "ShoalDown",
            "absent(shoal_router_in_flight)",
            "2m",
            "critical",
            "No ingress answers /metrics: nobody is served, or nobody looks.",
        ),
        Alert(
            "ShoalNoReplica",
            f"({no_replica}) and {_ON} {wanted}",
            "5m",
            "critical",
            "Requests come and no replica takes work.",
        ),
        Alert(
            "ShoalErrors",
            f"({broken} + {broken_streams}) / {all_responses} > 0.02",
            "5m",
            "critical",
            "{{ $value | humanizePercentage }} of requests fail on our side.",
        ),
        Alert(
            "ShoalRefusing",
            f"{rate(responses, _REFUSED, over='5m', by=SERVICE)} / {all_responses} > 0.05",
            "10m",
            "warning",
            "{{ $value | humanizePercentage }} of requests are refused: rates, a full queue, or no replica.",
        ),
        Alert(
            "ShoalUnauthorized",
            f"{rate(responses, _UNKNOWN, over='10m', by=SERVICE)} > 1",
            "10m",
            "info",
            "{{ $value | humanize }} requests a second come with a wrong key.",
        ),
    ]


def _capacity() -> list[Alert]:
    replica = (*SERVICE, "replica")
    return [
        Alert(
            "ShoalSlowFirstToken",
            f"{quantile(0.9, 'shoal_time_to_first_token_seconds', over='5m', by=SERVICE)} > 5",
            "10m",
            "warning",
            "One first token in ten takes longer than {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "ShoalSlowTokens",
            f"{quantile(0.9, 'shoal_inter_token_latency_seconds', over='5m', by=SERVICE)} > 0.25",
            "10m",
            "warning",
            "One gap between tokens in ten is longer than {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "ShoalOverloaded",
            f"{once('shoal_router_load')} > 1",
            "10m",
            "warning",
            "Load is {{ $value | humanizePercentage }} of max_in_flight: generations wait at the router.",
        ),
        Alert(
            "ShoalDegrading",
            f"{rate('shoal_degraded_requests_total', over='5m', by=(*SERVICE, 'rung'))} > 0",
            "10m",
            "info",
            "Requests are given less: {{ $labels.rung }}.",
        ),
        Alert(
            "ShoalKVCacheFull",
            f"{once('shoal_kv_cache_usage_perc')} > 0.95",
            "10m",
            "warning",
            "{{ $labels.replica }} has {{ $value | humanizePercentage }} of its KV cache in use.",
        ),
        Alert(
            "ShoalPreempting",
            f"{rate('shoal_num_preemptions_total', over='5m', by=replica)} > 0.2",
            "10m",
            "warning",
            "{{ $labels.replica }} preempts {{ $value | humanize }} generations a second.",
        ),
        Alert(
            "ShoalFileDescriptors",
            "process_open_fds / process_max_fds > 0.8 and on (job, instance) shoal_router_in_flight",
            "5m",
            "warning",
            "The ingress has {{ $value | humanizePercentage }} of its file descriptors open.",
        ),
    ]


def _scaling() -> list[Alert]:
    part = (*SERVICE, "variant")
    on = f"on ({', '.join(part)})"
    target, ready = once("shoal_replicas_target"), once("shoal_replicas_ready")
    ttft = quantile(0.9, "shoal_time_to_first_token_seconds", over="5m", by=part)
    return [
        Alert(
            "ShoalHeldLong",
            f"max by ({', '.join(part)}) (shoal_held_seconds) > 180",
            "1m",
            "critical",
            "Requests have waited {{ $value | humanizeDuration }} for the first replica of {{ $labels.variant }}.",
        ),
        Alert(
            "ShoalAtMaxReplicas",
            f"{ttft} > {on} {once('shoal_ttft_objective_seconds')} and {on} {target} >= {once('shoal_replicas_max')}",
            "10m",
            "warning",
            "{{ $labels.variant }} is at max_replicas and misses its objective: one first token in ten takes longer "
            "than {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "ShoalReplicasMissing",
            f"{target} - {on} {ready} > 0",
            "15m",
            "warning",
            "{{ $value | humanize }} replicas of {{ $labels.variant }} are wanted and do not come.",
        ),
    ]


def _failures() -> list[Alert]:
    replica = (*SERVICE, "replica")
    return [
        Alert(
            "ShoalGivenUp",
            happened("shoal_generations_given_up_total", over="10m", by=(*SERVICE, "reason")),
            "0m",
            "critical",
            "{{ $value | humanize }} generations did not go on after their replica was lost: {{ $labels.reason }}.",
        ),
        Alert(
            "ShoalReplicaNotReady",
            f"{once('shoal_replica_ready')} == 0",
            "10m",
            "warning",
            "{{ $labels.replica }} is connected and takes no work.",
        ),
        Alert(
            "ShoalReplicasLost",
            _lost(),
            "0m",
            "warning",
            "A replica was lost under {{ $value | humanize }} generations in ten minutes; they went on elsewhere.",
        ),
        Alert(
            "ShoalRanksRestarting",
            f"{increase('shoal_rank_restarts_total', over='30m', by=replica)} > 2",
            "0m",
            "warning",
            "{{ $labels.replica }} started its ranks anew {{ $value | humanize }} times in half an hour.",
        ),
        Alert(
            "ShoalPoisonRequest",
            happened("shoal_generations_poisoned_total", over="1h", by=SERVICE),
            "0m",
            "warning",
            "{{ $value | humanize }} generations were ended for making ranks fail.",
        ),
    ]


def _lost() -> str:
    return happened("shoal_generations_interrupted_total", 'cause!="handed_over"', over="10m", by=SERVICE)


def _redis() -> list[Alert]:
    known = f"(shoal_redis_call_seconds_count > 0 or {_ON} sum {_BY} (shoal_redis_errors_total) > 0)"
    asked = f"and {_ON} {known}"  # without a Redis it is not available, either
    return [
        Alert(
            "ShoalRedisDown",
            f"{once('shoal_redis_available')} == 0 {asked}",
            "1m",
            "warning",
            "Redis does not answer: nothing is cached, shared or continued after an ingress is lost.",
        ),
        Alert(
            "ShoalRedisReadOnly",
            f"{once('shoal_redis_writable')} == 0 and {once('shoal_redis_available')} == 1 {asked}",
            "5m",
            "warning",
            "Redis takes no writes: it is full, or a replica.",
        ),
        Alert(
            "ShoalRedisSlow",
            f"{quantile(0.99, 'shoal_redis_call_seconds', over='5m', by=SERVICE)} > 0.025",
            "10m",
            "info",
            "One call to Redis in a hundred takes longer than {{ $value | humanizeDuration }}; 50 ms is the limit.",
        ),
        Alert(
            "ShoalCacheUnreadable",
            f"{rate('shoal_response_cache_rejected_total', _UNREADABLE, over='10m', by=SERVICE)} > 0.1",
            "10m",
            "warning",
            "{{ $value | humanize }} values a second in Redis are not what this cluster wrote.",
        ),
    ]


def _rollout() -> list[Alert]:
    return [
        Alert(
            "ShoalVariantRolledBack",
            happened("shoal_variant_rollbacks_total", over="1h", by=(*SERVICE, "variant", "bound")),
            "0m",
            "warning",
            "{{ $labels.variant }} was taken back: it crossed {{ $labels.bound }}.",
        ),
    ]
