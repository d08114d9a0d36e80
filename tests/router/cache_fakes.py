"""Ingresses without HTTP: response caches over one store, and a model whose tokens are a hash of what was before."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from shoal.router.cache import CacheStatus, Caching, Reading
from shoal.router.config import RouterConfig
from shoal.router.log_cache import LogCache
from shoal.router.meters import CacheMeter
from shoal.router.store import Store
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob

from .memory_store import MemoryRedis, MemoryStore
from .virtual_time import VirtualLoop

SECRET = b"s" * 32
REPRODUCIBLE = Caching(scope="tenant", is_reproducible=True)
NOW = 1_700_000_000.0


def request(
    prompt: int = 1, *, length: int = 10, seed: int = 7, id: str = "r", timeout_s: float | None = None, **params: Any
) -> GenerationRequest:
    given = {"temperature": 0.0, "max_tokens": length} | params
    return GenerationRequest(id=id, prompt=[1, prompt], params=SamplingParams(**given), seed=seed, timeout_s=timeout_s)


def answer(asked: GenerationRequest, salt: int = 0) -> list[int]:
    """What the model says; at temperature 0 whatever the seed is."""
    seed = asked.seed if asked.params.temperature > 0 else 0
    tokens: list[int] = []
    for i in range(asked.params.max_tokens or 0):
        tokens.append(hashlib.sha256(b"%d %d %d %d" % (asked.prompt[-1], seed, i, salt)).digest()[0])
    return tokens


class Model:
    """What caches lead. step_s: from token to token. salt: of another numerics. interfere: before each token."""

    def __init__(self, *, step_s: float = 0.01, salt: int = 0) -> None:
        self.step_s = step_s
        self.salt = salt
        self.led: list[GenerationRequest] = []
        self.live: Counter[int] = Counter()  # generations by prompt
        self.most_live = 0
        self.aborted = 0
        self.tokens_made = 0
        self.interfere: Callable[[GenerationRequest, int], None] = lambda asked, i: None

    async def lead(self, asked: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
        self.led.append(asked)
        prompt, tokens = asked.prompt[-1], answer(asked, self.salt)
        self.live[prompt] += 1
        self.most_live = max(self.most_live, self.live[prompt])
        began, has_ended = asyncio.get_running_loop().time(), False
        try:
            for i in range(len(asked.tokens), len(tokens)):
                await asyncio.sleep(self.step_s)
                self.interfere(asked, i)
                late = asked.timeout_s is not None and asyncio.get_running_loop().time() >= began + asked.timeout_s
                self.tokens_made += not late
                reason = FinishReason.TIMEOUT if late else FinishReason.LENGTH if i + 1 == len(tokens) else None
                has_ended = reason is not None
                yield [event_of(asked, i, [] if late else tokens[i : i + 1], reason)]
                if has_ended:
                    return
        finally:
            self.live[prompt] -= 1
            self.aborted += not has_ended


def event_of(asked: GenerationRequest, start: int, tokens: list[int], reason: FinishReason | None) -> TokenEvent:
    params = asked.params
    scored = start == 0 and params.prompt_logprobs is not None
    return TokenEvent(
        id=asked.id,
        start=start,
        tokens=tokens,
        logprobs=None if params.logprobs is None else [TokenLogprob(-t / 8, 1, [(t, -t / 8)]) for t in tokens],
        prompt_logprobs=[None, *(TokenLogprob(-0.5, 2, []) for _ in asked.prompt[1:])] if scored else None,
        finish_reason=reason,
        num_cached_tokens=len(asked.prompt) + len(asked.tokens) if start == len(asked.tokens) else 0,
    )


class Ingress:
    """One cache, and what its readers got."""

    def __init__(self, store: Store, model: Model | None = None, *, secret: bytes = SECRET, **config: Any) -> None:
        self.model = model or Model()
        self.registry = CollectorRegistry()
        self.store = store
        self.now = NOW
        self.cache = LogCache(
            store,
            model="tiny",
            secret=secret,
            config=RouterConfig(**config),
            meter=CacheMeter(self.registry),
            clock=lambda: self.now,
        )

    def open(self, asked: GenerationRequest, caching: Caching = REPRODUCIBLE, **changes: Any) -> Reading:
        return self.cache.open(asked, self.model.lead, msgspec.structs.replace(caching, **changes))

    async def read(self, asked: GenerationRequest, caching: Caching = REPRODUCIBLE, **changes: Any) -> Read:
        return await read(self.open(asked, caching, **changes))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"shoal_{name}", labels) or 0.0

    def kill(self) -> None:
        """The process ends: nothing more leaves it, and its tasks are gone without a word."""
        self.store.down = True  # type: ignore[attr-defined]
        for running in [*self.cache._tasks]:  # what a process's end does, no method of the cache does
            running.cancel()


def ingresses(number: int, model: Model | None = None, **config: Any) -> list[Ingress]:
    """Over one Redis, in front of one model."""
    redis, model = MemoryRedis(), model or Model()
    return [Ingress(MemoryStore(redis), model, **config) for _ in range(number)]


class Read:
    """What one reader got: all of it, and of what kind."""

    def __init__(self, events: list[TokenEvent], status: CacheStatus, age_s: float, num_batches: int) -> None:
        self.events = events
        self.status = status
        self.age_s = age_s
        self.num_batches = num_batches
        self.tokens = [token for event in events for token in event.tokens]
        self.logprobs = [entry for event in events for entry in event.logprobs or ()]
        self.prompt_logprobs = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
        self.num_cached_tokens = events[0].num_cached_tokens
        self.finish_reason = events[-1].finish_reason
        self.stop_reason = events[-1].stop_reason
        length = 0
        for event in events:
            assert event.start == length, "a gap, or a token twice"
            length += len(event.tokens)
        assert all(event.finish_reason is None for event in events[:-1])
        assert self.finish_reason is not None

    @property
    def content(self) -> Any:
        """All that a replay has to say again."""
        ends = (self.finish_reason, self.stop_reason, self.num_cached_tokens)
        return self.tokens, self.logprobs, self.prompt_logprobs, ends


async def read(reading: Reading) -> Read:
    events: list[TokenEvent] = []
    num_batches = 0
    async with aclosing(reading):
        async for batch in reading:
            assert batch
            events += batch
            num_batches += 1
    return Read(events, reading.status, reading.age_s, num_batches)


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On a virtual clock; and when it is over nothing goes on."""

    async def scene() -> None:
        async with asyncio.timeout(3600):
            await scenario()
            await at_rest()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scene())


async def at_rest() -> None:
    """No task is left but the test's own, after a moment to notice that everybody has left."""
    for _ in range(200):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"left behind: {others}")
