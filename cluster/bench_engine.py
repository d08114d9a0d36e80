"""`shoal bench engine`: the engine alone, step by step, without HTTP, text or Ray."""

from __future__ import annotations

import random
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..runtime.errors import ConfigError
from .bench_report import write_json
from .offline import Overrides, engine_config
from .table import table_lines

if TYPE_CHECKING:
    from ..runtime.build import Replica
    from ..runtime.config import EngineConfig
    from ..runtime.stats import Stats

PREFILL_PROMPTS = 4
WARM_TOKENS = 8
MIB = 2**20


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Sequences that decode together, tokens of their prompts and answers; tokens of the prompts of a prefill."""

    batches: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    prefill_tokens: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. device_ms: as the ranks report it; a step of a grid may count more than one rank's."""

    name: str
    tokens: int
    seconds: float
    steps: int
    host_ms: float
    device_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps

    @staticmethod
    def of(name: str, tokens: int, seconds: float, before: Stats, after: Stats) -> Row:
        steps = max(1, after.steps - before.steps)
        return Row(
            name=name,
            tokens=tokens,
            seconds=seconds,
            steps=steps,
            host_ms=1e3 * (after.host_s - before.host_s) / steps,
            device_ms=1e3 * (after.device_s - before.device_s) / steps,
        )


def bench_engine(model: str | None, overrides: Overrides, load: EngineLoad, *, json_file: Path | None) -> None:
    """Decode at several batch sizes and prefill, on fresh random prompts; prints a table.

    Raises:
        ConfigError: the load does not fit the engine.
    """
    from ..runtime.build import build_replica
    from .demo import need_demo_model

    begin = time.perf_counter()
    config = engine_config(model or str(need_demo_model()), overrides)
    replica = build_replica(config)
    loaded_s = time.perf_counter() - begin
    try:
        _check(load, config, replica)
        print(f"{config.model}: loaded in {loaded_s:.1f} s, {replica.dtype}, {replica.device}\n", flush=True)
        rows = _measure(replica, load)
    finally:
        replica.engine.close()
    print("\n".join(engine_lines(rows)))
    peak = _peak_bytes(replica, config)
    print(f"\npeak memory: {', '.join(f'{name} {size / MIB:,.0f} MiB' for name, size in peak.items())}")
    if json_file is not None:
        rates = [{**msgspec.to_builtins(row), "tokens_per_s": row.tokens_per_s, "step_ms": row.step_ms} for row in rows]
        about = {"config": config.model_dump(mode="json"), "dtype": str(replica.dtype), "device": str(replica.device)}
        write_json(json_file, "engine", {**about, "loaded_s": loaded_s, "rows": rates, "peak_bytes": peak})


def engine_lines(rows: list[Row]) -> list[str]:
    """For people."""
    cells = [
        (
            row.name,
            f"{row.tokens_per_s:.1f}",
            f"{row.step_ms:.2f}",
            f"{row.device_ms:.2f}",
            f"{row.host_ms:.3f}",
        )
        for row in rows
    ]
    return table_lines(("", "tok/s", "ms a step", "device ms", "host ms"), cells)


def _check(load: EngineLoad, config: EngineConfig, replica: Replica) -> None:
    if (most := max(load.batches)) > config.max_num_seqs:
        raise ConfigError(f"--batch {most}: the engine runs {config.max_num_seqs} at once (--max-num-seqs)")
    length = load.input_tokens + load.output_tokens
    if length > replica.max_model_len:
        raise ConfigError(
            f"--input-tokens {load.input_tokens} and --output-tokens {load.output_tokens}: {length} together, and the "
            f"longest sequence has {replica.max_model_len} (--max-model-len)"
        )
    if most * length > replica.kv_tokens:
        raise ConfigError(
            f"--batch {most} of {length} tokens each: the KV cache has room for {replica.kv_tokens} "
            "(--kv-cache-memory-gb)"
        )


def _measure(replica: Replica, load: EngineLoad) -> list[Row]:
    rng = random.Random(0)
    # The first steps of a process, and of a batch size, are slow: allocator, choice of kernels, captured graphs.
    for batch in load.batches:
        _decode(replica, rng, batch=batch, load=replace(load, output_tokens=WARM_TOKENS))
    rows = []
    for batch in load.batches:
        seconds, before, after = _decode(replica, rng, batch=batch, load=load)
        tokens = after.generation_tokens - before.generation_tokens
        rows.append(Row.of(f"decode, batch {batch}", tokens, seconds, before, after))
    return [*rows, _prefill(replica, rng, load)]


def _decode(replica: Replica, rng: random.Random, *, batch: int, load: EngineLoad) -> tuple[float, Stats, Stats]:
    """Seconds and statistics from where all of the batch have their first token to the end."""
    engine = replica.engine
    for prompt in _prompts(replica, rng, count=batch, length=load.input_tokens):
        engine.add(_request(prompt, load.output_tokens))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.id for event in engine.step()}
    before, begin = engine.stats(), time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin, before, engine.stats()


def _prefill(replica: Replica, rng: random.Random, load: EngineLoad) -> Row:
    engine = replica.engine
    length = min(load.prefill_tokens, replica.max_model_len - 1)
    before, begin = engine.stats(), time.perf_counter()
    for prompt in _prompts(replica, rng, count=PREFILL_PROMPTS, length=length):
        engine.add(_request(prompt, 1))
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - begin
    return Row.of(f"prefill, {length}", PREFILL_PROMPTS * length, seconds, before, engine.stats())


def _prompts(replica: Replica, rng: random.Random, *, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(replica.spec.vocab_size) for _ in range(length)] for _ in range(count)]


def _request(prompt: list[int], tokens: int) -> Any:
    from ..runtime.generation import GenerationRequest, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(id=f"bench-{random.getrandbits(64):x}", prompt=prompt, params=params, seed=0)


def _peak_bytes(replica: Replica, config: EngineConfig) -> dict[str, int]:
    """Of this process, of the largest rank that has one of its own, and of the GPU where this process uses one."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if config.grid.size > 1:
        found["largest rank"] = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if replica.device.type == "cuda":
        found["GPU"] = torch.cuda.max_memory_allocated(replica.device)
    return found
