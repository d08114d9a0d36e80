"""`shoal bench`: what the engine does on this machine, or what a running server gives to concurrent clients.

The engine's figures come from the engine alone, step by step, without HTTP, detokenizing or Ray.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..runtime.errors import ShoalError
from .offline import Overrides, engine_config

if TYPE_CHECKING:
    from ..runtime.build import Replica
    from ..runtime.stats import Stats

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
PREFILL_TOKENS = 512
PREFILL_PROMPTS = 4


def bench_engine(model: str | None, overrides: Overrides, *, tokens: int) -> None:
    """Decode at several batch sizes and prefill, on fresh random prompts; prints a table."""
    from ..runtime.build import build_replica
    from .demo import need_demo_model

    begin = time.perf_counter()
    config = engine_config(model or str(need_demo_model()), overrides)
    replica = build_replica(config)
    print(f"{config.model}: loaded in {time.perf_counter() - begin:.1f} s, {replica.dtype}, {replica.device}\n")
    rng = random.Random(0)
    try:
        _decode(replica, rng, batch=1, tokens=8)  # the first steps of a process are slow: allocator, kernel choice
        rows = [_decode_row(replica, rng, batch=batch, tokens=tokens) for batch in BATCHES]
        rows.append(_prefill_row(replica, rng))
    finally:
        replica.engine.close()
    _print_table(("", "tok/s", "ms a step", "host ms a step"), rows)


def _decode_row(replica: Replica, rng: random.Random, *, batch: int, tokens: int) -> tuple[str, ...]:
    seconds, before, after = _decode(replica, rng, batch=batch, tokens=tokens)
    return _row(f"decode, batch {batch}", after.generation_tokens - before.generation_tokens, seconds, before, after)


def _decode(replica: Replica, rng: random.Random, *, batch: int, tokens: int) -> tuple[float, Stats, Stats]:
    """Seconds and statistics from where all of the batch have their first token to the end."""
    engine = replica.engine
    for prompt in _prompts(replica, rng, count=batch, length=PROMPT_TOKENS):
        engine.add(_request(prompt, tokens))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.id for event in engine.step()}
    before, begin = engine.stats(), time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin, before, engine.stats()


def _prefill_row(replica: Replica, rng: random.Random) -> tuple[str, ...]:
    engine = replica.engine
    length = min(PREFILL_TOKENS, replica.max_model_len - 1)
    before, begin = engine.stats(), time.perf_counter()
    for prompt in _prompts(replica, rng, count=PREFILL_PROMPTS, length=length):
        engine.add(_request(prompt, 1))
    while engine.has_work:
        engine.step()
    return _row(f"prefill, {length}", PREFILL_PROMPTS * length, time.perf_counter() - begin, before, engine.stats())


def _row(name: str, tokens: int, seconds: float, before: Stats, after: Stats) -> tuple[str, ...]:
    steps = max(1, after.steps - before.steps)
    host_ms = 1e3 * (after.host_s - before.host_s) / steps
    return name, f"{tokens / seconds:.1f}", f"{1e3 * seconds / steps:.2f}", f"{host_ms:.3f}"


def _prompts(replica: Replica, rng: random.Random, *, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(replica.spec.vocab_size) for _ in range(length)] for _ in range(count)]


def _request(prompt: list[int], tokens: int) -> Any:
    from ..runtime.generation import GenerationRequest, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(id=f"bench-{random.getrandbits(64):x}", prompt=prompt, params=params, seed=0)


@dataclass(slots=True)
class Timing:
    """One request as its client saw it: seconds to the first token, and the moments of all."""

    ttft_s: float = 0.0
    end_s: float = 0.0
    moments: list[float] = field(default_factory=list)
    tokens: int = 0


def bench_server(url: str, *, api_key: str | None, streams: int, requests: int, tokens: int) -> None:
    """Keep `streams` requests running until `requests` are done; prints a table.

    Raises:
        ShoalError: the server refused or failed a request.
    """
    from .client import Client

    client = Client(url, api_key=api_key)
    model = client.first_model()
    left = iter(range(requests))
    lock = threading.Lock()
    timings: list[Timing] = []
    failures: list[ShoalError] = []

    def work() -> None:
        while not failures:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                timings.append(_time_stream(client, model, number, tokens))
            except ShoalError as error:
                failures.append(error)

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    _print_server(timings, time.perf_counter() - begin, streams)


def _time_stream(client: Any, model: str, number: int, tokens: int) -> Timing:
    body = {
        "model": model,
        "prompt": f"Request number {number}: tell a long story about the sea.",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    timing = Timing()
    begin = time.perf_counter()
    for event in client.stream("/v1/completions", body):
        now = time.perf_counter() - begin
        if event["choices"]:
            timing.ttft_s = timing.ttft_s or now
            timing.moments.append(now)
        if usage := event.get("usage"):
            timing.tokens = usage["completion_tokens"]
    timing.end_s = time.perf_counter() - begin
    return timing


def _print_server(timings: Sequence[Timing], seconds: float, streams: int) -> None:
    gaps = [1e3 * (late - early) for timing in timings for early, late in pairwise(timing.moments)]
    firsts = [1e3 * timing.ttft_s for timing in timings]
    tokens = sum(timing.tokens for timing in timings)
    print(f"{len(timings)} requests, {streams} at once, {seconds:.1f} s\n")
    rows = [
        ("time to first token, ms", *_spread(firsts)),
        ("between chunks, ms", *_spread(gaps)),
        ("whole request, ms", *_spread([1e3 * timing.end_s for timing in timings])),
    ]
    _print_table(("", "mean", "p50", "p99"), rows)
    print(f"\n{len(timings) / seconds:.2f} requests/s, {tokens / seconds:.1f} output tokens/s")


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    if not values:
        return "-", "-", "-"
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{statistics.fmean(ordered):.2f}", f"{statistics.median(ordered):.2f}", f"{p99:.2f}"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]))
