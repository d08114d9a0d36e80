"""`shoal quantize` and `shoal perplexity`: files in, files and a short report out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import ConfigError
from .processes import raise_on_signals

if TYPE_CHECKING:
    import torch

    from ..runtime.perplexity import Comparison
    from ..runtime.quantize import Recipe, Report

MAX_TEXT = 1 << 20  # characters of a text that are read


def run_quantize(
    model: str, out: Path, recipe: Recipe, *, calibration: Path | None, evaluation: bool, report: Path | None
) -> None:
    """Write the quantised model, hold it against the original, print what came out."""
    from ..runtime.hub import resolve_model
    from ..runtime.perplexity import compare, shipped_text
    from ..runtime.quantize import quantize

    raise_on_signals()  # what is half written is removed on SIGTERM, too
    if report is not None and not report.absolute().parent.is_dir():
        raise ConfigError(f"--report {report}: there is no folder {report.absolute().parent}")
    text = shipped_text("calibration") if calibration is None else _read_text("--calibration", calibration)
    path, device = resolve_model(model), _device()
    done = quantize(path, out, recipe, calibration=text, device=device)
    found = compare(path, out, shipped_text("evaluation"), device=device) if evaluation else None
    print("\n".join([*_describe(done), *(_describe_comparison(found) if found else [])]))
    print(f"\nshoal serve {out}")
    if report is not None:
        _write_report(report, {"model": str(path), "out": str(out), **asdict(done)}, found)


def run_perplexity(model: str, other: str | None, *, text: Path | None) -> None:
    """Print a model's perplexity on a text, or how far another model is from it."""
    from ..runtime.hub import resolve_model
    from ..runtime.perplexity import compare, measure, shipped_text

    content = shipped_text("evaluation") if text is None else _read_text("--text", text)
    path, device = resolve_model(model), _device()
    if other is None:
        found = measure(path, content, device=device)
        print(f"perplexity  {found.perplexity:.3f} on {found.num_tokens} tokens")
    else:
        print("\n".join(_describe_comparison(compare(path, resolve_model(other), content, device=device))))


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _read_text(flag: str, file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MAX_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {file}: {error}") from None
    if not text.strip():
        raise ConfigError(f"{flag} {file}: there is no text in it")
    return text


def _describe(report: Report) -> list[str]:
    group = f", groups of {report.group_size}" if report.group_size else ""
    lines = [
        (
            f"Quantised {report.num_matrices} matrices of {report.num_layers} layers to {report.format} "
            f"({report.layout}{group}) in {report.seconds:.1f} s"
        ),
        f"size        {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB",
        f"bits        {report.bits:.2f} a weight of these, with scales and zero points",
    ]
    lines += [f"8 bits      {', '.join(report.finer)}"] if report.finer else []
    lines += [f"left dense  {', '.join(report.dense)}"] if report.dense else []
    return lines + [f"not scaled  {why} ({count} layers)" for why, count in sorted(report.unscaled.items())]


def _describe_comparison(found: Comparison) -> list[str]:
    change = f"{found.perplexity:.3f} -> {found.other_perplexity:.3f} ({100 * found.loss:+.2f} %)"
    return [
        f"perplexity  {change} on {found.num_tokens} tokens",
        f"KL          mean {found.kl_mean:.4f}, max {found.kl_max:.3f} nats",
        f"logits      relative error mean {found.error_mean:.4f}, max {found.error_max:.3f}",
        f"best token  the same for {100 * found.agreement:.1f} %",
    ]


def _write_report(file: Path, values: dict[str, Any], found: Comparison | None) -> None:
    if found is not None:
        values["comparison"] = {**asdict(found), "loss": found.loss}
    try:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"shoal: --report {file}: {error}", file=sys.stderr)
