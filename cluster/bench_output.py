"""`shoal bench serve` from its plan to what it prints and writes, also where it is interrupted."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.errors import ConfigError
from .bench_flags import check_requests
from .bench_load import FileLoad, Load
from .bench_plot import run_panels, svg, sweep_panels
from .bench_report import check_writable, record_row, summary_lines, sweep_lines, write_json
from .bench_serve import Run, ServeBench, ServePlan
from .progress import Progress

FAILED, INTERRUPTED = 1, 130


def check_outputs(json_file: Path | None, plot: Path | None, *, rows: bool) -> None:
    """Before anything is sent. Raises ConfigError."""
    check_writable(json_file, "--json", ".json")
    check_writable(plot, "--plot", ".svg")
    if rows and json_file is None:
        raise ConfigError("--rows: they are written to the --json FILE only")


def run_serve(plan: ServePlan, *, json_file: Path | None, rows: bool, plot: Path | None) -> int:
    """Measure, print, write; the exit code: 1 where no request succeeded, 130 after Ctrl-C.

    Raises:
        ConfigError, RequestError, EngineError: there is nothing to measure.
    """
    check_requests(plan.load, plan.requests)
    code = 0
    with Progress() as progress:
        bench = ServeBench(plan, progress)
        try:
            asyncio.run(bench.run())
        except KeyboardInterrupt:
            code = INTERRUPTED
    runs = [run for run in bench.runs if run.records]
    if not runs:
        print("nothing was measured", file=sys.stderr)
        return code or FAILED
    print("\n".join(_lines(bench, runs)))
    if json_file is not None:
        write_json(json_file, "serve", serve_document(bench, runs, rows=rows))
    if plot is not None:
        plot.write_text(_picture(bench, runs), encoding="utf-8")
    return code or (FAILED if not any(run.summary().ok for run in runs) else 0)


def _lines(bench: ServeBench, runs: Sequence[Run]) -> list[str]:
    plan, summaries = bench.plan, [run.summary() for run in runs]
    sent = sum(summary.ok + summary.num_errors for summary in summaries)
    lines = [f"{bench.server['model']} at {plan.url}, {plan.endpoint}, {describe_load(plan)}, {sent} requests", ""]
    if len(runs) > 1:
        lines += [*sweep_lines(summaries), ""]
        kinds = {kind: text for summary in summaries for kind, text in summary.examples.items()}
        lines += [f"failed, {kind}: {text}" for kind, text in kinds.items()]
        lines += [f"note: {summary.pace}: {note}" for summary in summaries for note in summary.notes]
    else:
        lines += [f"{summaries[0].pace}, {summaries[0].duration_s:.1f} s, prompts {runs[0].digest}", ""]
        lines += summary_lines(summaries[0], plan.slo)
    return [*lines, *(f"note: {note}" for note in bench.notes)]


def describe_load(plan: ServePlan) -> str:
    """The load in a few words."""
    words = ", ".join(f"{name} {_short(value)}" for name, value in _load_document(plan.load).items() if name != "name")
    return f"{plan.load.name} ({words}), seed {plan.seed}"


def _short(value: Any) -> str:
    """A range, or a number."""
    if not isinstance(value, dict):
        return str(value)
    low, high = value["low"], value["high"]
    return str(low) if low == high else f"{low}:{high}"


def _load_document(load: Load) -> dict[str, Any]:
    """The load's parameters; of a file's, how many requests it has."""
    if isinstance(load, FileLoad):
        return {"name": load.name, "requests": load.num_turns}
    values: dict[str, Any] = msgspec.to_builtins(load)
    return {"name": load.name, **values}


def serve_document(bench: ServeBench, runs: Sequence[Run], *, rows: bool) -> dict[str, Any]:
    """What `--json` holds: the config, the server, and a summary for each run, with `rows` every request."""
    plan = bench.plan
    config = {
        "url": plan.url,
        "endpoint": plan.endpoint,
        "load": _load_document(plan.load),
        "seed": plan.seed,
        "requests": plan.requests,
        "duration_s": plan.duration_s,
        "burstiness": plan.burstiness,
        "temperature": plan.temperature,
        "warmup": plan.warmup,
        "slo": None if plan.slo is None else plan.slo.limits(),
    }
    points = []
    for run in runs:
        point = {**run.summary().document(), "load_digest": run.digest}
        points.append({**point, "requests": [record_row(record) for record in run.records]} if rows else point)
    return {"config": config, "server": bench.server, "notes": bench.notes, "points": points}


def _picture(bench: ServeBench, runs: Sequence[Run]) -> str:
    title = f"{bench.server['model']}, {describe_load(bench.plan)}"
    if len(runs) == 1:
        return svg(f"{title}, {runs[0].pace}", run_panels(runs[0].records))
    return svg(title, sweep_panels([run.summary() for run in runs], [run.records for run in runs]))
