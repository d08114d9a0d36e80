"""`shoal bench kernels`: each operation of this device's `Ops` at a model's shapes, beside what the device can do.

Weights and pages are cold, as in a model: calls go round over copies that no cache holds together. Small tensors are
not, as in a model. The ceilings, a copy and a square product, are measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from ..runtime.errors import ConfigError
from .bench_report import write_json
from .table import table_lines

if TYPE_CHECKING:
    import torch

    from ..runtime.models.spec import ModelSpec

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """What is timed where. batches: tokens of a decode step. contexts: tokens that attention reads, and prompts'."""

    device: str
    dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: float
    threads: int | None = None
    kv_cache_dtype: Literal["auto", "bfloat16", "int8", "fp8"] = "auto"


@dataclass(frozen=True, slots=True)
class Case:
    """One operation. calls: the same on data of their own. bytes: that it must move. flops: that it must do, 0: few."""

    name: str
    calls: Sequence[Call]
    bytes: float
    flops: float = 0.0


class Figure(msgspec.Struct, frozen=True):
    """What one operation took. Shares are of the measured ceilings; above 1 a cache has helped."""

    name: str
    us: float
    gb_per_s: float
    gflop_per_s: float
    copy_share: float
    peak_share: float


class Timer(Protocol):
    """How long calls take on one device."""

    def us(self, calls: Sequence[Call]) -> float:
        """Of one call, in the mean of the best round; rounds go over all calls in turn."""
        ...


class CpuTimer:
    """By the clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def us(self, calls: Sequence[Call]) -> float:
        best, end = float("inf"), time.perf_counter() + self._seconds
        for call in calls:
            call()
        while True:
            begin = time.perf_counter()
            for call in calls:
                call()
            now = time.perf_counter()
            best = min(best, (now - begin) / len(calls))
            if now > end:
                return 1e6 * best


class CudaTimer:
    """By events on the device, around so many launches that the host is ahead of it."""

    LAUNCHES = 50

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def us(self, calls: Sequence[Call]) -> float:
        import torch

        rounds = max(1, self.LAUNCHES // len(calls))
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize()
        best, end = float("inf"), time.perf_counter() + self._seconds
        while True:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            marks[0].record()
            for _ in range(rounds):
                for call in calls:
                    call()
            marks[1].record()
            marks[1].synchronize()
            best = min(best, float(marks[0].elapsed_time(marks[1])) / (rounds * len(calls)))
            if time.perf_counter() > end:
                return 1e3 * best


def bench_kernels(model: str | None, plan: KernelPlan, *, json_file: Path | None) -> None:
    """Time everything; prints a table.

    Raises:
        ConfigError: there is no such device or model.
    """
    import torch

    from ..runtime.hub import resolve_model
    from ..runtime.models.spec import ModelSpec
    from ..runtime.rank import DTYPES, open_checkpoint
    from .demo import need_demo_model
    from .progress import Progress

    device = find_device(plan.device)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    path = resolve_model(model or str(need_demo_model()))
    spec = ModelSpec.from_config(open_checkpoint(path).config)
    with Progress() as progress, torch.inference_mode():
        progress.phase("measuring the ceilings")
        figures, ceilings = measure(spec, plan, device, DTYPES[plan.dtype], on_case=progress.phase)
    about = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{path.name}'s shapes, {plan.dtype}, {device.type}, {about}")
    print(f"copy {ceilings[0]:.1f} GB/s, square product {ceilings[1]:,.0f} GFLOP/s\n")
    print("\n".join(kernel_lines(figures)))
    if json_file is not None:
        measured = {"copy_gb_per_s": ceilings[0], "product_gflop_per_s": ceilings[1]}
        config = {"model": str(path), **msgspec.to_builtins(plan), "device": device.type, "about": about}
        write_json(
            json_file, "kernels", {"config": config, "ceilings": measured, "figures": msgspec.to_builtins(figures)}
        )


def find_device(name: str) -> torch.device:
    """Raises ConfigError."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def measure(
    spec: ModelSpec,
    plan: KernelPlan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    on_case: Callable[[str], None] = lambda name: None,
) -> tuple[list[Figure], tuple[float, float]]:
    """All figures, and the ceilings: GB/s of a copy, GFLOP/s of a product. on_case: told each name ahead of it."""
    from .bench_cases import cases, ceiling_cases

    timer: Timer = CudaTimer(plan.seconds) if device.type == "cuda" else CpuTimer(plan.seconds)
    copy, product = (_rates(case, timer) for case in ceiling_cases(device, dtype))
    ceilings = copy[1], product[2]
    figures = []
    for case in cases(spec, plan, device, dtype):
        on_case(case.name)
        us, gb, gflop = _rates(case, timer)
        figures.append(Figure(case.name, us, gb, gflop, gb / ceilings[0], gflop / ceilings[1]))
    return figures, ceilings


def _rates(case: Case, timer: Timer) -> tuple[float, float, float]:
    """Microseconds, GB/s and GFLOP/s."""
    us = timer.us(case.calls)
    return us, case.bytes / us / 1e3, case.flops / us / 1e3


def kernel_lines(figures: Sequence[Figure]) -> list[str]:
    """For people."""
    return table_lines(("", "us", "GB/s", "of copy", "GFLOP/s", "of product"), list(_cells(figures)))


def _cells(figures: Sequence[Figure]) -> Iterator[tuple[str, ...]]:
    for figure in figures:
        flops = (f"{figure.gflop_per_s:,.1f}", f"{figure.peak_share:.0%}") if figure.gflop_per_s else ("-", "-")
        yield figure.name, f"{figure.us:,.1f}", f"{figure.gb_per_s:.1f}", f"{figure.copy_share:.0%}", *flops
