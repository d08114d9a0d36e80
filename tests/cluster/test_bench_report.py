"""What is made of measurements: figures of known timings, documents whose keys stay, pictures that are XML."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from array import array
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cluster.bench_ask import Record
from shoal.cluster.bench_load import Ask
from shoal.cluster.bench_plot import run_panels, svg, sweep_panels
from shoal.cluster.bench_report import (
    ClientSide,
    Slo,
    Spread,
    Summary,
    environment,
    summarise,
    summary_lines,
    sweep_lines,
)
from shoal.cluster.cli import app
from shoal.runtime.errors import ConfigError

from .bench_server import Quirks, bench_server_thread, plain

CLIENT = ClientSide(Spread.of([0.001]), 0.1, 0)


def record(sent_s: float, *moments: float, tokens: int | None = None, error: str = "") -> Record:
    """A request of ten tokens that was sent then; its stream ends 10 ms behind its last text."""
    end_s = (moments[-1] if moments else sent_s) + 0.01
    asked = Ask(0, 0, ("a",), 10, len(moments) or 1)
    return Record(
        asked,
        sent_s,
        sent_s=sent_s,
        end_s=end_s,
        moments=array("d", moments),
        prompt_tokens=10,
        output_tokens=len(moments) if tokens is None else tokens,
        error=error,
        detail=f"{error} {sent_s:g}" if error else "",
    )


def summary(*records: Record, slo: Slo | None = None, client: ClientSide = CLIENT) -> Summary:
    return summarise(records, pace=("2 at once", "concurrency", 2.0), slo=slo, unended=0, peak=2, client=client)


def test_figures_of_known_timings() -> None:
    found = summary(record(0.0, 0.1, 0.2, 0.4), record(1.0, 1.3, 1.5, 1.99), record(1.0, error="status 429"))
    assert found.duration_s == pytest.approx(2.0)
    assert (found.ok, found.num_errors, found.prompt_tokens, found.output_tokens) == (2, 1, 20, 6)
    assert (found.requests_per_s, found.output_per_s, found.total_per_s) == pytest.approx((1.0, 3.0, 13.0))
    assert (found.ttft.mean, found.ttft.min, found.ttft.max) == pytest.approx((200, 100, 300))
    assert found.itl.count == 4
    assert found.itl.mean == pytest.approx((100 + 200 + 200 + 490) / 4)
    assert found.tpot.mean == pytest.approx((300 / 2 + 690 / 2) / 2)  # (e2e - ttft) / (n - 1)
    assert found.e2e.mean == pytest.approx((400 + 990) / 2)
    assert found.mean_concurrency == pytest.approx((0.41 + 1.0 + 0.01) / 2.0)


def test_percentiles_are_interpolated() -> None:
    found = Spread.of(n / 1000 for n in range(1, 102))
    assert [found.value(name) for name in ("p50", "p90", "p99")] == pytest.approx([51, 91, 100])
    assert Spread.of([]).cells() == ["-"] * 5


def test_several_tokens_in_a_piece_do_not_change_their_number() -> None:
    found = summary(record(0.0, 0.1, 0.4, tokens=7))
    assert found.output_tokens == 7
    assert found.tpot.mean == pytest.approx(300 / 6)
    assert any("3.50 tokens in the mean" in note for note in found.notes)


def test_an_answer_of_one_token_has_no_time_of_a_second() -> None:
    found = summary(record(0.0, 0.1))
    assert (found.ttft.count, found.itl.count, found.tpot.count) == (1, 0, 0)


def test_goodput_counts_who_kept_every_limit() -> None:
    fast, slow_first, slow_later = record(0.0, 0.1, 0.12), record(0.0, 0.6, 0.62), record(0.0, 0.1, 0.3)
    runs = (fast, slow_first, slow_later, record(0.0, error="timeout"))
    assert summary(*runs, slo=Slo.parse("ttft=500,tpot=50")).good == 1
    assert summary(*runs, slo=Slo.parse("ttft=500")).good == 2
    assert summary(*runs, slo=Slo.parse("e2e=1000")).good == 3
    limited = Slo.parse("ttft=500")
    assert "50.0% of the requests kept ttft 500 ms" in "\n".join(summary_lines(summary(*runs, slo=limited), limited))
    assert summary(*runs).goodput is None


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "itl=5", "ttft=0", "ttft=5;tpot=3", ""])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def test_a_client_that_is_the_limit_says_so() -> None:
    assert not summary(record(0.0, 0.1)).notes
    for slow in (ClientSide(Spread.of([0.001]), 0.95, 0), ClientSide(Spread.of([0.2] * 10), 0.1, 0)):
        assert any("CLIENT" in note for note in summary(record(0.0, 0.1), client=slow).notes)


def test_nothing_but_failures_is_shown_too() -> None:
    found = summary(record(0.0, error="status 500"), record(0.5, error="status 500"), record(0.7, error="cut off"))
    lines = "\n".join(summary_lines(found, None))
    assert "2 failed: status 500 0" in lines
    assert "1 failed: cut off 0.7" in lines
    assert found.requests_per_s == 0


def test_pictures_are_xml_with_a_line_for_what_was_measured() -> None:
    ok = [record(0.0, 0.1, 0.2, 0.4), record(1.0, 1.3, 1.3, 1.99)]
    for records in (ok, [], ok[:1], [record(0.0, 0.0, 0.0)], [record(0.0, error="x")]):
        found = summary(*records)
        for panels in (run_panels(records), sweep_panels([found, found], [records, records])):
            root = ET.fromstring(svg("a <b> & c", panels))
            assert len([e for e in root.iter() if e.tag.endswith("polyline")]) >= 4
            assert "nan" not in ET.tostring(root, encoding="unicode")


def test_a_sweep_has_a_line_a_run() -> None:
    lines = sweep_lines([summary(record(0.0, 0.1)), summary(record(0.0, 0.1))])
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    document, picture = tmp_path / "a.json", tmp_path / "a.svg"
    flags = ["--input-tokens", "10", "--output-tokens", "4", "--requests", "6", "--concurrency", "1,2"]
    with bench_server_thread(Quirks(fail={5: plain(500, {"error": {"message": "broken"}})})) as server:
        flags += ["--url", f"{server.url}/v1", "--slo", "ttft=60000", "--warmup", "1"]
        code, out = invoke("serve", *flags, "--json", str(document), "--rows", "--plot", str(picture))
    assert code == 0
    assert "failed, status 500: status 500: broken" in out
    for pace in ("1 at once", "2 at once"):
        assert pace in out
        assert pace in picture.read_text()
    found = json.loads(document.read_bytes())
    assert found["schema"] == "shoal.bench.serve/1"
    assert set(found) == {"schema", "environment", "config", "server", "notes", "points"}
    assert {"time", "command", "python", "platform", "cores", "versions", "commit"} == set(found["environment"])
    assert found["config"]["load"] == {
        "name": "random",
        "input": {"low": 10, "high": 10},
        "output": {"low": 4, "high": 4},
    }
    first, second = found["points"]
    assert (first["ok"], first["errors"], second["ok"]) == (5, {"status 500": 1}, 6)
    assert len(first["requests"]) == 6
    assert {"p1", "p50", "p90", "p99", "p99.9"} <= set(first["ttft"]["percentiles"])
    for key in ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "peak_concurrency", "client", "load_digest"):
        assert key in first


@pytest.mark.parametrize("typed", [["--api-key", "k123"], ["--api-key=k123"]])
def test_documents_hold_no_key(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["shoal", "bench", "serve", *typed, "--rate", "1"])
    command = environment()["command"]
    assert "k123" not in command
    assert command.startswith("shoal bench serve --api-key")
    assert command.endswith("*** --rate 1")


def test_a_server_that_only_fails_is_exit_code_1() -> None:
    fails = {number: plain(503, {"error": {"message": "no"}}) for number in range(1, 9)}
    with bench_server_thread(Quirks(fail=fails)) as server:
        flags = ["--input-tokens", "5", "--output-tokens", "2", "--requests", "4", "--warmup", "0"]
        code, out = invoke("serve", "--url", server.url, *flags)
    assert code == 1
    assert "4 failed: status 503: no" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["serve", "--json", "/no/such/a.json"], "--json /no/such/a.json: cannot be written"),
        (["serve", "--plot", "a.png"], "--plot a.png: only .svg is written"),
        (["serve", "--rows"], "--rows"),
        (["serve", "--rate", "fast"], "--rate fast"),
        (["serve", "--slo", "speed=3"], "--slo speed=3"),
        (["serve", "--url", "ftp://x"], "--url ftp://x"),
        (["engine", "--batch", "1,x"], "--batch 1,x"),
        (["kernels", "--context", "0"], "--context 0"),
    ],
)
def test_refusals_come_before_anything_is_measured(flags: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", *flags])
    assert isinstance(result.exception, ConfigError), result.output
    assert words in str(result.exception)


def test_bench_alone_says_which_does_what() -> None:
    out = CliRunner().invoke(app, ["bench"]).output
    for command in ("serve", "engine", "kernels", "startup"):
        assert command in out
