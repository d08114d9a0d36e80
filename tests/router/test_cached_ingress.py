"""Stations 2 to 5 together, on a virtual clock: what one request's headers, tenant and deadline mean for another's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from shoal.router.config import RouterConfig, Rung
from shoal.router.headers import read_asks
from shoal.router.ingress import Ingress
from shoal.router.launch import Launch
from shoal.router.log_cache import LogCache
from shoal.router.meters import CacheMeter
from shoal.router.schema import CompletionRequest, parse
from shoal.router.tenant import Tenant
from shoal.runtime.errors import CacheMiss, InvalidRequest, LogLost, RequestTimeout, Unavailable
from shoal.runtime.generation import GenerationRequest

from .cache_fakes import play
from .fakes import ANSWER, INFO, MODEL, SECRET, FakeBackend, byte_level_text
from .memory_store import MemoryRedis, MemoryStore

ANN, BOB = (Tenant(name=name, salt=f"salt of {name}", shares_cache=True) for name in ("ann", "bob"))


class Door:
    """An ingress over `redis`, or without a cache, and how one asks there."""

    def __init__(self, redis: MemoryRedis | None = None, backend: FakeBackend | None = None, **config: Any) -> None:
        settings = RouterConfig(served_model_name=(MODEL,), **config)
        self.backend = backend or FakeBackend()
        self.ingress = Ingress(self.backend, settings, clock=asyncio.get_running_loop().time)
        self.store, cache = MemoryStore(redis), None
        if redis is not None:
            meter = CacheMeter(CollectorRegistry())
            cache = LogCache(self.store, model="m", secret=SECRET, config=settings, meter=meter)
        self.ingress.open(INFO, byte_level_text(), cache=cache)

    async def launch(self, tenant: Tenant = ANN, headers: dict[str, str] | None = None, **body: Any) -> Launch:
        asks = read_asks((name.encode(), value.encode()) for name, value in (headers or {}).items())
        given = {"model": MODEL, "prompt": "hi", "max_tokens": 100, "temperature": 0, **body}
        return await self.ingress.completion(parse(CompletionRequest, given), tenant, asks)

    async def ask(self, tenant: Tenant = ANN, headers: dict[str, str] | None = None, **body: Any) -> str:
        launch = await self.launch(tenant, headers, **body)
        async with launch.flight:
            return "".join([piece.text async for pieces in launch.flight for piece in pieces])


def test_who_takes_over_has_all_the_time_that_it_was_given() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis())
        door.backend.delay_s = 0.06  # the whole takes 1.9 s
        clock, began = asyncio.get_running_loop().time, dict[int, float]()

        def expire(request: GenerationRequest, _: int) -> None:
            if clock() - began.setdefault(len(request.tokens), clock()) >= (request.timeout_s or 0):
                raise RequestTimeout("late")

        door.backend.before = expire
        short = asyncio.create_task(door.ask(timeout=1.5))
        await asyncio.sleep(0.01)
        patient = asyncio.create_task(door.ask(timeout=2.9))
        with pytest.raises(RequestTimeout):
            await short
        assert await patient == ANSWER
        assert len(door.backend.requests) == 2

    play(scenario)


def test_an_ingress_that_drains_refuses_nobody_elsewhere() -> None:
    async def scenario() -> None:
        redis = MemoryRedis()
        one, two = Door(redis, max_in_flight=1), Door(redis)
        one.backend.delay_s = two.backend.delay_s = 0.2
        running = asyncio.create_task(one.ask(prompt="other"))
        await asyncio.sleep(0.5)
        leading = asyncio.create_task(one.ask())
        await asyncio.sleep(0.5)
        following = asyncio.create_task(two.ask())
        await asyncio.sleep(0.5)
        one.ingress.admission.drain()
        with pytest.raises(Unavailable, match="draining"):
            await leading
        assert await following == ANSWER
        assert await running == ANSWER

    play(scenario)


@pytest.mark.parametrize("mode", ["reproducible", "off"])
@pytest.mark.parametrize("has_cache", [True, False])
def test_only_makes_nothing(mode: Any, has_cache: bool) -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis() if has_cache else None, cache_mode=mode)
        with pytest.raises(CacheMiss):
            await door.ask(headers={"x-shoal-cache": "only"})
        assert not door.backend.requests

    play(scenario)


def test_a_key_is_its_tenants_own_though_it_shares_its_answers() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis())
        key = {"idempotency-key": "1"}
        assert await door.ask(ANN, key, temperature=1) == ANSWER
        assert await door.ask(BOB, key, temperature=1, max_tokens=5) == ANSWER[:5]
        assert await door.ask(BOB, key, temperature=1, max_tokens=5) == ANSWER[:5]
        assert len(door.backend.requests) == 2
        with pytest.raises(InvalidRequest, match="another body"):
            await door.ask(ANN, key, temperature=1, max_tokens=5)

    play(scenario)


def test_what_is_sent_again_is_the_same_log_whatever_the_load_is_by_then() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis(), max_in_flight=4, ladder=(Rung(load=0.25, max_tokens=4, truncate_to=6),))
        key = {"idempotency-key": "k"}
        asked: dict[str, Any] = {"temperature": 1, "prompt": "a long prompt", "truncation": "auto", "stream": True}
        assert await door.ask(headers=key, **asked) == ANSWER
        door.backend.delay_s = 1.0
        busy = asyncio.create_task(door.ask(prompt="other"))
        await asyncio.sleep(0.5)
        launch = await door.launch(**asked)
        assert launch.asked.job.degraded == {"truncate_to": 6, "max_tokens": 4}
        await launch.flight.aclose()
        assert await door.ask(headers={**key, "last-event-id": "4"}, **asked) == ANSWER[4:]
        busy.cancel()

    play(scenario)


def test_a_drawn_answer_is_not_made_again_under_its_key() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis())
        headers = {"idempotency-key": "k", "x-shoal-cache": "refresh"}
        assert await door.ask(headers=headers, temperature=1) == ANSWER
        assert await door.ask(headers=headers, temperature=1) == ANSWER
        assert len(door.backend.requests) == 1
        assert await door.ask(headers=headers) == await door.ask(headers=headers) == ANSWER
        assert len(door.backend.requests) == 3

    play(scenario)


def test_without_a_cache_a_drawn_answer_cannot_go_on() -> None:
    async def scenario() -> None:
        door = Door()
        with pytest.raises(LogLost):
            await door.ask(headers={"idempotency-key": "k", "last-event-id": "3"}, temperature=1, stream=True)

    play(scenario)


def test_a_cache_that_raises_ends_the_request() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis())

        def explode(*_: object) -> None:
            raise OverflowError

        door.ingress.model.cache.open = explode  # type: ignore[method-assign, assignment]
        began = asyncio.get_running_loop().time()
        with pytest.raises(OverflowError):
            await door.ask()
        assert asyncio.get_running_loop().time() - began < 1

    play(scenario)


def test_where_a_stream_comes_from_is_known_of_all_its_choices_before_its_first_piece() -> None:
    async def scenario() -> None:
        redis = MemoryRedis()
        door = Door(redis)
        body: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 7}

        async def origin() -> str:
            launch = await door.launch(**body)
            async with launch.flight:
                await anext(launch.flight)
                return launch.headers()["x-shoal-cache"]

        await door.ask(**body)
        await asyncio.sleep(1)
        delays: Iterator[float] = itertools.cycle((0.0, 0.01))  # the second choice is looked up more slowly
        look_up = door.store.get

        async def get(key: bytes) -> bytes | None:
            await asyncio.sleep(next(delays))
            return await look_up(key)

        door.store.get = get  # type: ignore[method-assign]
        assert await origin() == "hit"

    play(scenario)


def test_a_generation_is_paid_for_to_its_end_by_whose_request_began_it() -> None:
    async def scenario() -> None:
        door = Door(MemoryRedis())
        door.backend.delay_s = 0.001
        limited = msgspec.structs.replace(ANN, tokens_per_minute=1000)
        began = await door.launch(limited)
        await anext(began.flight)
        follower = asyncio.create_task(door.ask(limited))
        await asyncio.sleep(0.005)
        await began.flight.aclose()
        assert await follower == ANSWER
        assert len(door.backend.requests) == 1
        await asyncio.sleep(0.01)
        after = await door.launch(limited, prompt="x", max_tokens=1)
        await after.flight.aclose()
        paid = 1000 - int(after.limits["x-ratelimit-remaining-tokens"])
        assert paid >= len("hi") + len(ANSWER)

    play(scenario)
