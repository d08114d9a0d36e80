"""The response cache over a real redis-server: the scripts as they are shipped, and Redis as it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shoal.router.cache import CacheMode, CacheStatus, Caching
from shoal.router.meters import StoreMeter
from shoal.router.redis_store import RedisStore
from shoal.router.redis_url import parse_redis_url
from shoal.runtime.errors import CacheMiss, InvalidRequest, LogLost
from shoal.runtime.generation import FinishReason

from ..redis_servers import RedisServer, needs_redis
from .cache_fakes import Ingress, Model, answer, request

pytestmark = needs_redis
NAMED = Caching(scope="tenant", is_reproducible=False, idempotency=("once", 0))
FULL: dict[str, Any] = {"logprobs": 1, "prompt_logprobs": 1}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder: Path = tmp_path_factory.mktemp("redis")
    with RedisServer(folder) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.ask("FLUSHALL")
    return running


@asynccontextmanager
async def connected(server: RedisServer, number: int, **config: Any) -> AsyncIterator[list[Ingress]]:
    """Each with connections of its own; one model behind them all. Calls get more time than in service: tests share
    their machine."""
    model = Model(step_s=0.004)
    address = parse_redis_url(server.unix_url)
    stores = [RedisStore(address, StoreMeter(CollectorRegistry()), timeout_s=2.0) for _ in range(number)]
    made = [Ingress(store, model, redis_timeout_s=2.0, flight_lease_s=0.6, **config) for store in stores]
    try:
        yield made
    finally:
        for each in made:
            await each.cache.close()
            await each.store.close()


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def scene() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(scene())


async def stored(ingress: Ingress, number: int = 1) -> None:
    while ingress.count("response_cache_stored_total") < number:
        await asyncio.sleep(0.005)


def test_a_hit_replays_the_log(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            with pytest.raises(CacheMiss):
                await one.read(request(), mode=CacheMode.ONLY)
            first = await one.read(request(**FULL))
            await stored(one)
            second = await two.read(request(**FULL), mode=CacheMode.ONLY)
            assert (first.status, second.status) == (CacheStatus.MISS, CacheStatus.HIT)
            assert second.content == first.content
            assert second.num_batches == 1

    play(scenario)


def test_a_hundred_equal_readers_cost_one_generation(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as both:
            asked = request(length=50)
            reads = await asyncio.gather(*(both[i % 2].read(asked) for i in range(100)))
            assert all(got.tokens == answer(asked) for got in reads)
            assert len(both[0].model.led) == 1

    play(scenario)


def test_a_follower_takes_over_from_an_ingress_that_dies(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            asked = request(length=300, **FULL)
            leading = one.open(asked)
            await anext(leading)
            follower = asyncio.create_task(two.read(asked))
            for _ in range(100):
                await anext(leading)
            await one.store.close()  # nothing more comes of it, and its lease runs out
            got = await follower
            assert (got.tokens, len(got.logprobs), len(got.prompt_logprobs)) == (answer(asked), 300, 1)
            assert two.count("flight_takeovers_total") == 1
            await leading.aclose()

    play(scenario)


def test_the_generation_goes_on_for_followers_and_ends_without_them(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            asked = request(length=100_000)
            leading, following = one.open(asked), two.open(asked)
            await anext(leading)
            await anext(following)
            await leading.aclose()
            for _ in range(5):
                await anext(following)
            assert one.model.live.total() == 1
            await following.aclose()
            while one.model.live.total():
                await asyncio.sleep(0.01)
            assert len(one.model.led) == 1

    play(scenario)


def test_an_unfinished_log_goes_on_with_the_seed_it_began_with(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            first, again = (request(temperature=1.0, seed=seed, length=100) for seed in (1, 2))
            with pytest.raises(LogLost):
                await two.read(again, NAMED, resumes=True)
            reading = one.open(first, NAMED)
            for _ in range(50):
                await anext(reading)
            await reading.aclose()
            with pytest.raises(InvalidRequest):
                await two.read(request(2, temperature=1.0), NAMED)
            got = await two.read(again, NAMED, resumes=True)
            assert got.tokens == answer(first)
            assert len(two.model.led[-1].tokens) >= 1

    play(scenario)


def test_a_stop_string_found_by_a_follower_ends_it_everywhere(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            asked = request(length=100_000)
            leading, following = one.open(asked), two.open(asked)
            await anext(leading)
            length = 0
            while length < 30:
                length = sum(len(event.tokens) for event in await anext(following)) + length
            await leading.aclose()
            following.stopped(20, "###")
            await following.aclose()
            while one.model.live.total():
                await asyncio.sleep(0.01)
            hit = await one.read(asked)
            assert (hit.status, hit.tokens) == (CacheStatus.HIT, answer(asked)[:20])
            assert (hit.finish_reason, hit.stop_reason) == (FinishReason.STOP, "###")

    play(scenario)


def test_a_server_that_forgets_everything_breaks_no_flight(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            asked = request(length=400)
            reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
            await asyncio.sleep(0.5)
            server.ask("FLUSHALL")
            for got in reads:
                assert (await got).tokens == answer(asked)
            await stored(one)
            assert (await two.read(asked)).status is CacheStatus.HIT

    play(scenario)


def test_a_hit_is_had_of_a_server_that_does_not_write(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 1) as (one,):
            await one.read(request(1))
            await stored(one)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            try:
                assert (await one.read(request(1))).status is CacheStatus.HIT
                assert (await one.read(request(2))).tokens == answer(request(2))
            finally:
                server.ask("CONFIG", "SET", "maxmemory", "0")

    play(scenario)


def test_no_key_outlives_its_time(server: RedisServer):
    async def scenario() -> None:
        async with connected(server, 2) as (one, two):
            await one.read(request())
            await stored(one)
            unfinished = two.open(request(2, length=100_000))
            await anext(unfinished)
            await asyncio.sleep(0.5)  # a stream and a lease
            await unfinished.aclose()
            keys = server.ask("KEYS", "*")
            assert keys
            assert all(key.startswith(b"shoal:{") and server.ask("PTTL", key) > 0 for key in keys)

    play(scenario)
