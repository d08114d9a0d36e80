"""`shoal plan`: which grids of some GPUs a model fits, what each would do, which one to take, and its deployment file.

Memory is planned by the engine's formulas (`plan_grids.py`), time by a roofline (`plan_costs.py`), queues by the
simulator (`plan_load.py`). Nothing is started, and no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal

from ..parallel.quant import kernel_kinds
from ..runtime.config import EngineConfig
from ..runtime.errors import CheckpointError, ConfigError, MemoryPlanError
from ..runtime.rank import DTYPES
from .offline import engine_config
from .plan_calibrate import Calibration, calibration
from .plan_costs import CPU_EFFICIENCY, GPU_EFFICIENCY, Efficiency, RooflineCosts, Typical, layer_time, roofline
from .plan_gpus import NO_FP8_CACHE, Gpu, Pool, parse_pools, with_price
from .plan_grids import Layout, PlannedGrid, layouts, plan_grid, torch_dtype
from .plan_load import FULL, Demand, Forecast, capacity, forecast, missed
from .plan_model import PlannedModel, read_model
from .plan_units import parse_rate, parse_seconds, parse_tokens

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line, as it was typed."""

    model: str
    gpu: str
    count: int | None = None
    gpus_per_node: int | None = None
    context: str | None = None
    prompt: str = "1k"
    answer: str = "300"
    rate: str | None = None
    ttft: str | None = None
    itl: str | None = None
    quantization: str | None = None
    price: float | None = None
    calibrate: Path | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be planned. config: resolved, but for the grid. told: what of it the operator has said."""

    model: PlannedModel
    pools: tuple[Pool, ...]
    per_node: int
    demand: Demand
    config: EngineConfig
    told: frozenset[str]
    efficiency: Efficiency

    @property
    def num_gpus(self) -> int:
        return sum(pool.count for pool in self.pools)


@dataclass(frozen=True, slots=True)
class Option:
    """A grid that fits, and what it would do."""

    grid: PlannedGrid
    costs: RooflineCosts
    forecast: Forecast

    @property
    def layout(self) -> Layout:
        return self.grid.layout

    @property
    def tokens_s(self) -> float:
        """Of all replicas at their capacity."""
        return self.forecast.capacity.tokens_s * self.layout.replicas

    @property
    def usd_a_million(self) -> float:
        """USD for a million tokens of answers, at the goodput; infinite without any."""
        rate = self.forecast.goodput
        return self.layout.usd_h / (rate * 3600 / 1e6) if rate else float("inf")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A grid that does not fit, and why: as the engine would refuse it."""

    layout: Layout
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The options, best first: by tokens a second within the objectives, by price, by the time to a first token."""

    problem: Problem
    options: tuple[Option, ...]
    misfits: tuple[Misfit, ...]

    @property
    def pick(self) -> Option:
        return self.options[0]


def make_problem(asked: Asked, overrides: Mapping[tuple[str, str], Any]) -> Problem:
    """Read and check all that is asked. Raises: ConfigError, CheckpointError."""
    pools = with_price(parse_pools(asked.gpu, asked.count), asked.price)
    per_node = asked.gpus_per_node or (max(pool.count for pool in pools) if _on_cpu(pools) else GPUS_PER_NODE)
    typical = Typical(parse_tokens(asked.prompt, "--prompt"), parse_tokens(asked.answer, "--answer"))
    context = None if asked.context is None else parse_tokens(asked.context, "--context")
    model = read_model(asked.model, quantization=asked.quantization, max_len=context)
    config = _resolved(engine_config(model.name, dict(overrides)), model, pools, context)
    demand = Demand(
        typical,
        config.max_model_len or model.spec.max_len,
        rate=None if asked.rate is None else parse_rate(asked.rate, "--rate"),
        ttft_s=None if asked.ttft is None else parse_seconds(asked.ttft, "--ttft"),
        itl_s=None if asked.itl is None else parse_seconds(asked.itl, "--itl"),
    )
    if typical.prompt + typical.answer > demand.context:
        raise ConfigError(
            f"--prompt {asked.prompt} and --answer {asked.answer} make {typical.prompt + typical.answer} tokens, above "
            f"the {demand.context} of --context: raise it, or ask for less"
        )
    efficiency = CPU_EFFICIENCY if _on_cpu(pools) else GPU_EFFICIENCY
    told = frozenset(name for _, name in overrides)
    problem = Problem(model, pools, per_node, demand, config, told, efficiency)
    return problem if asked.calibrate is None else _calibrated(problem, calibration(asked.calibrate))


def make_plan(problem: Problem) -> Plan:
    """Everything that fits, forecast and in order.

    Raises:
        MemoryPlanError: nothing fits, with what would.
    """
    options, misfits = [], []
    for found in _grids(problem):
        if isinstance(found, Misfit):
            misfits.append(found)
        else:
            options.append(_option(problem, found))
    if not options:
        raise MemoryPlanError(_nothing_fits(problem, misfits))
    return Plan(problem, tuple(sorted(options, key=partial(_rank_of, problem.demand))), tuple(misfits))


def _rank_of(demand: Demand, option: Option) -> tuple[float, float, float, float]:
    """Where nothing keeps the objectives, what misses them by least goes first."""
    found, layout = option.forecast, option.layout
    by = max((miss.times for miss in missed(found, demand, replicas=layout.replicas)), default=1.0)
    return -round(found.goodput, 1), by, layout.usd_h or layout.num_gpus, found.ttft_s


def _grids(problem: Problem) -> Iterator[PlannedGrid | Misfit]:
    seconds = layer_time(problem.model, problem.config, problem.efficiency, problem.demand.typical)
    for layout in layouts(problem.model, problem.pools, per_node=problem.per_node):
        try:
            yield plan_grid(problem.model, problem.config, layout, seconds)
        except (ConfigError, MemoryPlanError) as error:
            yield Misfit(layout, str(error))


def _option(problem: Problem, grid: PlannedGrid) -> Option:
    """With the fewest replicas that do what is asked; all that there are GPUs for, where no rate is."""
    costs = costs_of(problem, grid)
    demand, most = problem.demand, grid.layout.replicas
    fewest = most
    if demand.rate is not None and (one := capacity(costs, demand).requests_s):
        fewest = min(most, ceil(demand.rate / (FULL * one)))
    found, replicas = forecast(costs, demand, replicas=fewest), fewest
    if not found.meets and fewest < most:
        found, replicas = forecast(costs, demand, replicas=most), most
        low = fewest + 1
        while found.meets and low < replicas:
            middle = (low + replicas) // 2
            tried = forecast(costs, demand, replicas=middle)
            if tried.meets:
                found, replicas = tried, middle
            else:
                low = middle + 1
    return Option(replace(grid, layout=replace(grid.layout, replicas=replicas)), costs, found)


def costs_of(problem: Problem, grid: PlannedGrid) -> RooflineCosts:
    """What a replica's steps would take."""
    return roofline(
        grid,
        problem.model,
        problem.config,
        problem.efficiency,
        typical=problem.demand.typical,
        per_node=problem.per_node,
    )


def _on_cpu(pools: Sequence[Pool]) -> bool:
    return any(pool.gpu.is_cpu for pool in pools)


def _resolved(config: EngineConfig, model: PlannedModel, pools: Sequence[Pool], context: int | None) -> EngineConfig:
    """As the engine resolves it, for these devices."""
    spec = model.spec
    if context is not None and context > spec.max_len:
        raise ConfigError(f"--context {context} is above the {spec.max_len} positions the model is made for")
    device: Literal["cuda", "cpu"] = "cpu" if _on_cpu(pools) else "cuda"
    if device == "cuda" and config.kv_cache_dtype == "fp8":
        for name in NO_FP8_CACHE & {pool.gpu.name for pool in pools}:
            raise ConfigError(f"--kv-cache-dtype fp8: {name} has no instructions for it: use int8, which takes as much")
    dtype = config.dtype if config.dtype != "auto" else spec.dtype or "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: use --dtype with one of {', '.join(DTYPES)}")
    return config.model_copy(update={"device": device, "dtype": dtype, "max_model_len": context or spec.max_len})


def _calibrated(problem: Problem, found: Calibration) -> Problem:
    """With measured constants; of a file about the engine they are what makes its figures come true here."""
    pool, *others = problem.pools
    if others:
        raise ConfigError("--calibrate: it measures one type of GPU; plan with one in --gpu")
    found.check(problem.model.name, is_cpu=pool.gpu.is_cpu)
    gpu, efficiency = found.kernels(pool.gpu, problem.efficiency, _multiplied(problem))
    problem = replace(problem, pools=(replace(pool, gpu=gpu),), efficiency=efficiency)
    return replace(problem, efficiency=found.engine(efficiency, lambda tried: _alone(problem, gpu, tried)))


def _multiplied(problem: Problem) -> str:
    """What products read: dense weights, or codes of a kind."""
    model = problem.model
    form = model.stored.form(model.stored.prefix + model.spec.names.layer.format(0) + model.spec.names.down)
    kinds = kernel_kinds(problem.config.device, torch_dtype(problem.config))
    return "dense" if form is None or form.kind is None or form.kind not in kinds else form.kind.value


def _alone(problem: Problem, gpu: Gpu, efficiency: Efficiency) -> RooflineCosts:
    """A replica of one rank."""
    layout = Layout(1, (gpu,), 1)
    grid = plan_grid(problem.model, problem.config, layout, lambda _: 1.0)
    return costs_of(replace(problem, efficiency=efficiency), grid)


def _nothing_fits(problem: Problem, misfits: Sequence[Misfit]) -> str:
    widest = max(misfits, key=lambda misfit: misfit.layout.grid.size, default=None)
    reason = "" if widest is None else f"; {widest.layout}: {widest.reason}"
    asked = " and ".join(f"{pool.count} x {pool.gpu.name}" for pool in problem.pools)
    would = [words for words, changed in _easier(problem) if _fits(changed)]
    way_out = "\n".join(f"  - {words}" for words in would) or "  - a smaller model, or GPUs with more memory"
    return f"{problem.model.name} does not fit {asked} in any grid{reason}\nwhat would fit:\n{way_out}"


def _easier(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The problem with one thing changed, each of them the least change that may do."""
    found = next(filter(lambda tried: _fits(_with_context(problem, tried)), _halves(problem.demand.context)), None)
    if found is not None:
        yield f"--context {found} instead of {problem.demand.context}", _with_context(problem, found)
    if problem.config.kv_cache_dtype in ("auto", "bfloat16"):
        config = problem.config.model_copy(update={"kv_cache_dtype": "int8"})
        yield "--kv-cache-dtype int8", replace(problem, config=config)
    for quantization in ("int8", "int4"):
        try:
            model = read_model(problem.model.name, quantization=quantization, max_len=None)
        except (ConfigError, CheckpointError):
            break  # it is quantised already
        yield f"--quantization {quantization}", replace(problem, model=model)
    for times in (2, 4, 8):
        pools = tuple(replace(pool, count=times * pool.count) for pool in problem.pools)
        more = replace(problem, pools=pools)
        if _fits(more):
            yield f"{times} times as many GPUs, {more.num_gpus}", more
            break


def _halves(context: int) -> Iterator[int]:
    while context > 512:
        context //= 2
        yield context


def _with_context(problem: Problem, context: int) -> Problem:
    config = problem.config.model_copy(update={"max_model_len": context})
    return replace(problem, config=config, demand=replace(problem.demand, context=context))


def _fits(problem: Problem) -> bool:
    return any(isinstance(found, PlannedGrid) for found in _grids(problem))
