"""Dashboard and alerts: the files are what is generated, and all they ask for is there in a real `/metrics`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.monitoring import FOLDER, files
from shoal.cluster.monitoring_alerts import all_alerts
from shoal.cluster.monitoring_dashboard import dashboard
from shoal.cluster.monitoring_query import SCRAPED
from shoal.router.config import RouterConfig
from shoal.router.metrics_doc import sections

from ..router.fakes import MODEL, Server

ROOT = Path(__file__).parent.parent.parent
OF_PROMETHEUS = {"job", "namespace", *SCRAPED}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
LABELS = {family.name: set(family.labels) for _, families in sections() for family in families}
PROMTOOL = shutil.which("promtool")


def panels() -> Iterator[dict[str, Any]]:
    for panel in dashboard()["panels"]:
        yield from panel.get("panels", ()) if panel["type"] == "row" else (panel,)


ALERTS = {alert.name: alert for alert in all_alerts()}
QUERIES = {f"{panel['title']} {t['refId']}": t for panel in panels() for t in panel["targets"]}
EXPRESSIONS = {name: alert.expr for name, alert in ALERTS.items()} | {n: t["expr"] for n, t in QUERIES.items()}


def parsed(expression: str) -> list[Any]:
    """All nodes of it. Raises ValueError."""
    nodes: list[Any] = []
    promql.walk(promql.parse(expression.replace("$__rate_interval", "5m")), nodes.append)
    return nodes


def family_of(series: str) -> str:
    """As docs/METRICS.md calls it."""
    return series if series in LABELS else re.sub("_(bucket|sum|count)$", "", series)


@pytest.fixture(scope="module")
def scraped() -> set[str]:
    """Every name that a real ingress serves, with the suffixes of its kind."""
    with Server(RouterConfig(served_model_name=(MODEL,))) as server:
        families = list(text_string_to_metric_families(server.get("/metrics").body.decode()))
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("name", files())
def test_the_files_are_what_is_declared(name: str) -> None:
    written = (ROOT / FOLDER / name).read_text(encoding="utf-8")
    assert written == files()[name], "write it anew: python -m shoal.cluster.monitoring"


def test_every_expression_asks_for_what_is_there(scraped: set[str]) -> None:
    for name, expression in EXPRESSIONS.items():
        nodes = parsed(expression)
        selectors = [node for node in nodes if isinstance(node, promql.VectorSelector)]
        known = {"le", "ingress", *OF_PROMETHEUS}.union(*(LABELS[family_of(s.name)] for s in selectors))
        for selector in selectors:
            assert selector.name in scraped, (name, selector.name)
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= LABELS[family_of(selector.name)] | OF_PROMETHEUS, (name, asked)
        for node in nodes:
            modifier = node.modifier if isinstance(node, promql.AggregateExpr) else None
            matching = node.modifier and node.modifier.matching if isinstance(node, promql.BinaryExpr) else None
            for clause in filter(None, (modifier, matching)):
                assert set(clause.labels) <= known, (name, clause.labels)


def test_every_metric_has_a_panel() -> None:
    asked = {
        family_of(node.name)
        for target in QUERIES.values()
        for node in parsed(target["expr"])
        if isinstance(node, promql.VectorSelector)
    }
    assert asked == set(LABELS)


def test_labels_that_are_shown_are_there() -> None:
    for name, target in QUERIES.items():
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert label == "ingress" or label in target["expr"] or "max without" in target["expr"], (name, label)


def test_what_matchers_compare_with_is_said_somewhere() -> None:
    """A label's value that is misspelt would match nothing, and nobody would notice."""
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "router").glob("*.py"))
    for name, expression in EXPRESSIONS.items():
        for selector in parsed(expression):
            matchers = selector.matchers.matchers if isinstance(selector, promql.VectorSelector) else ()
            for value in (value for matcher in matchers for value in matcher.value.split("|")):
                assert value.startswith("$") or re.match("[1-5]", value) or f'"{value}"' in source, (name, value)


def test_panels_have_their_own_places_and_ids() -> None:
    board = dashboard()["panels"]
    groups = [board, *(panel.get("panels", []) for panel in board)]
    ids = [panel["id"] for group in groups for panel in group]
    assert len(ids) == len(set(ids))
    for group in groups:
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in group)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert all(x < 24 for x, _ in cells)


def test_alerts_say_how_grave_and_where_to_read() -> None:
    for alert in ALERTS.values():
        assert re.fullmatch("Shoal[A-Za-z]+", alert.name)
        assert alert.summary.endswith(".")
        assert alert.rule()["annotations"]["runbook_url"].endswith(f"#{alert.name.lower()}")


def test_every_alert_has_its_section_and_no_section_is_left_over() -> None:
    page = (ROOT / "docs" / "OPERATING.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Shoal\w+)$", page, re.MULTILINE) == list(ALERTS)


HEALTHY = {
    "shoal_router_in_flight": "3x60",
    "shoal_router_load": "0.2x60",
    'shoal_replica_ready{replica="r1"}': "1x60",
    'shoal_kv_cache_usage_perc{replica="r1"}': "0.5x60",
    'shoal_http_responses_total{route="/v1/completions",status="200"}': "0+600x60",
    'shoal_http_responses_total{route="/ready",status="503"}': "0+60x60",  # a probe's affair, and no client's
    "shoal_stream_errors_total": "0x60",
    "shoal_redis_available": "1x60",
    "shoal_redis_writable": "1x60",
    "shoal_redis_call_seconds_count": "0+600x60",
    'shoal_redis_call_seconds_bucket{le="0.001"}': "0+600x60",
    'shoal_redis_call_seconds_bucket{le="+Inf"}': "0+600x60",
    'shoal_time_to_first_token_seconds_bucket{variant="stable",le="0.1"}': "0+600x60",
    'shoal_time_to_first_token_seconds_bucket{variant="stable",le="+Inf"}': "0+600x60",
    'shoal_inter_token_latency_seconds_bucket{variant="stable",le="0.01"}': "0+600x60",
    'shoal_inter_token_latency_seconds_bucket{variant="stable",le="+Inf"}': "0+600x60",
    'shoal_rank_restarts_total{replica="r1"}': "1x60",
    'shoal_num_preemptions_total{replica="r1"}': "0+1x60",
    'shoal_generations_interrupted_total{cause="handed_over"}': "0+6x60",
    'shoal_held_seconds{variant="stable"}': "20x60",
    'shoal_replicas_target{variant="stable"}': "2x60",
    'shoal_replicas_max{variant="stable"}': "2x60",
    'shoal_replicas_ready{variant="stable"}': "2x60",
    'shoal_ttft_objective_seconds{variant="stable"}': "2x60",
    "process_open_fds": "50x60",
    "process_max_fds": "1000x60",
}
"""Series as they are while all is well, a value a minute; of two ingresses, which say the same."""

ILL: dict[str, dict[str, str]] = {
    "ShoalDown": dict.fromkeys(HEALTHY, ""),
    "ShoalNoReplica": {'shoal_replica_ready{replica="r1"}': "0x60"},
    "ShoalErrors": {'shoal_http_responses_total{route="/v1/completions",status="500"}': "0+60x60"},
    "ShoalRefusing": {'shoal_http_responses_total{route="/v1/completions",status="429"}': "0+60x60"},
    "ShoalUnauthorized": {'shoal_http_responses_total{route="other",status="401"}': "0+120x60"},
    "ShoalSlowFirstToken": {
        'shoal_time_to_first_token_seconds_bucket{variant="stable",le="0.1"}': "0x60",
        'shoal_time_to_first_token_seconds_bucket{variant="stable",le="10"}': "0+600x60",
    },
    "ShoalSlowTokens": {
        'shoal_inter_token_latency_seconds_bucket{variant="stable",le="0.01"}': "0x60",
        'shoal_inter_token_latency_seconds_bucket{variant="stable",le="1"}': "0+600x60",
    },
    "ShoalOverloaded": {"shoal_router_load": "1.5x60"},
    "ShoalDegrading": {'shoal_degraded_requests_total{rung="max_tokens"}': "0+6x60"},
    "ShoalKVCacheFull": {'shoal_kv_cache_usage_perc{replica="r1"}': "0.99x60"},
    "ShoalPreempting": {'shoal_num_preemptions_total{replica="r1"}': "0+60x60"},
    "ShoalFileDescriptors": {"process_open_fds": "900x60"},
    "ShoalHeldLong": {'shoal_held_seconds{variant="stable"}': "200x60"},
    "ShoalAtMaxReplicas": {'shoal_ttft_objective_seconds{variant="stable"}': "0.05x60"},
    "ShoalReplicasMissing": {'shoal_replicas_ready{variant="stable"}': "1x60"},
    "ShoalGivenUp": {'shoal_generations_given_up_total{reason="deadline"}': "_x50 1x10"},
    "ShoalReplicaNotReady": {'shoal_replica_ready{replica="r2"}': "0x60"},
    "ShoalReplicasLost": {'shoal_generations_interrupted_total{cause="replica_lost"}': "0x50 4x10"},
    "ShoalRanksRestarting": {'shoal_rank_restarts_total{replica="r1"}': "1x30 5x30"},
    "ShoalPoisonRequest": {'shoal_generations_poisoned_total{replica="r1"}': "0x40 1x20"},
    "ShoalRedisDown": {"shoal_redis_available": "0x60"},
    "ShoalRedisReadOnly": {"shoal_redis_writable": "0x60"},
    "ShoalRedisSlow": {
        'shoal_redis_call_seconds_bucket{le="0.001"}': "0x60",
        'shoal_redis_call_seconds_bucket{le="0.05"}': "0+600x60",
    },
    "ShoalCacheUnreadable": {'shoal_response_cache_rejected_total{reason="unreadable"}': "0+60x60"},
    "ShoalVariantRolledBack": {'shoal_variant_rollbacks_total{variant="canary",bound="ttft"}': "_x40 1x20"},
}
"""Alert -> what is otherwise when it fires."""


def series_of(name: str, values: str) -> list[dict[str, str]]:
    head, _, labels = name.rstrip("}").partition("{")
    return [
        {
            "series": f'{head}{{{labels}{"," if labels else ""}job="shoal",instance="{i}",ingress="i1"}}',
            "values": values,
        }
        for i in (1, 2)
        if values
    ]


def case(otherwise: dict[str, str], expr: str, value: int | None) -> dict[str, Any]:
    """For promtool: what `expr` is after 55 minutes; None: nothing."""
    series = [entry for name, values in (HEALTHY | otherwise).items() for entry in series_of(name, values)]
    samples = [] if value is None else [{"labels": "{}", "value": value}]
    asked = {"expr": expr, "eval_time": "55m", "exp_samples": samples}
    return {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (apt install prometheus)")
def test_an_alert_fires_when_it_should_and_rests_otherwise(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    assert list(ILL) == list(ALERTS)
    firing = 'count(ALERTS{{alertname=~"{}",alertstate="firing"}}) > bool 0'
    cases = [case(otherwise, firing.format(name), 1) for name, otherwise in ILL.items()]
    tests = {"rule_files": ["alerts.yaml"], "tests": [case({}, firing.format(".*"), None), *cases]}
    (tmp_path / "alerts.yaml").write_text(files()["alerts.yaml"])
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    judged = subprocess.run(
        [PROMTOOL, "test", "rules", str(tmp_path / "tests.yaml")], capture_output=True, text=True, check=False
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_the_dashboard_is_json_that_grafana_takes() -> None:
    board = json.loads(files()["dashboard.json"])
    assert {panel["type"] for panel in panels()} == {"stat", "timeseries"}
    assert all(target["datasource"]["uid"] == "${datasource}" for target in QUERIES.values())
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "namespace", "job"]
