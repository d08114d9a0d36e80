"""One rank's memory plan: what goes where, worked out before anything is allocated. No profiling run.

budget = kv_cache_memory_gb, or the device's share less weights and workspace
blocks = budget / bytes of a block, no more than max_num_seqs sequences of max_model_len could use
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.quant_tiles import FEW_ROWS, scratch_bytes
from ..parallel.partition import length
from . import kv
from .config import EngineConfig
from .errors import MemoryPlanError
from .graphs import BYTES_A_GRAPH, graph_sizes
from .share import Share

GIB = 1 << 30
CPU_KV_BYTES = 2 * GIB
# Of a machine's free memory on a CPU: the rest is for the page cache, other processes and the interpreter itself.
CPU_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by use, and the number of KV blocks that follows."""

    weight_bytes: int
    workspace_bytes: int
    graph_bytes: int  # of the workspace: what captured graphs keep
    kv_bytes: int
    kv_dtype: torch.dtype
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def full_length_sequences(self) -> float:
        """How many sequences of max_model_len fit at once."""
        return self.kv_tokens / self.max_model_len

    def describe(self) -> str:
        """For the operator, printed at start."""
        return (
            f"memory plan: weights {self.weight_bytes / GIB:.2f} GiB, workspace {self.workspace_bytes / GIB:.2f} GiB, "
            f"{_name(self.kv_dtype)} KV cache {self.kv_bytes / GIB:.2f} GiB = {self.kv_tokens:,} tokens in "
            f"{self.num_blocks:,} blocks of {self.block_size}; {self.full_length_sequences:.1f} sequences of "
            f"{self.max_model_len:,} tokens at once"
        )


def plan_memory(
    share: Share,
    config: EngineConfig,
    *,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    weight_bytes: int | None = None,
    has_codes: bool = False,
) -> MemoryPlan:
    """Divide `free` bytes (the rank's part of the device) among weights, workspace and KV blocks.

    `config` has been resolved: its device is "cuda" or "cpu". weight_bytes: None counts weights dense; packed ones take
    less. has_codes: some are, whose products take memory of their own.

    Raises:
        MemoryPlanError: the weights, or one sequence of max_model_len, do not fit; says which flag would make it fit.
    """
    weight_bytes = share.num_weights() * dtype.itemsize if weight_bytes is None else weight_bytes
    graphs = graph_bytes(share, config, dtype, has_codes=has_codes)
    workspace = workspace_bytes(share, config, dtype, has_codes=has_codes) + graphs
    kv_dtype = kv.cache_dtype(config, dtype)
    block = kv.bytes_per_block(share, block_size=config.block_size, dtype=kv_dtype)
    left = free - weight_bytes - workspace
    if left < block:
        raise MemoryPlanError(
            f"{config.model}: weights take {weight_bytes / GIB:.2f} GiB and workspace {workspace / GIB:.2f} GiB, but "
            f"{free / GIB:.2f} GiB are free: use a smaller or quantised model, lower --max-num-batched-tokens "
            f"({config.max_num_batched_tokens}), or raise --gpu-memory-utilization ({config.gpu_memory_utilization})"
        )
    budget = _kv_budget(config, left, share.place.grid.size)
    blocks_a_sequence = -(-max_model_len // config.block_size)
    num_blocks = min(budget // block, config.max_num_seqs * blocks_a_sequence)
    if num_blocks < blocks_a_sequence:
        fits = int(num_blocks) * config.block_size
        raise MemoryPlanError(
            f"one sequence of {max_model_len:,} tokens needs {blocks_a_sequence * block / GIB:.2f} GiB of KV cache, "
            f"but {budget / GIB:.2f} GiB are planned ({fits:,} tokens): lower --max-model-len to {fits} or less, "
            f"or raise --kv-cache-memory-gb to {blocks_a_sequence * block / GIB + 0.005:.2f} or more"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        workspace_bytes=workspace,
        graph_bytes=graphs,
        kv_bytes=int(num_blocks) * block,
        kv_dtype=kv_dtype,
        num_blocks=int(num_blocks),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_budget(config: EngineConfig, left: int, num_ranks: int) -> int:
    asked = config.kv_cache_memory_gb
    if asked is None:
        return min(left, CPU_KV_BYTES // num_ranks) if config.device == "cpu" else left
    if asked * GIB > left:
        raise MemoryPlanError(
            f"--kv-cache-memory-gb {asked} is more than the {left / GIB:.2f} GiB that are left beside weights and "
            f"workspace of {config.model}: lower it, or leave it out"
        )
    return int(asked * GIB)


def workspace_bytes(share: Share, config: EngineConfig, dtype: torch.dtype, *, has_codes: bool = False) -> int:
    """Activations of the widest step, what a product takes, logits, rotations: a bound, layers reusing memory."""
    tokens, rows = config.max_num_batched_tokens, config.max_num_seqs
    if config.speculative_model is not None:
        guessed = min(config.speculative_max_batch, config.max_num_seqs)
        rows = max(rows, (config.num_speculative_tokens + 1) * guessed)
    ropes = {layer.rope for layer in share.spec.layers if layer.rope is not None}
    tables = (config.max_model_len or share.spec.max_len) * sum(2 * len(rope.inv_freq) * 4 for rope in ropes)
    scratch = _scratch_bytes(share, config, tokens, has_codes=has_codes)
    return _step_bytes(share, dtype, tokens=tokens, rows=min(rows, tokens)) + scratch + tables


def graph_bytes(share: Share, config: EngineConfig, dtype: torch.dtype, *, has_codes: bool = False) -> int:
    """What captured graphs keep to themselves: a decode step's workspace, and their own nodes."""
    if config.device != "cuda" or config.enforce_eager:
        return 0
    rows = config.max_num_seqs
    scratch = _scratch_bytes(share, config, rows, has_codes=has_codes)
    return _step_bytes(share, dtype, tokens=rows, rows=rows) + scratch + BYTES_A_GRAPH * len(graph_sizes(rows))


def _scratch_bytes(share: Share, config: EngineConfig, tokens: int, *, has_codes: bool) -> int:
    """What the largest of a GPU's products has in memory beside its operands and result, as far as they are ours."""
    if config.device != "cuda" or (config.deterministic and not has_codes):
        return 0
    rows = tokens if has_codes else min(tokens, FEW_ROWS)
    return max(
        scratch_bytes(rows, features, inner, deterministic=config.deterministic) for features, inner in share.products()
    )


def _step_bytes(share: Share, dtype: torch.dtype, *, tokens: int, rows: int) -> int:
    spec, tp = share.spec, share.place.grid.tp
    qkv = (share.heads.num_query + 2 * share.heads.num_kv) * spec.head_dim
    widest = 4 * spec.hidden_size + max(2 * qkv, 3 * max(length(share.mlp_columns(index)) for index in share.layers))
    # Float32 logits, and twice that while they are sampled from.
    logits = 3 * rows * -(-spec.vocab_size // tp) * 4 if share.place.is_last else 0
    return tokens * widest * dtype.itemsize + logits


def free_bytes(device: torch.device, utilization: float, *, ranks_on_node: int = 1) -> int:
    """What a rank may use of the device: on a GPU its share of the whole less what others hold."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return gpu_budget(total, utilization, used=total - free)
    return int(_available_ram() * CPU_SHARE) // ranks_on_node


def gpu_budget(total: int, utilization: float, *, used: int) -> int:
    """What a rank may use of a GPU: `used` is what others hold, the driver's own context included."""
    return int(total * utilization) - used


def _available_ram() -> int:
    """Bytes a process may still take: the machine's, or its control group's where that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available
