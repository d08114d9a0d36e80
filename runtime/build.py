"""Builds a replica: from a config to an engine over its ranks. The one place in `runtime/` that knows every part."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from msgspec import structs

from ..kernels.select import prepare_ops
from ..parallel.comm import SoloComm
from ..parallel.grid import Grid
from ..parallel.group import GroupStartError, LocalGroup, RankInfo, WorkerGroup
from .blocks import BlockPool
from .build_speculation import build_speculation, plan_draft
from .config import EngineConfig
from .engine import Engine
from .errors import CheckpointError, ConfigError, MemoryPlanError, StartupError
from .hub import resolve_model
from .memory import GIB
from .models.spec import ModelSpec
from .models.spec_cache import remembered_spec
from .plan import StepPlan, StepResult
from .policy import select_policy
from .rank import DTYPES, RankSpec, build_worker, decode_result, encode_plan, open_checkpoint, own_dtype
from .scheduler import Scheduler
from .sequence import Limits
from .share import Share, deal
from .speculation import Speculation

if TYPE_CHECKING:
    from ..parallel.launcher import Launcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine, and what others need to know of its model."""

    engine: Engine
    spec: ModelSpec
    model_path: Path
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    kv_tokens: int
    eos_token_ids: tuple[int, ...]


def build_replica(config: EngineConfig, *, secret: bytes | None = None, launcher: Launcher | None = None) -> Replica:
    """Load the model over its ranks and put an engine around them. Prints the memory plan or the grid.

    secret: salts the names of cached prefixes; default: a fresh one. launcher: where the ranks of a grid are started;
    default: processes on this machine. One rank alone lives in the calling process.

    Raises:
        ConfigError, CheckpointError, MemoryPlanError: refused, with the value, the limit and the knob.
        StartupError: the ranks did not come up.
    """
    # Where ranks are started elsewhere, they look for their devices themselves.
    device = _device(config) if launcher is None else torch.device(config.device)
    if device.type == "cpu":
        # oneDNN keeps a compiled product for each of the last 1024 shapes, some 300 MB of them; a step needs a few.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    prepare_ops(device)
    if config.grid.size > 1:
        launcher = launcher or _local_launcher()
        launcher.warm()
    path = resolve_model(config.model)
    spec = remembered_spec(open_checkpoint(path).config, max_len=config.max_model_len)
    resolved = config.model_copy(
        update={"device": device.type, "dtype": _dtype(config, spec, device), "max_model_len": _max_len(config, spec)}
    )
    grid = config.grid
    shares = deal(spec, grid, config.pp_layers)
    depth = _depth(config, device)
    rank_spec = RankSpec.of(resolved, model_path=path, spec=spec, depth=depth)
    draft = plan_draft(resolved, spec)
    if draft is not None and draft.device.type == device.type:
        rank_spec = structs.replace(
            rank_spec, set_aside_bytes=draft.fixed_bytes, set_aside_bytes_a_block=draft.block_bytes
        )
    group, num_blocks = _alone(rank_spec, shares[0]) if launcher is None else _grid(rank_spec, grid, launcher)
    eos_token_ids = _eos_token_ids(path, spec)
    try:
        speculation = build_speculation(resolved, draft, num_blocks=num_blocks)
    except BaseException:  # nobody else would end the ranks
        group.close()
        raise
    if draft is not None:
        log.info("%s", draft.describe(num_blocks))
    scheduler = _scheduler(
        resolved,
        spec,
        num_blocks=num_blocks,
        eos_token_ids=eos_token_ids,
        secret=secret,
        speculation=speculation,
    )
    return Replica(
        engine=Engine(scheduler, group),
        spec=spec,
        model_path=path,
        dtype=DTYPES[resolved.dtype],
        device=device,
        max_model_len=rank_spec.engine_config().max_model_len or spec.max_len,
        kv_tokens=num_blocks * config.block_size,
        eos_token_ids=eos_token_ids,
    )


Group = WorkerGroup[StepPlan, StepResult]


def _alone(rank_spec: RankSpec, share: Share) -> tuple[Group, int]:
    """A rank in this process, and its KV blocks."""
    rank = build_worker(rank_spec, share, comm=SoloComm(), ring=None)
    log.info("%s", rank.memory.describe())
    info = RankInfo(
        rank=0, stage=0, shard=0, pid=os.getpid(), device=rank_spec.config["device"], details=rank.details()
    )
    return LocalGroup(rank.worker, info, depth=rank_spec.depth), rank.memory.num_blocks


def _local_launcher() -> Launcher:
    """Ranks as processes on this machine."""
    from ..parallel.launcher import ProcessLauncher

    return ProcessLauncher(preload=("shoal.runtime.rank",))


def _grid(rank_spec: RankSpec, grid: Grid, launcher: Launcher) -> tuple[Group, int]:
    """Ranks in processes of their own, and the KV blocks that all of them have room for."""
    from ..parallel.rank_group import RankGroup
    from ..parallel.rank_start import Program
    from ..parallel.watch import GroupLimits
    from ..parallel.wire_plan import WireSizes

    config = rank_spec.engine_config()
    try:
        group: RankGroup[StepPlan, StepResult] = RankGroup(
            grid,
            launcher=launcher,
            program=Program(
                factory="shoal.runtime.rank:start_rank",
                argument=msgspec.msgpack.encode(rank_spec),
                sizes=WireSizes(max_hidden_bytes=config.max_num_batched_tokens * rank_spec.spec.hidden_size * 4),
                device=config.device,
                on_progress=lambda line: log.info("%s", line),
            ),
            encode_plan=encode_plan,
            decode_result=decode_result,
            limits=GroupLimits(start_timeout_s=config.start_timeout_s, step_timeout_s=config.step_timeout_s),
            depth=rank_spec.depth,
        )
    except GroupStartError as error:
        raise _STARTUP_ERRORS.get(error.kind, StartupError)(str(error)) from None
    log.info("%s", describe_grid(group.ranks()))
    return group, min(int(rank.details["num_blocks"]) for rank in group.ranks())


_STARTUP_ERRORS: dict[str, type[StartupError]] = {
    kind.__name__: kind for kind in (ConfigError, CheckpointError, MemoryPlanError)
}


def describe_grid(ranks: Sequence[RankInfo]) -> str:
    """One line a rank: where it is and what it holds."""
    lines = [f"{len(ranks)} ranks:"]
    for rank in ranks:
        d = rank.details
        lines.append(
            f"  rank {rank.rank}: stage {rank.stage}, shard {rank.shard}, {rank.device} on {rank.node}, "
            f"layers {d['layers']}, heads {d['heads']}, KV heads {d['kv_heads']}, "
            f"weights {int(d['weight_bytes']) / GIB:.2f} GiB, KV cache {int(d['kv_bytes']) / GIB:.2f} GiB"
        )
    return "\n".join(lines)


def _depth(config: EngineConfig, device: torch.device) -> int:
    """Plans in flight at most: one more than the stages, so that the host plans while they compute.

    Of a rank in this process only a device computes by itself.
    """
    if config.grid.size == 1 and device.type == "cpu":
        return 1
    return _num_microbatches(config) + 1 if config.pp_schedule == "ring" else _num_microbatches(config)


def _num_microbatches(config: EngineConfig) -> int:
    if config.micro_batches is not None and config.pp_schedule != "gpipe":
        raise ConfigError(f"--micro-batches {config.micro_batches} is of --pp-schedule gpipe; the ring has no barrier")
    return config.micro_batches or config.pipeline_parallel_size


def _scheduler(
    config: EngineConfig,
    spec: ModelSpec,
    *,
    num_blocks: int,
    eos_token_ids: tuple[int, ...],
    secret: bytes | None,
    speculation: Speculation,
) -> Scheduler:
    limits = Limits(
        max_model_len=config.max_model_len or spec.max_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued=config.max_queued,
        vocab_size=spec.vocab_size,
        eos_token_ids=frozenset(eos_token_ids),
        schedule=config.pp_schedule,
        num_microbatches=_num_microbatches(config),
        prefix_caching=config.enable_prefix_caching,
    )
    return Scheduler(
        limits,
        pool=BlockPool(num_blocks, block_size=config.block_size),
        policy=select_policy(config.scheduling_policy),
        clock=time.monotonic,
        secret=secret or secrets.token_bytes(32),
        speculation=speculation,
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use cpu, or install a CUDA build of torch")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> str:
    name = config.dtype if config.dtype != "auto" else own_dtype(spec, device)
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: use --dtype with one of {', '.join(DTYPES)}")
    return name


def _max_len(config: EngineConfig, spec: ModelSpec) -> int:
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
