"""Shared flights under every order of readers that come and leave, stores that fail, and ingresses that die.

Whatever happens, a reader gets every token once, in order and unchanged, and one end; while nothing fails, there is one
generation for all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.router.cache import Reading
from shoal.runtime.errors import ShoalError
from shoal.runtime.generation import FinishReason

from .cache_fakes import REPRODUCIBLE, Ingress, Model, Read, answer, play, request
from .memory_store import MemoryRedis, MemoryStore

LENGTH = 300  # three seconds
NUM_INGRESSES = 3

moments = st.integers(0, 60).map(lambda tenths: tenths / 10)
ingress_numbers = st.integers(0, NUM_INGRESSES - 1)


class Reads(msgspec.Struct, frozen=True):
    at_s: float
    ingress: int
    prompt: int
    leaves_after: int | None  # tokens
    stops_at: bool  # with a stop string there
    timeout_s: float | None
    pauses_s: float


class Happens(msgspec.Struct, frozen=True):
    at_s: float
    ingress: int
    what: str
    for_s: float


readers = st.builds(
    Reads,
    moments,
    ingress_numbers,
    st.integers(1, 2),
    st.none() | st.integers(1, LENGTH - 1),
    st.booleans(),
    st.none() | st.sampled_from([0.5, 2.0, 60.0]),
    st.sampled_from([0.0, 0.0, 0.07, 1.3]),
)
faults = st.builds(
    Happens,
    moments,
    ingress_numbers,
    st.sampled_from(["down", "flaky", "loses answers", "hangs", "forgets", "dies", "closes"]),
    st.sampled_from([0.04, 0.5, 2.0, 5.0]),
)


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.redis = MemoryRedis()
        self.model = Model()
        self.ingresses = [Ingress(MemoryStore(self.redis), self.model) for _ in range(NUM_INGRESSES)]
        self.gone: set[int] = set()
        self.num_done = 0

    async def run(self, events: list[Reads | Happens]) -> None:
        def task(event: Reads | Happens) -> Coroutine[Any, Any, None]:
            return self.read(event) if isinstance(event, Reads) else self.happen(event)

        await asyncio.gather(*(task(event) for event in events))
        for ingress in self.ingresses:
            await ingress.cache.close()

    async def read(self, wish: Reads) -> None:
        await asyncio.sleep(wish.at_s)
        if wish.ingress in self.gone:
            return
        asked = request(wish.prompt, length=LENGTH, timeout_s=wish.timeout_s)
        reading = self.ingresses[wish.ingress].open(asked, REPRODUCIBLE)
        try:
            events = await follow(reading, wish)
        except ShoalError:
            assert wish.ingress in self.gone, "an error where nothing but the store has failed"
            return
        finally:
            self.num_done += 1
        tokens = [token for event in events for token in event.tokens]
        assert tokens == answer(asked)[: len(tokens)], "a token was changed, repeated or left out"
        if wish.leaves_after is None:
            got = Read(events, reading.status, reading.age_s, 0)
            if got.finish_reason is FinishReason.TIMEOUT:
                assert wish.timeout_s is not None
                assert len(tokens) < LENGTH
            elif got.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == LENGTH
            else:  # somebody's text came to a stop string
                assert (got.finish_reason, got.stop_reason) == (FinishReason.STOP, "###")

    async def happen(self, event: Happens) -> None:
        await asyncio.sleep(event.at_s)
        ingress, store = self.ingresses[event.ingress], self.ingresses[event.ingress].store
        assert isinstance(store, MemoryStore)
        if event.ingress in self.gone:
            return
        match event.what:
            case "forgets":
                self.redis.flush()
                return
            case "dies":
                self.gone.add(event.ingress)
                ingress.kill()
                return
            case "closes":
                self.gone.add(event.ingress)
                await ingress.cache.close()
                return
            case "down":
                store.down = True
            case "flaky":
                store.fails = lambda: self.rng.random() < 0.3
            case "loses answers":
                store.loses = lambda: self.rng.random() < 0.3
            case _:
                store.delay_s = 0.06
        await asyncio.sleep(event.for_s)
        if event.ingress not in self.gone:
            store.down, store.delay_s = False, 0.0
            store.fails = store.loses = lambda: False


async def follow(reading: Reading, wish: Reads) -> list[Any]:
    """As a client does: it may leave early, in the middle or at a stop string, and may be slow."""
    events: list[Any] = []
    length = 0
    async with aclosing(reading):  # type: ignore[type-var]
        async for batch in reading:
            events += batch
            length += sum(len(event.tokens) for event in batch)
            if wish.leaves_after is not None and length >= wish.leaves_after:
                if wish.stops_at:
                    reading.stopped(wish.leaves_after, "###")
                return events
            await asyncio.sleep(wish.pauses_s)
    return events


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(readers, min_size=1, max_size=10))
@example([Reads(0.8, 1, 2, None, False, None, 0.0), Reads(1.9, 0, 2, 210, True, None, 0.0)])
def test_while_nothing_fails_there_is_one_generation_of_a_log(wishes: list[Reads]) -> None:
    async def scenario() -> None:
        world = World(0)
        await world.run([*wishes])
        assert world.num_done == len(wishes)
        assert world.model.most_live <= 1
        assert all(ingress.count("response_cache_rejected_total", reason="differs") == 0 for ingress in world.ingresses)
        has_deadlines = any(wish.timeout_s is not None or wish.leaves_after is not None for wish in wishes)
        if not has_deadlines:
            assert len(world.model.led) == len({wish.prompt for wish in wishes})

    play(scenario)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(readers, min_size=1, max_size=8), st.lists(faults, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@example(
    [Reads(1.0, 2, 2, None, False, 0.5, 3.5), Reads(1.1, 2, 2, None, False, None, 0.0)],
    [Happens(6.0, 0, "down", 0.04)],
    0,
)
def test_whatever_fails_every_reader_gets_every_token_once_and_one_end(
    wishes: list[Reads], events: list[Happens], seed: int
) -> None:
    async def scenario() -> None:
        world = World(seed)
        await world.run([*wishes, *events])
        if not any(wish.stops_at for wish in wishes):  # else readers of one log do not agree on its end
            assert sum(each.count("response_cache_rejected_total", reason="differs") for each in world.ingresses) == 0

    play(scenario)
