"""A request that makes real ranks die is found and fails alone; the others get the very tokens they would have had."""

import time
from pathlib import Path

import msgspec
import pytest

from shoal.parallel.grid import Grid
from shoal.parallel.launcher import ProcessLauncher
from shoal.parallel.rank_group import RankGroup
from shoal.parallel.rank_start import Program
from shoal.parallel.wire_plan import WireSizes
from shoal.runtime.blocks import BlockPool
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.policy import FirstCome
from shoal.runtime.rank import RankSpec, decode_result, encode_plan, open_checkpoint
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits

from .poisoned_rank import POISON
from .test_llm import OPTIONS, folder  # noqa: F401 - a fixture


def engine_over(model: Path, factory: str, grid: Grid, **environment: str) -> Engine:
    """Ranks in processes of their own, started by `factory`, which may be of a module beside."""
    config = EngineConfig(
        model=str(model),
        tensor_parallel_size=grid.tp,
        pipeline_parallel_size=grid.pp,
        max_model_len=128,
        max_num_seqs=8,
        **OPTIONS,
    )
    spec = ModelSpec.from_config(open_checkpoint(model).config)
    program = Program(
        factory=factory,
        argument=msgspec.msgpack.encode(RankSpec.of(config, model_path=model, spec=spec, depth=grid.pp + 1)),
        sizes=WireSizes(),
    )
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    launcher = ProcessLauncher(environment=environment)
    group = RankGroup(grid, launcher=launcher, program=program, encode_plan=encode_plan, decode_result=decode_result)
    limits = Limits(
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_queued=8,
        vocab_size=spec.vocab_size,
        num_microbatches=grid.pp,
    )
    pool = BlockPool(8, block_size=config.block_size)
    return Engine(Scheduler(limits, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=bytes(32)), group)


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, tuple[list[int], FinishReason | None]]:
    found: dict[str, tuple[list[int], FinishReason | None]] = {request.id: ([], None) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            tokens, ending = found[event.id]
            assert ending is None, "events behind the last"
            found[event.id] = (tokens + event.tokens, event.finish_reason)
    return found


def request(name: str, prompt: list[int]) -> GenerationRequest:
    params = SamplingParams(temperature=0.9, max_tokens=20, logit_bias={POISON: -100.0})
    return GenerationRequest(id=name, prompt=prompt, params=params, seed=len(name))


@pytest.mark.parametrize(("factory", "restarts"), [("start_crashing", 2), ("start_naming", 1)])
def test_poison_fails_alone(factory: str, restarts: int, folder: Path) -> None:  # noqa: F811
    good = [request("a", [1, 2, 3]), request("bb", [9] * 40), request("ccc", [5])]
    engine = engine_over(folder, f"poisoned_rank:{factory}", Grid(2, 1))
    try:
        expected = run(engine, good)
        found = run(engine, [good[0], request("poison", [7, POISON, 8]), *good[1:]])
        assert found.pop("poison") == ([], FinishReason.ERROR)
        assert found == expected
        assert engine.stats().restarts == restarts
        assert engine.stats().poisoned == 1
    finally:
        engine.close()
