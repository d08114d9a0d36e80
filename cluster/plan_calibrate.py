"""What `shoal bench kernels --json` and `shoal bench engine --json` have measured, as constants of the roofline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ..runtime.errors import ConfigError
from .plan_costs import Efficiency, RooflineCosts
from .plan_gpus import Gpu

_SCHEMAS: dict[str, Literal["kernels", "engine"]] = {
    "shoal.bench.kernels/1": "kernels",
    "shoal.bench.engine/1": "engine",
}
_PRODUCTS = "products of a layer"
_ROUNDS = 5
_LEAST = 0.1  # of a step is its reading or computing, whatever the rest is thought to take
_MOST = 1.5  # a share beyond that is a cache's doing


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one file says. Of the parts that it is not about, nothing changes."""

    kind: Literal["kernels", "engine"]
    data: Mapping[str, Any]

    def check(self, model: str, *, is_cpu: bool) -> None:
        """Raises ConfigError: it is about another kind of device, or an engine with another model."""
        config = self.data.get("config", {})
        device = str(self.data.get("device", config.get("device", "")))
        if device and device.startswith("cpu") != is_cpu:
            raise ConfigError(
                f"--calibrate: it was measured on {device}, and --gpu is {'the CPU' if is_cpu else 'a GPU'}"
            )
        measured = config.get("model")
        if self.kind == "engine" and measured is not None and Path(measured).name != Path(model).name:
            raise ConfigError(
                f"--calibrate: an engine with {measured} was measured: plan for it, or use `shoal bench kernels`"
            )

    def kernels(self, gpu: Gpu, efficiency: Efficiency, weights: str) -> tuple[Gpu, Efficiency]:
        """The device as it was measured (a copy, a square product), and the shares that a layer's products reach.

        weights: what they multiply with, as the file calls it: dense, 4-bit, 8-bit, fp8.
        """
        if self.kind != "kernels":
            return gpu, efficiency
        ceilings = self.data["ceilings"]
        gpu = replace(gpu, gb_s=float(ceilings["copy_gb_per_s"]), tflops=float(ceilings["product_gflop_per_s"]) / 1e3)
        products = [figure for figure in self.data["figures"] if figure["name"].startswith(_PRODUCTS)]
        products = [figure for figure in products if figure["name"].startswith(f"{_PRODUCTS}, {weights},")] or products
        reading, computing = _few_and_many(products)
        return gpu, replace(
            efficiency,
            bandwidth=min(_MOST, median(figure["copy_share"] for figure in reading)),
            flops=min(_MOST, median(figure["peak_share"] for figure in computing)),
        )

    def engine(self, efficiency: Efficiency, costs_of: Callable[[Efficiency], RooflineCosts]) -> Efficiency:
        """Constants with which the roofline says of one rank what was measured: prompts, one sequence, the most.

        costs_of: a replica of one rank with such constants.
        """
        if self.kind != "engine":
            return efficiency
        rows, (prompt, prefill_s) = _decode_rows(self.data["rows"]), _prefill(self.data["rows"])
        context = _context(self.data)
        stage = costs_of(efficiency).stages[0]
        computed = max(prefill_s - stage.fixed_s, _LEAST * prefill_s)
        efficiency = replace(efficiency, flops=efficiency.flops * stage.prefill_s * prompt / computed)
        for _ in range(_ROUNDS):  # each of the two is found with the other one
            (few, few_s), (many, many_s) = rows[0], rows[-1]
            stage = costs_of(efficiency).stages[0]
            read = max(few_s - stage.fixed_s - few * stage.extra_row_s, _LEAST * few_s)
            reads = stage.read_s + few * context * stage.context_s
            efficiency = replace(efficiency, bandwidth=efficiency.bandwidth * reads / read)
            if many > few:
                without = costs_of(replace(efficiency, row_s=0.0)).stages[0].step_s(0, many, many * context)
                efficiency = replace(efficiency, row_s=max(0.0, (many_s - without) / many))
        return efficiency


def calibration(file: Path) -> Calibration:
    """Raises ConfigError: not such a file, or of a grid of several ranks."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibrate {file}: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    kind = _SCHEMAS.get(str(schema))
    if kind is None:
        raise ConfigError(
            f"--calibrate {file}: expected what `shoal bench kernels --json` or `shoal bench engine --json` has written"
        )
    if kind == "engine":
        config = data.get("config", {})
        if config.get("tensor_parallel_size", 1) * config.get("pipeline_parallel_size", 1) > 1:
            raise ConfigError(f"--calibrate {file}: measured on several ranks; constants are found on one")
    return Calibration(kind, data)


def _few_and_many(products: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Those of the fewest tokens, which read, and those of the most, which compute."""
    by_tokens: dict[int, list[Mapping[str, Any]]] = {}
    for figure in products:
        found = re.search(r"(\d+) tokens", figure["name"])
        if found is not None:
            by_tokens.setdefault(int(found[1]), []).append(figure)
    if not by_tokens:
        raise ConfigError("--calibrate: the file has no products of a layer")
    return by_tokens[min(by_tokens)], by_tokens[max(by_tokens)]


def _decode_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(sequences, seconds a step), the fewest first."""
    found = [(int(match[1]), row["step_ms"] / 1e3) for row in rows if (match := _decode(row["name"])) is not None]
    if not found:
        raise ConfigError("--calibrate: the file has no row of decoding")
    return sorted(found)


def _decode(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"decode, batch (\d+)", name)


def _prefill(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Tokens of prompts in a step, and its seconds."""
    row = next((row for row in rows if row["name"].startswith("prefill")), None)
    if row is None:
        raise ConfigError("--calibrate: the file has no row of reading prompts")
    return row["tokens"] / row["steps"], row["seconds"] / row["steps"]


def _context(data: Mapping[str, Any]) -> float:
    """Cached tokens of a sequence in the mean: those rows decode so many from a short prompt."""
    rows = [row for row in data["rows"] if _decode(row["name"]) is not None]
    return 32 + float(median(row["steps"] for row in rows)) / 2
