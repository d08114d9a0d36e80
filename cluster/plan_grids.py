"""The grids that some GPUs allow for, and what each of their ranks would hold: by the engine's own formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch

from ..parallel.grid import Grid
from ..parallel.partition import cut_layers
from ..runtime.config import EngineConfig
from ..runtime.errors import MemoryPlanError
from ..runtime.memory import MemoryPlan, free_bytes, gpu_budget, plan_memory
from ..runtime.rank import DTYPES
from ..runtime.share import Share, deal
from ..runtime.weight_plan import WeightPlan, plan_weights
from .plan_gpus import Gpu, Pool
from .plan_model import PlannedModel

DRIVER_BYTES = 600 << 20
"""Of a GPU before anything is loaded: CUDA's context, cuBLAS, our kernels. Estimated."""
COLLECTIVE_BYTES = 400 << 20
"""NCCL's buffers beside it, where a replica has several ranks. Estimated."""
MOST_STAGES = 16

LayerTime = Callable[[Gpu], float]
"""How long a layer of the model takes there, in any unit."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Replicas of `tp` shards by stages, each stage on GPUs of one type."""

    tp: int
    stages: tuple[Gpu, ...]
    replicas: int

    @property
    def grid(self) -> Grid:
        return Grid(self.tp, len(self.stages))

    @property
    def num_gpus(self) -> int:
        return self.grid.size * self.replicas

    @property
    def usd_h(self) -> float:
        return self.replicas * self.tp * sum(gpu.usd_h for gpu in self.stages)

    def __str__(self) -> str:
        kinds = {gpu.name: sum(other is gpu for other in self.stages) for gpu in self.stages}
        mixed = f" ({' + '.join(f'{count} {name}' for name, count in kinds.items())})" if len(kinds) > 1 else ""
        return f"tp {self.tp} x pp {len(self.stages)}{mixed} x {self.replicas}"


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """What one rank holds. budget: bytes of its device that may be used; reserved: those of them that others have."""

    share: Share
    weights: WeightPlan
    memory: MemoryPlan
    budget: int
    reserved: int


@dataclass(frozen=True)
class PlannedGrid:
    """A layout that fits. pp_layers: layers of each stage, where the engine is to be told."""

    layout: Layout
    ranks: tuple[PlannedRank, ...]
    pp_layers: tuple[int, ...] | None

    @cached_property
    def fullest(self) -> PlannedRank:
        """Whose KV blocks are the fewest: all ranks use as many."""
        return min(self.ranks, key=lambda rank: rank.memory.num_blocks)

    @property
    def kv_tokens(self) -> int:
        return self.fullest.memory.kv_tokens

    def stage(self, stage: int) -> Sequence[PlannedRank]:
        tp = self.layout.tp
        return self.ranks[stage * tp : (stage + 1) * tp]


def layouts(model: PlannedModel, pools: Sequence[Pool], *, per_node: int) -> Iterator[Layout]:
    """Every width inside a node by every number of stages, with as many replicas as the pools have room for."""
    spec = model.spec
    widest = min(per_node, *(pool.count for pool in pools))
    for tp in range(1, widest + 1):
        is_even = spec.num_heads % tp == 0 and max(spec.num_kv_heads, tp) % tp == 0
        if not is_even and tp & (tp - 1):
            continue
        for counts in product(*(range(1, pool.count // tp + 1) for pool in pools)):
            if sum(counts) <= min(spec.num_layers, MOST_STAGES):
                stages = [pool.gpu for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
                replicas = min(pool.count // (tp * count) for pool, count in zip(pools, counts, strict=True))
                yield Layout(tp, tuple(stages), replicas)


def plan_grid(model: PlannedModel, config: EngineConfig, layout: Layout, layer_time: LayerTime) -> PlannedGrid:
    """What every rank would hold. `config` is resolved: device, dtype, max_model_len.

    Stages on GPUs of several types get layers by how fast these are, or, where those do not fit, by their memory.

    Raises:
        ConfigError: the model cannot be cut so. MemoryPlanError: it does not fit; as the engine would say it.
    """
    if len(set(layout.stages)) == 1:
        return _planned(model, config, layout, config.pp_layers)
    speeds = [1 / layer_time(gpu) for gpu in layout.stages]
    try:
        return _planned(model, config, layout, _split(model, speeds))
    except MemoryPlanError:
        room = [float(_free(gpu, config, layout.grid)) for gpu in layout.stages]
        return _planned(model, config, layout, _split(model, room))


def _split(model: PlannedModel, speeds: Sequence[float]) -> tuple[int, ...]:
    """Layers of each stage."""
    spec = model.spec
    (whole,) = deal(spec, Grid())
    costs = [float(whole.layer_weights(index)) for index in range(spec.num_layers)]
    cuts = cut_layers(costs, stages=len(speeds), head=float(spec.vocab_size * spec.hidden_size), speeds=speeds)
    return tuple(map(len, cuts))


def _planned(
    model: PlannedModel, config: EngineConfig, layout: Layout, pp_layers: tuple[int, ...] | None
) -> PlannedGrid:
    grid = layout.grid
    config = config.model_copy(
        update={
            "tensor_parallel_size": grid.tp,
            "pipeline_parallel_size": grid.pp,
            "pp_layers": pp_layers if grid.pp > 1 else None,
        }
    )
    ranks = [
        plan_rank(model, config, share, layout.stages[share.place.stage])
        for share in deal(model.spec, grid, config.pp_layers)
    ]
    return PlannedGrid(layout, tuple(ranks), config.pp_layers)


def plan_rank(model: PlannedModel, config: EngineConfig, share: Share, gpu: Gpu) -> PlannedRank:
    """One rank's plan, as `runtime.rank` makes it on that device. Raises MemoryPlanError."""
    dtype = torch_dtype(config)
    weights = plan_weights(share, model.stored, device=config.device, dtype=dtype)
    free = _free(gpu, config, share.place.grid)
    memory = plan_memory(
        share,
        config,
        max_model_len=config.max_model_len or share.spec.max_len,
        dtype=dtype,
        free=free,
        weight_bytes=weights.total,
        has_codes=weights.has_codes,
    )
    reserved = _reserved(gpu, share.place.grid)
    return PlannedRank(share, weights, memory, free + reserved, reserved)


def torch_dtype(config: EngineConfig) -> torch.dtype:
    """Of activations; the config is resolved."""
    return DTYPES[config.dtype]


def _reserved(gpu: Gpu, grid: Grid) -> int:
    if gpu.is_cpu:
        return 0
    return DRIVER_BYTES + (COLLECTIVE_BYTES if grid.size > 1 else 0)


def _free(gpu: Gpu, config: EngineConfig, grid: Grid) -> int:
    if gpu.is_cpu:
        return free_bytes(torch.device("cpu"), config.gpu_memory_utilization, ranks_on_node=grid.size)
    return gpu_budget(gpu.memory, config.gpu_memory_utilization, used=_reserved(gpu, grid))
