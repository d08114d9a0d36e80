"""How long a step takes, worked out from what it must read, compute and send: a roofline for each stage (Williams,
Waterman, Patterson: CACM 52:4, 2009) and its collectives.

A stage's products read their weights once or do their operations, whichever takes longer; its attention reads the cache
of all sequences; on top come launches, the host, and two all-reduces a layer: a ring's, of 2 (n - 1) hops in which each
rank sends 2 (n - 1) / n of the bytes. All stages work at once on a micro-batch each, so a token of each sequence takes
as many steps of the slowest stage as there are stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..parallel.grid import Grid
from ..runtime import kv
from ..runtime.share import deal
from ..runtime.weight_plan import plan_weights
from .plan_gpus import NETWORK_S, Gpu
from .plan_grids import LayerTime, Layout, PlannedGrid, PlannedRank, torch_dtype
from .plan_model import PlannedModel
from .sim_config import StepCosts

if TYPE_CHECKING:
    from ..runtime.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of a data sheet is reached, and what it says nothing of. `shoal bench` measures it (`--calibrate`).

    bandwidth, flops: shares. layer_s, step_s: launches and small operations, of a layer and of a step. row_s: for each
    sequence besides (drawing a token). host_s, host_row_s: the host's part, which runs beside the device.
    stage_wait: the share of its time that a stage waits for others (benchmarks/RESULTS.md: 2 to 5 %).
    """

    bandwidth: float
    flops: float
    layer_s: float
    step_s: float
    row_s: float = 0.0
    host_s: float = 60e-6
    host_row_s: float = 3e-6
    stage_wait: float = 0.05


# What other engines reach on H100 and H200: 70 to 80 % of the memory's rate in decoding, 50 to 65 % of the tensor
# cores' in prompts. The host's part was measured with our scheduler. No step of ours was measured on a GPU.
GPU_EFFICIENCY = Efficiency(bandwidth=0.75, flops=0.60, layer_s=15e-6, step_s=150e-6)
# The demo model on two cores (benchmarks/RESULTS.md).
CPU_EFFICIENCY = Efficiency(bandwidth=0.60, flops=0.70, layer_s=40e-6, step_s=200e-6, row_s=0.3e-3)


@dataclass(frozen=True, slots=True)
class Typical:
    """Lengths that costs are worked out for: of prompts, and of answers."""

    prompt: int
    answer: int

    @property
    def context(self) -> float:
        """Tokens that a sequence has behind it, in the mean of its answer."""
        return self.prompt + self.answer / 2


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of one stage: of any step, of reading its weights, for a cached token, a prompt's token, a sequence's
    next token; comm_s is for either of the last two."""

    fixed_s: float
    read_s: float
    context_s: float
    prefill_s: float
    row_s: float
    extra_row_s: float
    comm_s: float

    def step_s(self, prefill: float, rows: float, context: float) -> float:
        products = max(self.read_s, prefill * self.prefill_s + rows * self.row_s)
        rest = context * self.context_s + rows * self.extra_row_s + (prefill + rows) * self.comm_s
        return self.fixed_s + products + rest


class RooflineCosts(StepCosts):
    """`StepCosts` of a whole replica, by its stages. What the fields of the line say is one sequence's step."""

    stages: tuple[StageCosts, ...]
    host_s: float
    host_row_s: float
    stage_wait: float = 0.0

    def step_s(self, prefill_tokens: float, rows: float, context: float) -> float:
        """Until every sequence has its next token: each stage has had every micro-batch."""
        share = len(self.stages)
        slowest = max(stage.step_s(prefill_tokens / share, rows / share, context / share) for stage in self.stages)
        waited = 1 + self.stage_wait if share > 1 else 1.0
        return max(share * slowest * waited, self.host_s + rows * self.host_row_s)

    def prompt_s(self, prompt: int, *, beside: float = 0.0, context: float = 0.0) -> float:
        """Until a prompt's last token has passed all stages, its chunks following each other through them.

        beside: sequences that decode meanwhile, which have `context` cached tokens together.
        """
        share = len(self.stages)
        room = max(1.0, self.max_num_batched_tokens / share - beside / share)
        chunks = -(-prompt // int(room))
        steps = [
            max(stage.step_s(prompt / chunks, beside / share, context / share), self.host_s) for stage in self.stages
        ]
        return sum(steps) + (chunks - 1) * max(steps)


def roofline(
    grid: PlannedGrid,
    model: PlannedModel,
    config: EngineConfig,
    efficiency: Efficiency,
    *,
    typical: Typical,
    per_node: int,
) -> RooflineCosts:
    """A replica's costs. per_node: GPUs of a node, within which messages are fast."""
    layout = grid.layout
    stages = tuple(
        stage_costs(
            grid.stage(index), gpu, model, config, layout, efficiency=efficiency, typical=typical, per_node=per_node
        )
        for index, gpu in enumerate(layout.stages)
    )
    share = len(stages)
    first = max(stage.step_s(0, 1 / share, typical.context / share) for stage in stages)
    return RooflineCosts(
        base_s=max(first * share, 1e-9),
        prefill_token_s=max(stage.prefill_s + stage.comm_s for stage in stages),
        decode_row_s=max(stage.row_s + stage.extra_row_s + stage.comm_s for stage in stages),
        context_token_s=max(stage.context_s for stage in stages),
        kv_tokens=grid.kv_tokens,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens * share,
        block_size=config.block_size,
        stages=stages,
        host_s=efficiency.host_s * share,
        host_row_s=efficiency.host_row_s,
        stage_wait=efficiency.stage_wait,
    )


def layer_time(
    model: PlannedModel, config: EngineConfig, efficiency: Efficiency, typical: Typical, *, rows: int = 64
) -> LayerTime:
    """How long a layer takes on a GPU for a token of each of so many sequences, and for prompts that come meanwhile."""
    (whole,) = deal(model.spec, Grid())
    dtype = torch_dtype(config)
    num_layers, index = model.spec.num_layers, whole.layers[0]
    weights = plan_weights(whole, model.stored, device=config.device, dtype=dtype).layers[0]
    cached = kv.bytes_per_block(whole, block_size=1, dtype=kv.cache_dtype(config, dtype)) / num_layers
    num_bytes = weights + rows * typical.context * cached
    flops = 2 * whole.layer_weights(index) * rows * (1 + typical.prompt / typical.answer)

    def seconds(gpu: Gpu) -> float:
        memory = num_bytes / (1e9 * gpu.gb_s * efficiency.bandwidth)
        return max(memory, flops / (1e12 * gpu.tflops * efficiency.flops))

    return seconds


def stage_costs(
    ranks: Sequence[PlannedRank],
    gpu: Gpu,
    model: PlannedModel,
    config: EngineConfig,
    layout: Layout,
    *,
    efficiency: Efficiency,
    typical: Typical,
    per_node: int,
) -> StageCosts:
    """Of the slowest rank of a stage, which all others wait for."""
    spec, tp = model.spec, layout.tp
    among = layout.num_gpus if gpu.is_cpu else 1  # ranks that share the device
    bandwidth = 1e9 * gpu.gb_s * efficiency.bandwidth / among
    flops = 1e12 * gpu.tflops * efficiency.flops / among
    flops_8bit = 1e12 * gpu.tflops_8bit * efficiency.flops if model.rounds_to in gpu.types_8bit else flops
    rank = max(ranks, key=lambda one: one.weights.read)
    share, dtype = rank.share, torch_dtype(config)
    kv_bytes = kv.bytes_per_block(share, block_size=1, dtype=kv.cache_dtype(config, dtype))
    heads = share.heads.num_query * spec.head_dim
    layers = sum(share.layer_weights(index) for index in share.layers)
    head = spec.vocab_size * spec.hidden_size / tp if share.place.is_last else 0.0
    seen = [spec.layers[index].attention.window or float("inf") for index in share.layers]
    attention = sum(4 * heads * min(window, typical.prompt / 2) for window in seen)
    windowed = sum(min(window, typical.context) for window in seen) / (typical.context * max(1, len(seen)))
    reduces = (1 if spec.parallel else 2) * len(share.layers) + share.place.is_first if tp > 1 else 0
    reduce_bytes = 2 * (tp - 1) / tp * spec.hidden_size * dtype.itemsize
    is_far = layout.grid.size > per_node and not gpu.is_cpu
    hop_s, hop_gb_s = (NETWORK_S, gpu.network_gb_s) if is_far else (1e-6 * gpu.link_us, gpu.link_gb_s)
    handed = 4 * spec.hidden_size / tp if layout.grid.pp > 1 else 0.0
    return StageCosts(
        fixed_s=efficiency.step_s
        + len(share.layers) * efficiency.layer_s
        + reduces * 2 * (tp - 1) * 1e-6 * gpu.link_us
        + (hop_s if handed else 0.0),
        read_s=rank.weights.read / bandwidth,
        context_s=kv_bytes * windowed / bandwidth,
        prefill_s=2 * layers / flops_8bit + attention / flops,
        row_s=2 * (layers + head) / flops,
        extra_row_s=efficiency.row_s / layout.grid.pp,
        comm_s=reduces * reduce_bytes / (1e9 * gpu.link_gb_s) + handed / (1e9 * hop_gb_s),
    )
