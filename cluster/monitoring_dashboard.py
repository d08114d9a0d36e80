"""The Grafana dashboard: an overview by hand, then a row for each section of docs/METRICS.md, a panel for each metric.

So a metric that is added anywhere has its panel. What tells more than a metric alone stands first in its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..router.metrics_doc import Declared, sections
from .monitoring_query import REQUESTS, once, quantile, rate

_OURS = 'namespace=~"$namespace", job=~"$job"'
_ASKED = f"{_OURS}, {REQUESTS}"
_FAILED = f'{_ASKED}, status=~"5..", status!="503"'
_OVER = "$__rate_interval"
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 7
_QUANTILES = (0.5, 0.9, 0.99)
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Query = tuple[str, str]
"""(PromQL, legend)"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph, or, with kind `stat`, one number."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    text: str = ""
    kind: str = "timeseries"
    width: int = _WIDTH


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    ids = count(1)
    overview = list(_placed(_overview(), 0, ids))
    below = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in overview)
    rows = [_row(title, panels, below + i, ids) for i, (title, panels) in enumerate(_rows())]
    return {
        "uid": "shoal",
        "title": "Shoal",
        "tags": ["shoal", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [*overview, *rows],
    }


def _row(title: str, panels: Iterable[Panel], top: int, ids: Iterator[int]) -> dict[str, Any]:
    """One that is closed: what it holds is not asked for until somebody opens it."""
    return {
        "id": next(ids),
        "type": "row",
        "title": title,
        "collapsed": True,
        "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": top},
        "panels": list(_placed(panels, top + 1, ids)),
    }


def _overview() -> list[Panel]:
    responses = "shoal_http_responses_total"
    all_of_them = rate(responses, _ASKED, over=_OVER)
    failed = f"({rate(responses, _FAILED, over=_OVER)} or vector(0))"
    broken = rate("shoal_stream_errors_total", _OURS, over=_OVER)
    ttft, itl = "shoal_time_to_first_token_seconds", "shoal_inter_token_latency_seconds"
    tokens = rate("shoal_generation_tokens_total", _OURS, over=_OVER)
    ready = f"sum ({once(f'shoal_replica_ready{{{_OURS}}}')}) or vector(0)"
    prompts = rate("shoal_prompt_tokens_total", _OURS, over=_OVER)
    return [
        Panel("Replicas ready", [(ready, "")], kind="stat", width=4),
        Panel("Requests", [(all_of_them, "")], "reqps", kind="stat", width=4),
        Panel("Failed", [(f"({failed} + {broken}) / {all_of_them}", "")], "percentunit", kind="stat", width=4),
        Panel("First token, p90", [(quantile(0.9, ttft, _OURS, over=_OVER), "")], "s", kind="stat", width=4),
        Panel("Tokens out", [(tokens, "")], "suffix: tok/s", kind="stat", width=4),
        Panel("Load", [(f"max (shoal_router_load{{{_OURS}}})", "")], "percentunit", "Of max_in_flight.", "stat", 4),
        Panel("Answers by status", [(rate(responses, _ASKED, over=_OVER, by=["status"]), "{{status}}")], "reqps"),
        Panel("First token", _quantiles(ttft), "s"),
        Panel("Between tokens", _quantiles(itl), "s"),
        Panel("Tokens", [(tokens, "generated"), (prompts, "prompt, computed")], "suffix: tok/s"),
        Panel("At the replicas", [(_per("shoal_num_requests_running"), "running"), *_waiting()]),
        Panel("KV cache in use", [(once(f"shoal_kv_cache_usage_perc{{{_OURS}}}"), "{{replica}}")], "percentunit"),
    ]


def _waiting() -> list[Query]:
    return [
        (_per("shoal_num_requests_waiting"), "waiting"),
        (_per("shoal_router_queued"), "waiting at the router"),
    ]


def _per(gauge: str) -> str:
    return f"sum ({once(f'{gauge}{{{_OURS}}}')})"


def _rows() -> Iterator[tuple[str, list[Panel]]]:
    """(title, panels) of each section."""
    telling = _telling()
    for title, families in sections():
        yield title, [*telling.pop(title, []), *map(_panel, families)]
    assert not telling, f"no such section: {', '.join(telling)}"


def _telling() -> dict[str, list[Panel]]:
    """Section -> what to look at first."""
    by_variant = [
        Panel(
            f"{name}, p90 by variant", [(quantile(0.9, metric, _OURS, over=_OVER, by=["variant"]), "{{variant}}")], "s"
        )
        for name, metric in (
            ("First token", "shoal_time_to_first_token_seconds"),
            ("Between tokens", "shoal_inter_token_latency_seconds"),
        )
    ]
    return {
        "Response cache and shared flights": [
            Panel(
                "Share that was not computed",
                [(_share("shoal_response_cache_requests_total", 'status=~"hit|shared"'), "hit or shared")],
                "percentunit",
            )
        ],
        "Replicas": [
            Panel(
                "Prefix cache, hit rate",
                [(_ratio("shoal_prefix_cache_hits_total", "shoal_prefix_cache_queries_total"), "{{replica}}")],
                "percentunit",
            ),
            Panel(
                "Guesses that were right",
                [(_ratio("shoal_spec_accepted_tokens_total", "shoal_spec_drafted_tokens_total"), "{{replica}}")],
                "percentunit",
            ),
        ],
        "Variants": by_variant,
    }


def _share(counter: str, matchers: str) -> str:
    return f"{rate(counter, f'{_OURS}, {matchers}', over=_OVER)} / {rate(counter, _OURS, over=_OVER)}"


def _ratio(part: str, whole: str) -> str:
    by = ["replica"]
    return f"{rate(part, _OURS, over=_OVER, by=by)} / {rate(whole, _OURS, over=_OVER, by=by)}"


def _panel(family: Declared) -> Panel:
    """One metric, as its kind asks."""
    title = family.text.rstrip(".")
    legend = " ".join(f"{{{{{label}}}}}" for label in family.labels)
    if family.kind == "histogram":
        return Panel(title, _quantiles(family.name), _unit(family.name), family.name)
    if family.kind == "counter":
        return Panel(
            title, [(rate(family.name, _OURS, over=_OVER, by=family.labels), legend)], _pace(family.name), family.name
        )
    series = once(f"{family.name}{{{_OURS}}}")
    if family.name.endswith("_start_time_seconds"):
        title, series = "Age of the process", f"time() - {series}"
    return Panel(title, [(series, f"{legend} {{{{ingress}}}}".strip())], _unit(family.name), family.name)


def _quantiles(histogram: str) -> list[Query]:
    return [(quantile(share, histogram, _OURS, over=_OVER), f"p{share * 100:g}") for share in _QUANTILES]


def _unit(name: str) -> str:
    for end, unit in (("_seconds", "s"), ("_bytes", "bytes"), ("_perc", "percentunit"), ("_load", "percentunit")):
        if name.endswith(end):
            return unit
    return "percentunit" if name.endswith("_share") else "short"


def _pace(name: str) -> str:
    """Of a counter's rate."""
    for end, unit in (("_seconds_total", "percentunit"), ("_bytes_total", "Bps"), ("_tokens_total", "suffix: tok/s")):
        if name.endswith(end):
            return unit
    return "cps"


def _placed(panels: Iterable[Panel], top: int, ids: Iterator[int]) -> Iterator[dict[str, Any]]:
    """Panels as Grafana has them, from left to right and downwards."""
    x, y, height = 0, top, 0
    for panel in panels:
        if x + panel.width > _COLUMNS:
            x, y = 0, y + height
        height = 4 if panel.kind == "stat" else _HEIGHT
        targets = [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": _SOURCE}
            for i, (expr, legend) in enumerate(panel.queries)
        ]
        yield {
            "id": next(ids),
            "type": panel.kind,
            "title": panel.title,
            "description": panel.text,
            "datasource": _SOURCE,
            "gridPos": {"h": height, "w": panel.width, "x": x, "y": y},
            "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
            "targets": targets,
        }
        x += panel.width


def _variables() -> list[dict[str, Any]]:
    """What is chosen at the top: a Prometheus, and one service or all."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ours = [
        {
            "name": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": f"label_values(shoal_router_in_flight, {label})", "refId": label},
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        }
        for label in ("namespace", "job")
    ]
    return [source, *ours]
