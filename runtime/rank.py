"""Builds one rank: weights, cache, table, and the two ends of its stage. The object graph of station 12.

A rank in a process of its own gets a `RankSpec` as bytes and comes up through `start_rank`; one in the engine's
process is made by `build_worker` directly. The driver has read the model's config: ranks do without transformers.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..kernels.ops import KVLayer, Ops
from ..kernels.select import select_ops
from ..parallel.comm import Comm
from ..parallel.grid import Grid, Place
from ..parallel.group import Begun
from ..parallel.ring import Ring
from ..parallel.station import Station
from . import kv
from .ahead import AllKnown, LastTokens, Recall
from .batch import SequenceTable
from .checkpoint import Checkpoint
from .config import EngineConfig
from .graphs import GraphRunner, cuda_capture
from .loader import load_decoder
from .memory import MemoryPlan, free_bytes, plan_memory
from .models.decoder import Decoder
from .models.spec import ModelSpec
from .plan import StepPlan, StepResult
from .quantised import unquantised
from .runner import EagerRunner, Runner
from .sampler import Sampler
from .share import Share, deal
from .upload import select_upload
from .weight_plan import StoredIn, plan_weights
from .worker import Drawn, DrawnAndReturned, Entry, Exit, Known, ModelWorker, Received, Returned, Sent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def own_dtype(spec: ModelSpec, device: torch.device) -> str:
    """What a model is computed in unless somebody says otherwise: the checkpoint's, or what it says of itself."""
    name = spec.dtype or "bfloat16"
    # A CPU's products in float16 are up to ten times as slow, and there are none with codes.
    return "bfloat16" if name == "float16" and device.type == "cpu" else name


encode_plan = msgspec.msgpack.Encoder().encode
decode_result = msgspec.msgpack.Decoder(StepResult).decode
_decode_plan = msgspec.msgpack.Decoder(StepPlan).decode
_encode_result = msgspec.msgpack.Encoder().encode


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank is built from. `config` is resolved (device, dtype, lengths) and kept as its fields.

    set_aside_bytes, set_aside_bytes_a_block: of rank 0's device for a draft model in the driver, in all and for each KV
    block.
    """

    model_path: str
    spec: ModelSpec
    config: dict[str, Any]
    tp: int
    pp: int
    depth: int  # plans in flight at most
    set_aside_bytes: int = 0
    set_aside_bytes_a_block: int = 0

    @staticmethod
    def of(config: EngineConfig, *, model_path: Path, spec: ModelSpec, depth: int) -> "RankSpec":
        return RankSpec(
            model_path=str(model_path),
            spec=spec,
            config=json.loads(config.model_dump_json()),
            tp=config.tensor_parallel_size,
            pp=config.pipeline_parallel_size,
            depth=depth,
        )

    def engine_config(self) -> EngineConfig:
        return EngineConfig(**self.config)

    def share(self, place: Place) -> Share:
        return deal(self.spec, Grid(self.tp, self.pp), self.config["pp_layers"])[place.rank]


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank, and what it came to."""

    worker: ModelWorker
    share: Share
    memory: MemoryPlan
    weight_bytes: int

    def details(self) -> dict[str, int | str]:
        """For the operator, and for the driver: `num_blocks` is how many KV blocks this rank has room for."""
        heads, spec = self.share.heads, self.share.spec
        return {
            "layers": f"{self.share.layers.start}-{self.share.layers.stop - 1} of {spec.num_layers}",
            "heads": f"{heads.query.start}-{heads.query.stop - 1} of {spec.num_heads}",
            "kv_heads": f"{heads.kv.start}-{heads.kv.stop - 1} of {spec.num_kv_heads}",
            "weight_bytes": self.weight_bytes,
            "workspace_bytes": self.memory.workspace_bytes,
            "kv_bytes": self.memory.kv_bytes,
            "num_blocks": self.memory.num_blocks,
        }


def build_worker(
    rank_spec: RankSpec,
    share: Share,
    *,
    comm: Comm,
    ring: Ring | None,
    station: Station | None = None,
    ranks_on_node: int = 1,
) -> Rank:
    """One rank, in the thread that will execute its plans or another. ring: None for a stage that is alone.

    Raises: CheckpointError, ConfigError, MemoryPlanError.
    """
    config = rank_spec.engine_config()
    ops = select_ops(torch.device(config.device), deterministic=config.deterministic)
    dtype = DTYPES[config.dtype]
    max_model_len = config.max_model_len or share.spec.max_len
    free = free_bytes(ops.device, config.gpu_memory_utilization, ranks_on_node=ranks_on_node)
    checkpoint = open_checkpoint(Path(rank_spec.model_path))
    memory = _plan(rank_spec, share, checkpoint, free=free)
    with torch.inference_mode(), _one_thread():
        decoder = load_decoder(
            checkpoint,
            share.spec,
            ops=ops,
            dtype=dtype,
            max_len=max_model_len,
            comm=comm,
            layers=share.layers,
            station=station,
        )
        if decoder.weight_bytes > memory.weight_bytes:  # codes that no kernel takes after all
            memory = _plan(rank_spec, share, checkpoint, free=free, loaded=decoder.weight_bytes)
        cache = kv.allocate(
            share,
            num_blocks=memory.num_blocks,
            block_size=memory.block_size,
            dtype=kv.cache_dtype(config, dtype),
            device=ops.device,
        )
    table = SequenceTable(num_slots=memory.max_num_seqs, max_model_len=max_model_len, block_size=memory.block_size)
    sampler = Sampler(ops, share.spec.vocab_size, comm=comm)
    # Of steps that are under way, or of what later stages drew, the host that embeds does not know the tokens.
    has_unknown = share.place.is_first and (rank_spec.depth > 1 or ring is not None)
    recall: Recall = LastTokens(memory.max_num_seqs, ops.device) if has_unknown else AllKnown()
    with torch.inference_mode():
        runner = _runner(config, decoder, cache, ops=ops, comm=comm, recall=recall)
    num_threads = config.num_threads or max(1, (os.cpu_count() or 1) // ranks_on_node)
    worker = ModelWorker(
        table=table,
        runner=runner,
        entry=_entry(share, runner, table=table, ring=ring, recall=recall, depth=rank_spec.depth),
        exit=_exit(share, runner, table=table, ring=ring, sampler=sampler, recall=recall),
        station=station,
        num_threads=num_threads if ops.device.type == "cpu" else None,
    )
    return Rank(worker, share, memory, decoder.weight_bytes)


def _plan(rank_spec: RankSpec, share: Share, checkpoint: Checkpoint, *, free: int, loaded: int = 0) -> MemoryPlan:
    """The rank's memory, of `free` bytes. loaded: what weights have turned out to take, where that is more."""
    config = rank_spec.engine_config()
    dtype = DTYPES[config.dtype]
    weights = plan_weights(share, StoredIn(checkpoint, share.spec.names), device=config.device, dtype=dtype)
    plan = partial(
        plan_memory,
        share,
        config,
        max_model_len=config.max_model_len or share.spec.max_len,
        dtype=dtype,
        weight_bytes=max(weights.total, loaded),
        has_codes=weights.has_codes,
    )
    return plan(free=free) if share.place.rank else plan_beside_draft(rank_spec, plan, free)


def plan_beside_draft(rank_spec: RankSpec, plan: Callable[..., MemoryPlan], free: int) -> MemoryPlan:
    """The plan of what is left when a draft model has its part, which has as many blocks as the rank."""
    free -= rank_spec.set_aside_bytes
    memory, beside = plan(free=free), rank_spec.set_aside_bytes_a_block
    left = free - memory.weight_bytes - memory.workspace_bytes
    block = memory.kv_bytes // memory.num_blocks
    fits = left // (block + beside)
    return memory if memory.num_blocks <= fits else plan(free=free - left + fits * block)


def _runner(
    config: EngineConfig, decoder: Decoder, cache: list[KVLayer], *, ops: Ops, comm: Comm, recall: Recall
) -> Runner:
    """Graphs on a GPU, captured here, unless the config does without."""
    eager = EagerRunner(decoder, cache, upload=select_upload(ops.device), recall=recall)
    if ops.device.type != "cuda" or config.enforce_eager:
        return eager
    runner = GraphRunner(
        decoder,
        cache,
        eager=eager,
        capture=cuda_capture(),
        draw=ops.sample if comm.size == 1 else None,  # shards would exchange for filters that no row has
        max_rows=config.max_num_seqs,
        max_model_len=config.max_model_len or decoder.spec.max_len,
        device=ops.device,
        recall=recall,
    )
    runner.prepare(show=comm.shard == 0)
    return runner


def _entry(
    share: Share, runner: Runner, *, table: SequenceTable, ring: Ring | None, recall: Recall, depth: int
) -> Entry:
    if ring is None:
        return Known(runner)
    if share.place.is_first:
        return Returned(runner, table, ring, recall, depth=depth)
    return Received(ring, hidden_size=share.spec.hidden_size)


def _exit(
    share: Share, runner: Runner, *, table: SequenceTable, ring: Ring | None, sampler: Sampler, recall: Recall
) -> Exit:
    if ring is None:
        return Drawn(runner, table, sampler, recall)
    if share.place.is_last:
        return DrawnAndReturned(runner, table, sampler, ring)
    return Sent(ring)


class _RankWorker:
    """A rank in its own process: plans and results are bytes."""

    def __init__(self, rank: Rank) -> None:
        self.details = rank.details()
        self._worker = rank.worker
        self._answers = rank.share.place.answers

    def begin(self, plan: bytes) -> Begun[bytes | None]:
        return self._worker.begin(_decode_plan(plan)).then(self._answer)

    def _answer(self, result: StepResult) -> bytes | None:
        return _encode_result(result) if self._answers else None

    def close(self) -> None:
        pass


def start_rank(
    argument: bytes, place: Place, *, comm: Comm, ring: Ring, station: Station, progress: Callable[[str], None]
) -> _RankWorker:
    """The worker factory of `parallel.rank_group`: `argument` is a `RankSpec` in msgpack."""
    rank_spec = msgspec.msgpack.decode(argument, type=RankSpec)
    share = rank_spec.share(place)
    progress(f"{place}: loading layers {share.layers.start} to {share.layers.stop - 1}")
    is_alone = place.grid.pp == 1
    rank = build_worker(
        rank_spec,
        share,
        comm=comm,
        ring=None if is_alone else ring,
        station=station,
        ranks_on_node=place.grid.size,  # as if all were here: a rank of several nodes has room to spare
    )
    return _RankWorker(rank)


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
    """The folder's safetensors or the .gguf file, each matrix under its plain name, whatever it is stored as.

    Raises: CheckpointError.
    """
    if path.suffix == ".gguf":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    from .safetensors_checkpoint import SafetensorsCheckpoint

    return unquantised(SafetensorsCheckpoint(path))
