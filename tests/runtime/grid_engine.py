"""An engine over a grid of ranks that are threads: what tests of grids have in common."""

import time
from pathlib import Path
from typing import Any

from shoal.parallel.grid import Grid
from shoal.parallel.threads import ThreadGroup
from shoal.runtime.blocks import BlockPool
from shoal.runtime.build_speculation import build_speculation, plan_draft
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.policy import FirstCome
from shoal.runtime.rank import RankSpec, build_worker, open_checkpoint
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.share import deal


def engine_over(model: Path, grid: Grid, *, num_blocks: int = 64, **changes: Any) -> Engine:
    fields = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 64,
        "block_size": 16,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 24,
        "kv_cache_memory_gb": 0.01,
        "num_threads": 1,
    }
    config = EngineConfig(
        model=str(model), tensor_parallel_size=grid.tp, pipeline_parallel_size=grid.pp, **(fields | changes)
    )
    spec = ModelSpec.from_config(open_checkpoint(model).config)
    m = config.micro_batches or grid.pp
    depth = m if config.pp_schedule == "gpipe" else grid.pp + 1
    rank_spec = RankSpec.of(config, model_path=model, spec=spec, depth=depth)
    shares = deal(spec, grid, config.pp_layers)

    def factory(place, comm, ring):
        return build_worker(rank_spec, shares[place.rank], comm=comm, ring=ring if grid.pp > 1 else None).worker

    limits = Limits(
        max_model_len=config.max_model_len or 64,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued=100,
        vocab_size=spec.vocab_size,
        schedule=config.pp_schedule,
        num_microbatches=m,
        prefix_caching=config.enable_prefix_caching,
    )
    pool = BlockPool(num_blocks, block_size=config.block_size)
    scheduler = Scheduler(
        limits,
        pool=pool,
        policy=FirstCome(),
        clock=time.monotonic,
        secret=bytes(32),
        speculation=build_speculation(config, plan_draft(config, spec), num_blocks=num_blocks),
    )
    return Engine(scheduler, ThreadGroup(grid, factory, depth=depth))


def run(engine: Engine, work: list[GenerationRequest]) -> dict[str, list[int]]:
    """The tokens of each request; they come while others run."""
    tokens: dict[str, list[int]] = {request.id: [] for request in work}
    coming = list(work)
    try:
        while coming or engine.has_work:
            if coming:
                engine.add(coming.pop(0))
            for event in engine.step():
                assert event.start == len(tokens[event.id])
                assert event.error is None
                tokens[event.id] += event.tokens
    finally:
        engine.close()
    return tokens
