"""What `shoal bench` has measured, as values, tables and JSON. Latencies are milliseconds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.errors import ConfigError
from .bench_ask import Record
from .table import table_lines

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99, 99.9)
LAG_LIMIT_MS = 20.0
BUSY_LIMIT = 0.8
KEY_FLAG = "--api-key"
METRICS = ("ttft", "tpot", "e2e")


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds. percentiles: by name, `p50`; interpolated between neighbours."""

    count: int
    mean: float
    min: float
    max: float
    percentiles: dict[str, float]

    @staticmethod
    def of(seconds: Iterable[float]) -> Spread:
        import numpy as np

        values = 1e3 * np.fromiter(seconds, dtype=np.float64)
        if not values.size:
            return Spread(0, 0.0, 0.0, 0.0, {})
        found = np.percentile(values, PERCENTILES)
        percentiles = {f"p{share:g}": round(float(value), 4) for share, value in zip(PERCENTILES, found, strict=True)}
        mean, low, high = (round(float(value), 4) for value in (values.mean(), values.min(), values.max()))
        return Spread(int(values.size), mean, low, high, percentiles)

    def cells(self, names: Sequence[str] = ("mean", "p50", "p90", "p99", "max")) -> list[str]:
        """Of a table; `-` where there is nothing."""
        return [f"{self.value(name):.2f}" if self.count else "-" for name in names]

    def value(self, name: str) -> float:
        own = {"mean": self.mean, "min": self.min, "max": self.max}
        return own[name] if name in own else self.percentiles.get(name, 0.0)


class Slo(msgspec.Struct, frozen=True):
    """Limits in milliseconds that a request must keep, all of them, to be good. None: no such limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @staticmethod
    def parse(text: str) -> Slo:
        """Of `ttft=500,tpot=50`. Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ConfigError(f"--slo {text}: {part!r} is no limit; expected milliseconds, as ttft=500") from None
            if name not in METRICS or not limits[name] > 0:
                raise ConfigError(f"--slo {text}: {part!r}; expected one of {', '.join(METRICS)}, above 0")
        return Slo(**limits)

    def keeps(self, record: Record) -> bool:
        found = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2e": record.e2e_s}
        return record.is_ok and all(1e3 * found[name] <= limit for name, limit in self.limits().items())

    def limits(self) -> dict[str, float]:
        return {name: limit for name, limit in msgspec.structs.asdict(self).items() if limit is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {limit:g} ms" for name, limit in self.limits().items())


class ClientSide(msgspec.Struct, frozen=True):
    """How well the client kept up. lag: how late requests left and its loop woke up. cpu: share of a core."""

    lag: Spread
    cpu: float
    held: int

    @property
    def was_bottleneck(self) -> bool:
        return self.cpu > BUSY_LIMIT or self.lag.value("p99") > LAG_LIMIT_MS


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run at one pace. Tokens and rates are of the requests that succeeded.

    good: requests that kept the SLO; None without one. unended: were in flight when the run was broken off.
    """

    pace: str
    pace_kind: str
    pace_value: float
    duration_s: float
    ok: int
    errors: dict[str, int]
    examples: dict[str, str]
    unended: int
    prompt_tokens: int
    output_tokens: int
    good: int | None
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    peak_concurrency: int
    mean_concurrency: float
    client: ClientSide
    notes: list[str]

    @property
    def requests_per_s(self) -> float:
        return self.ok / self.duration_s if self.duration_s else 0.0

    @property
    def output_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def total_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.duration_s if self.duration_s else 0.0

    @property
    def goodput(self) -> float | None:
        """Good requests a second."""
        return None if self.good is None else self.good / max(self.duration_s, 1e-9)

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def document(self) -> dict[str, Any]:
        """With what follows from the rest."""
        rates = {
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_per_s,
            "total_tokens_per_s": self.total_per_s,
            "goodput_per_s": self.goodput,
        }
        return {**msgspec.to_builtins(self), **rates, "client_was_bottleneck": self.client.was_bottleneck}


def summarise(
    records: Sequence[Record],
    *,
    pace: tuple[str, str, float],
    slo: Slo | None,
    unended: int,
    peak: int,
    client: ClientSide,
) -> Summary:
    """Of what has ended. pace: in words, its kind and its value."""
    ok = [record for record in records if record.is_ok]
    began = min((record.sent_s for record in records), default=0.0)
    duration_s = max((record.end_s for record in records), default=0.0) - began
    failed = [record for record in records if not record.is_ok]
    return Summary(
        pace=pace[0],
        pace_kind=pace[1],
        pace_value=pace[2],
        duration_s=duration_s,
        ok=len(ok),
        errors=dict(Counter(record.error for record in failed).most_common()),
        examples={record.error: record.detail for record in reversed(failed)},
        unended=unended,
        prompt_tokens=sum(record.prompt_tokens or record.ask.prompt_tokens or 0 for record in ok),
        output_tokens=sum(record.num_output for record in ok),
        good=None if slo is None else sum(slo.keeps(record) for record in ok),
        ttft=Spread.of(record.ttft_s for record in ok),
        itl=Spread.of(late - early for record in ok for early, late in pairwise(record.moments)),
        tpot=Spread.of(record.tpot_s for record in ok if record.tpot_s is not None),
        e2e=Spread.of(record.e2e_s for record in ok),
        peak_concurrency=peak,
        mean_concurrency=sum(record.end_s - record.sent_s for record in records) / max(duration_s, 1e-9),
        client=client,
        notes=[*_token_notes(ok), *_client_notes(client)],
    )


def _token_notes(ok: Sequence[Record]) -> list[str]:
    """Where what was measured is not quite what was asked for."""
    notes = []
    if mute := sum(record.output_tokens is None for record in ok):
        notes.append(f"{mute} answers came without usage: their pieces of text are counted as tokens")
    if short := sum(record.num_output < record.ask.output_tokens for record in ok):
        notes.append(f"{short} answers were shorter than asked for")
    pieces, tokens = sum(len(record.moments) for record in ok), sum(record.num_output for record in ok)
    if pieces and tokens > 1.05 * pieces:
        notes.append(f"a piece of text brought {tokens / pieces:.2f} tokens in the mean: gaps are between pieces")
    pairs = [(record.prompt_tokens, record.ask.prompt_tokens) for record in ok]
    known = [(counted, asked) for counted, asked in pairs if counted is not None and asked is not None]
    counted, asked = sum(pair[0] for pair in known), sum(pair[1] for pair in known)
    if asked and abs(counted - asked) > 0.01 * asked:
        notes.append(
            f"prompts had {counted / len(known):.1f} tokens in the mean, where {asked / len(known):.1f} were meant"
        )
    return notes


def _client_notes(client: ClientSide) -> list[str]:
    notes = []
    if client.held:
        notes.append(f"{client.held} turns waited for the answer before them")
    if client.was_bottleneck:
        lag = client.lag.value("p99")
        notes.append(
            f"THE CLIENT MAY BE THE LIMIT: {client.cpu:.0%} of a core, {lag:.1f} ms late at the 99th percentile"
        )
    return notes


def summary_lines(summary: Summary, slo: Slo | None) -> list[str]:
    """One run for people."""
    rows = [
        ("time to first token, ms (TTFT)", *summary.ttft.cells()),
        ("between pieces of text, ms (ITL)", *summary.itl.cells()),
        ("a token after the first, ms (TPOT)", *summary.tpot.cells()),
        ("whole request, ms (e2e)", *summary.e2e.cells()),
    ]
    lines = [*table_lines(("", "mean", "p50", "p90", "p99", "max"), rows), ""]
    lines.append(
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_per_s:.1f} output tokens/s, "
        f"{summary.total_per_s:.1f} tokens/s with prompts; {summary.mean_concurrency:.1f} at once in the mean, "
        f"{summary.peak_concurrency} at most"
    )
    if summary.goodput is not None:
        share = summary.good / max(1, summary.ok + summary.num_errors) if summary.good else 0.0
        lines.append(f"goodput {summary.goodput:.2f} requests/s: {share:.1%} of the requests kept {slo}")
    lines += [f"{count} failed: {summary.examples[kind]}" for kind, count in summary.errors.items()]
    lines += [f"{summary.unended} were in flight at the end and are not counted"] if summary.unended else []
    return [*lines, *(f"note: {note}" for note in summary.notes)]


def sweep_lines(summaries: Sequence[Summary]) -> list[str]:
    """Many runs for people: a line each."""
    latencies = ("TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "e2e p50", "p99")
    head = ("", "req/s", "out tok/s", *latencies, "goodput", "errors")
    rows = [
        (
            run.pace,
            f"{run.requests_per_s:.2f}",
            f"{run.output_per_s:.1f}",
            *run.ttft.cells(("p50", "p99")),
            *run.itl.cells(("p50", "p99")),
            *run.tpot.cells(("p50",)),
            *run.e2e.cells(("p50", "p99")),
            "-" if run.goodput is None else f"{run.goodput:.2f}",
            str(run.num_errors),
        )
        for run in summaries
    ]
    return table_lines(head, rows)


def record_row(record: Record) -> dict[str, Any]:
    """One request for the JSON document; moments are seconds from the start of its run."""
    return {
        "conversation": record.ask.conversation,
        "turn": record.ask.turn,
        "due_s": record.due_s,
        "sent_s": record.sent_s,
        "end_s": record.end_s,
        "ttft_ms": 1e3 * record.ttft_s if record.is_ok else None,
        "e2e_ms": 1e3 * record.e2e_s if record.is_ok else None,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.num_output,
        "finish_reason": record.finish_reason,
        "error": record.error,
        "moments_s": [round(moment, 6) for moment in record.moments],
    }


def environment() -> dict[str, Any]:
    """Where this runs, and which code it is."""
    packages = ("shoal", "torch", "triton", "ray", "transformers")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["shoal", *_without_keys(sys.argv[1:])]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "commit": _commit(),
    }


def _without_keys(arguments: Sequence[str]) -> Iterator[str]:
    """No key in a document that is passed around."""
    before = ""
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if before == KEY_FLAG:
            yield "***"
        else:
            yield f"{flag}=***" if flag == KEY_FLAG and equals else argument
        before = argument


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str | None:
    """Of the checkout that this file is in, with a `+` where it has changes; None elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def check_writable(file: Path | None, flag: str, suffix: str) -> None:
    """Before anything is measured. Raises ConfigError."""
    if file is None:
        return
    if file.suffix != suffix:
        raise ConfigError(f"{flag} {file}: only {suffix} is written")
    if not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{flag} {file}: cannot be written there")


def write_json(file: Path, kind: str, content: Mapping[str, Any]) -> None:
    """A document that says what it is, where and when it was made, and `content`."""
    document = {"schema": f"shoal.bench.{kind}/1", "environment": environment(), **content}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
