"""What the host does for a decode step of many sequences, without any model: CPU time of each part, in one table.

    python benchmarks/host.py [--rows 256] [--block-size 64]

schedule and update are the scheduler's, batch is the rank's table, inputs is what fills a captured graph's memory.
"""

import argparse
import gc
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from shoal.runtime.batch import SequenceTable
from shoal.runtime.blocks import BlockPool
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.graphs import _Inputs
from shoal.runtime.plan import StepPlan, StepResult
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits

PROMPT, OUTPUT, MAX_LEN, VOCAB = 1024, 500, 4096, 32_000
T = TypeVar("T")


class Clock:
    """CPU seconds by part, of steps that count."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def time(self, part: str, call: Callable[..., T], *arguments: Any) -> T:
        began = time.process_time()
        result = call(*arguments)
        self.parts.setdefault(part, []).append(time.process_time() - began)
        return result


def measure(rows: int, block_size: int) -> Clock:
    limits = Limits(
        max_model_len=MAX_LEN, max_num_seqs=rows, max_num_batched_tokens=8192, max_queued=rows, vocab_size=VOCAB
    )
    pool = BlockPool(rows * (PROMPT + OUTPUT + block_size) // block_size, block_size=block_size)
    scheduler = Scheduler(limits, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=b"benchmark")
    rng = random.Random(0)
    for i in range(rows):
        prompt = [rng.randrange(VOCAB) for _ in range(PROMPT)]
        params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=OUTPUT)
        scheduler.add(GenerationRequest(id=str(i), prompt=prompt, params=params, seed=i))
    table = SequenceTable(num_slots=rows, max_model_len=MAX_LEN, block_size=block_size)
    inputs = _Inputs(rows, max_model_len=MAX_LEN, page_size=block_size, device=torch.device("cpu"))
    begun, decoding, prefill = deque[StepPlan](), Clock(), Clock()
    while scheduler.has_work:
        while len(begun) < 2:
            began = time.process_time()
            plan = scheduler.schedule()
            took = time.process_time() - began
            if plan is None:
                break
            begun.append(plan)
            is_full = len(plan.slices) == plan.num_tokens == rows
            clock = decoding if is_full else prefill
            clock.parts.setdefault("schedule", []).append(took)
            clock.time("apply", table.apply, plan)
            batch = clock.time("batch", table.batch, plan.slices)
            if is_full:
                clock.time("inputs", inputs.fill, batch, rows)
        plan = begun.popleft()
        drawn = [5] * sum(part.samples for part in plan.slices)
        clock = decoding if len(plan.slices) == plan.num_tokens == rows else prefill
        clock.time("update", scheduler.update, plan, StepResult(plan.step, drawn))
    return decoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    parts = measure(options.rows, options.block_size).parts
    for part, seconds in parts.items():
        p50, p90 = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1]
        print(f"{part:10} {p50 * 1e6:7.0f} us   p90 {p90 * 1e6:7.0f}   {len(seconds)} steps")
    print(f"{'all':10} {sum(map(statistics.median, parts.values())) * 1e6:7.0f} us")


if __name__ == "__main__":
    main()
