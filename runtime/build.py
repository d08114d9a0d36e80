"""Builds a replica: from a config to an engine over its ranks. The one place in `runtime/` that knows every part."""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.ops import Ops
from ..kernels.select import select_ops
from ..parallel.group import LocalGroup
from . import kv
from .batch import SequenceTable
from .blocks import BlockPool
from .checkpoint import Checkpoint
from .config import EngineConfig
from .engine import Engine
from .errors import ConfigError
from .hub import resolve_model
from .loader import load_decoder
from .memory import MemoryPlan, free_bytes, plan_memory
from .models.spec import ModelSpec
from .plan import StepPlan, StepResult
from .policy import select_policy
from .runner import EagerRunner
from .sampler import Sampler
from .scheduler import Scheduler
from .sequence import Limits
from .worker import ModelWorker

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine, and what others need to know of its model."""

    engine: Engine
    spec: ModelSpec
    memory: MemoryPlan
    model_path: Path
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def build_replica(config: EngineConfig, *, secret: bytes | None = None) -> Replica:
    """Load the model and put an engine around it. Prints the memory plan.

    secret: salts the names of cached prefixes; default: a fresh one.

    Raises:
        ConfigError, CheckpointError, MemoryPlanError: refused, with the value, the limit and the knob.
    """
    _refuse_later(config)
    device = _device(config)
    if device.type == "cpu":
        # oneDNN keeps a compiled product for each of the last 1024 shapes, some 300 MB of them; a step needs a few.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    path = resolve_model(config.model)
    checkpoint = open_checkpoint(path)
    spec = ModelSpec.from_config(checkpoint.config, max_len=config.max_model_len)
    max_model_len = _max_model_len(config, spec)
    eos_token_ids = _eos_token_ids(path, spec)
    ops = select_ops(device)
    dtype = _dtype(config, spec)
    resolved = config.model_copy(update={"device": device.type, "max_model_len": max_model_len})
    memory = plan_memory(
        spec,
        resolved,
        max_model_len=max_model_len,
        weight_bytes=weight_bytes(checkpoint, dtype),
        dtype=dtype,
        free=free_bytes(device, config.gpu_memory_utilization),
    )
    log.info("%s", memory.describe())

    def worker() -> ModelWorker:
        return build_worker(checkpoint, spec, ops=ops, dtype=dtype, memory=memory, num_threads=config.num_threads)

    with _one_thread():
        group: LocalGroup[StepPlan, StepResult] = LocalGroup(worker)
    limits = Limits(
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued=config.max_queued,
        vocab_size=spec.vocab_size,
        eos_token_ids=frozenset(eos_token_ids),
        prefix_caching=config.enable_prefix_caching,
    )
    scheduler = Scheduler(
        limits,
        pool=BlockPool(memory.num_blocks, block_size=config.block_size),
        policy=select_policy(config.scheduling_policy),
        clock=time.monotonic,
        secret=secret or secrets.token_bytes(32),
    )
    return Replica(
        engine=Engine(scheduler, group),
        spec=spec,
        memory=memory,
        model_path=path,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
    )


def build_worker(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    ops: Ops,
    dtype: torch.dtype,
    memory: MemoryPlan,
    num_threads: int | None = None,
) -> ModelWorker:
    """One rank: weights, cache, tables. num_threads: of a rank on a CPU; default: all cores."""
    with torch.inference_mode():
        decoder = load_decoder(checkpoint, spec, ops=ops, dtype=dtype, max_len=memory.max_model_len)
        cache = kv.allocate(
            spec,
            num_layers=spec.num_layers,
            num_blocks=memory.num_blocks,
            block_size=memory.block_size,
            dtype=dtype,
            device=ops.device,
        )
    table = SequenceTable(
        num_slots=memory.max_num_seqs,
        max_model_len=memory.max_model_len,
        block_size=memory.block_size,
        device=ops.device,
    )
    return ModelWorker(
        table=table,
        runner=EagerRunner(decoder, cache),
        sampler=Sampler(ops, spec.vocab_size),
        num_threads=(num_threads or os.cpu_count() or 1) if ops.device.type == "cpu" else None,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Load on one thread: see `ModelWorker`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_checkpoint(path: Path) -> Checkpoint:
    """The folder's safetensors or the .gguf file."""
    if path.suffix == ".gguf":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    from .safetensors_checkpoint import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Upper bound of what the weights take once loaded: packed blocks may be kept packed, but need not be."""
    return sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()) * dtype.itemsize


def _refuse_later(config: EngineConfig) -> None:
    for flag, size in (
        ("--tensor-parallel-size", config.tensor_parallel_size),
        ("--pipeline-parallel-size", config.pipeline_parallel_size),
    ):
        if size != 1:
            raise ConfigError(f"{flag} {size}: replicas of several ranks are not in this version; use 1")
    if config.deterministic:
        raise ConfigError("--deterministic: batch-invariant sums are not in this version; leave it out")


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use cpu, or install a CUDA build of torch")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    name = config.dtype if config.dtype != "auto" else spec.dtype or "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: use --dtype with one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    asked = config.max_model_len
    if asked is not None and asked > spec.max_len:
        raise ConfigError(f"--max-model-len {asked} is above the {spec.max_len} positions the model is made for")
    return asked or spec.max_len


def _eos_token_ids(path: Path, spec: ModelSpec) -> tuple[int, ...]:
    """generation_config.json may know more ends (of a turn, say) than config.json."""
    file = path / "generation_config.json"
    found: Any = json.loads(file.read_text()).get("eos_token_id") if path.is_dir() and file.is_file() else None
    more = (found,) if isinstance(found, int) else tuple(found or ())
    return tuple(sorted({*spec.eos_token_ids, *more}))
