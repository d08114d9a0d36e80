"""A plan for people, and the same as JSON: the table, the pick with its memory, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .plan import Misfit, Option, Plan
from .plan_gpus import GIB, PRICES_OF, Gpu
from .plan_grids import PlannedRank
from .plan_load import Demand, Miss, missed
from .table import table_lines

_HEAD = (
    "grid (tp x pp x replicas)",
    "GPUs",
    "weights",
    "KV GiB",
    "KV tokens",
    "at context",
    "TTFT",
    "ITL",
    "tok/s each",
    "tok/s all",
    "goodput",
    "USD/h",
    "USD/M tok",
    "bound by",
)
_LEGEND = {
    False: "TTFT and ITL are of nine in ten under that rate; tok/s are the most within the objectives.",
    True: "TTFT, ITL and tok/s are of replicas that are as full as memory and the objectives allow.",
}
_PARTS = ("rank", "on", "layers", "reserved", "weights", "workspace", "graphs", "KV cache", "spare", "outside")


def report(plan: Plan) -> str:
    """For people."""
    lines = [*_asked(plan), "", *table_lines(_HEAD, [_row(plan, option) for option in plan.options])]
    lines += ["", _LEGEND[plan.problem.demand.rate is None], "", *_picked(plan)]
    lines += ["", "Memory of a replica's ranks, GiB:", *table_lines(_PARTS, _memory(plan.pick))]
    if plan.misfits:
        lines += ["", "Do not fit:", *(f"  {words}" for words in _misfits(plan.misfits))]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in seconds, bytes and USD; infinite times are null."""
    demand = plan.problem.demand
    return {
        "schema": "shoal.plan/1",
        "model": plan.problem.model.name,
        "weights": plan.problem.model.weights,
        "gpus": {pool.gpu.name: pool.count for pool in plan.problem.pools},
        "demand": {
            "context": demand.context,
            "prompt": demand.typical.prompt,
            "answer": demand.typical.answer,
            "rate": demand.rate,
            "ttft_s": demand.ttft_s,
            "itl_s": demand.itl_s,
        },
        "options": [_option_json(option, demand) for option in plan.options],
        "misfits": [{"grid": str(misfit.layout), "reason": misfit.reason} for misfit in plan.misfits],
    }


def _asked(plan: Plan) -> list[str]:
    problem, demand = plan.problem, plan.problem.demand
    times = {True: "ranks on this", False: "x"}
    gpus = ", ".join(f"{pool.count} {times[pool.gpu.is_cpu]} {_gpu(pool.gpu)}" for pool in problem.pools)
    wanted = [
        f"context {demand.context:,}",
        f"prompts of {demand.typical.prompt:,}",
        f"answers of {demand.typical.answer:,}",
        *([f"{demand.rate:g} requests/s"] if demand.rate is not None else []),
        *([f"TTFT <= {_time(demand.ttft_s)}"] if demand.ttft_s is not None else []),
        *([f"ITL <= {_time(demand.itl_s)}"] if demand.itl_s is not None else []),
    ]
    lines = [f"{problem.model.name}: {problem.model.weights}, KV cache {problem.config.kv_cache_dtype}", gpus]
    lines.append(", ".join(wanted))
    if any(pool.gpu.usd_h for pool in problem.pools):
        lines.append(f"Prices are typical ones of {PRICES_OF} unless --price says otherwise.")
    return lines


def _gpu(gpu: Gpu) -> str:
    price = f", USD {gpu.usd_h:.2f} an hour" if gpu.usd_h else ""
    return f"{gpu.name} ({gpu.gib:.1f} GiB, {gpu.gb_s:,.0f} GB/s, {gpu.tflops:,.3g} TFLOP/s{price})"


def _row(plan: Plan, option: Option) -> tuple[str, ...]:
    forecast, layout = option.forecast, option.layout
    context = plan.problem.demand.context
    missed = "" if forecast.meets else " (missed)"
    return (
        f"{layout}{f'  layers {_layers(option)}' if option.grid.pp_layers else ''}",
        str(layout.num_gpus),
        f"{max(rank.memory.weight_bytes for rank in option.grid.ranks) / GIB:.1f}",
        f"{option.grid.fullest.memory.kv_bytes / GIB:.1f}",
        f"{option.grid.kv_tokens:,}",
        f"{option.grid.kv_tokens / context:.1f}",
        _time(forecast.ttft_s),
        _time(forecast.itl_s),
        f"{forecast.capacity.tokens_s:,.0f}",
        f"{option.tokens_s:,.0f}",
        f"{forecast.goodput:,.0f}{missed}",
        f"{layout.usd_h:.2f}",
        f"{option.usd_a_million:.2f}" if option.usd_a_million < 1e6 else "-",
        forecast.capacity.binds,
    )


def _layers(option: Option) -> str:
    return ",".join(map(str, option.grid.pp_layers or ()))


def _picked(plan: Plan) -> list[str]:
    pick = plan.pick
    found, demand = pick.forecast, plan.problem.demand
    lines = [f"Pick: {pick.layout}: {_why(plan)}."]
    lines.append(
        f"A replica holds {found.capacity.rows} such requests at once within the objectives "
        f"({pick.grid.kv_tokens / demand.context:.1f} of the full context), bound by {found.capacity.binds}; a request "
        f"that meets nobody has its first token after {_time(found.alone_ttft_s)} and the others every "
        f"{_time(found.alone_itl_s)}."
    )
    if pick.grid.pp_layers:
        names = [gpu.name for gpu in pick.layout.stages]
        split = ", ".join(f"{count} on {name}" for count, name in zip(pick.grid.pp_layers, names, strict=True))
        lines.append(f"Layers of the stages: {split} (engine.pp_layers).")
    quantise = plan.problem.model.to_quantise
    if quantise is not None:
        name = plan.problem.model.name
        lines.append(f"First: shoal quantize {name} --format {quantise} --out {quantised_name(name, quantise)}")
    return lines


def _why(plan: Plan) -> str:
    pick, demand = plan.pick, plan.problem.demand
    if not pick.forecast.meets:
        misses = missed(pick.forecast, demand, replicas=pick.layout.replicas)
        return f"no grid keeps the objectives; this one comes nearest: {', '.join(map(_missed, misses))}"
    if demand.rate is not None:
        return f"the cheapest that keeps up with {demand.rate:g} requests/s within the objectives"
    others = [option for option in plan.options[1:] if option.forecast.goodput]
    if not others:
        return "the only grid that does"
    more = pick.forecast.goodput / others[0].forecast.goodput - 1
    return f"the most tokens a second within the objectives, {more:.0%} more than {others[0].layout}"


def _missed(miss: Miss) -> str:
    value, limit = (f"{one:.3g}/s" if miss.flag == "--rate" else _time(one) for one in (miss.value, miss.limit))
    return f"{miss.flag} {value} and not {limit} ({miss.times:.3g} times {'less' if miss.flag == '--rate' else 'more'})"


def quantised_name(model: str, format: str) -> str:
    """Where the quantised copy of a model is taken to be."""
    return f"{model.rstrip('/').removesuffix('.gguf')}-{format}"


def _memory(option: Option) -> list[tuple[str, ...]]:
    rows = [_parts(option, rank) for rank in option.grid.ranks]
    shown: list[tuple[str, ...]] = []
    for number, row in enumerate(rows):  # ranks that hold the same are one line
        if shown and shown[-1][1:] == row:
            shown[-1] = (f"{shown[-1][0].split('-')[0]}-{number}", *row)
        else:
            shown.append((str(number), *row))
    return shown


def _parts(option: Option, rank: PlannedRank) -> tuple[str, ...]:
    gpu, memory = option.layout.stages[rank.share.place.stage], rank.memory
    workspace = memory.workspace_bytes - memory.graph_bytes
    block = memory.kv_bytes // memory.num_blocks
    kv_bytes = block * (option.grid.kv_tokens // memory.block_size)
    parts = (rank.reserved, memory.weight_bytes, workspace, memory.graph_bytes, kv_bytes)
    usable = 0 if gpu.is_cpu else rank.budget
    spare = "-" if gpu.is_cpu else f"{(usable - sum(parts)) / GIB:.2f}"
    outside = "-" if gpu.is_cpu else f"{(gpu.memory - usable) / GIB:.2f}"
    layers = rank.share.layers
    return (
        gpu.name,
        f"{layers.start}-{layers.stop - 1}",
        *(f"{size / GIB:.2f}" for size in parts),
        spare,
        outside,
    )


def _misfits(misfits: Sequence[Misfit]) -> list[str]:
    """Those that differ in nothing but how many of them there would be say so once."""
    return [f"{misfit.layout}: {misfit.reason}" for misfit in misfits]


def _option_json(option: Option, demand: Demand) -> dict[str, Any]:
    layout, forecast = option.layout, option.forecast
    return {
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.grid.pp,
        "replicas": layout.replicas,
        "gpus": [gpu.name for gpu in layout.stages],
        "pp_layers": option.grid.pp_layers,
        "ranks": [
            {
                "weight_bytes": rank.memory.weight_bytes,
                "workspace_bytes": rank.memory.workspace_bytes,
                "graph_bytes": rank.memory.graph_bytes,
                "kv_bytes": rank.memory.kv_bytes,
                "num_blocks": rank.memory.num_blocks,
                "reserved_bytes": rank.reserved,
            }
            for rank in option.grid.ranks
        ],
        "kv_tokens": option.grid.kv_tokens,
        "concurrency": forecast.capacity.rows,
        "bound_by": forecast.capacity.binds,
        "ttft_s": _finite(forecast.ttft_s),
        "itl_s": _finite(forecast.itl_s),
        "alone_ttft_s": forecast.alone_ttft_s,
        "alone_itl_s": forecast.alone_itl_s,
        "replica_tokens_per_s": forecast.capacity.tokens_s,
        "tokens_per_s": option.tokens_s,
        "goodput_tokens_per_s": forecast.goodput,
        "meets": forecast.meets,
        "missed": [miss._asdict() for miss in missed(forecast, demand, replicas=layout.replicas)],
        "usd_per_hour": layout.usd_h,
        "usd_per_million_tokens": _finite(option.usd_a_million),
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _time(seconds: float) -> str:
    if seconds == float("inf"):
        return "grows"
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} us"
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
