"""The response cache over a store that fails, forgets, lies or hangs: no request notices."""

from __future__ import annotations

import asyncio

import pytest

from shoal.router.cache import CacheStatus
from shoal.runtime.generation import GenerationRequest

from .cache_fakes import answer, at_rest, ingresses, play, request


def test_without_a_store_nothing_fails_and_the_process_still_shares():
    async def scenario() -> None:
        (one,) = ingresses(1)
        one.store.down = True
        asked = request(length=20)
        reads = await asyncio.gather(*(one.read(asked) for _ in range(10)))
        assert all(got.tokens == answer(asked) for got in reads)
        assert len(one.model.led) == 1
        await at_rest()
        one.store.down = False
        await one.read(asked)
        await at_rest()
        assert (await one.read(asked)).status is CacheStatus.HIT

    play(scenario)


def test_a_log_begun_without_the_store_is_stored_when_that_is_back():
    async def scenario() -> None:
        (one,) = ingresses(1)
        one.store.down = True
        reading = asyncio.create_task(one.read(request(length=100)))
        await asyncio.sleep(0.5)
        one.store.down = False
        await reading
        await at_rest()
        assert (await one.read(request(length=100))).status is CacheStatus.HIT

    play(scenario)


def test_a_store_that_hangs_adds_no_more_than_its_time():
    async def scenario() -> None:
        (one,) = ingresses(1)
        one.store.delay_s = 0.04  # each call is in time; both together are not
        began = asyncio.get_running_loop().time()
        reading = one.open(request())
        await anext(reading)
        assert asyncio.get_running_loop().time() - began <= 0.05 + 0.01 + 1e-6
        await reading.aclose()
        await asyncio.sleep(1)

    play(scenario)


def test_a_follower_that_loses_the_store_goes_on_alone():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=300)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        two.store.down = True
        for got in reads:
            assert (await got).tokens == answer(asked)
        assert len(one.model.led) == 2
        assert 60 < len(one.model.led[1].tokens) < 105

    play(scenario)


def test_a_store_that_forgets_everything_breaks_no_flight():
    async def scenario() -> None:
        one, two, three = ingresses(3)
        asked = request(length=500)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        one.store.redis.flush()
        await asyncio.sleep(0.5)
        reads.append(asyncio.create_task(three.read(asked)))
        for got in reads:
            assert (await got).tokens == answer(asked)
        assert len(one.model.led) == 1
        await at_rest()
        assert (await two.read(asked)).status is CacheStatus.HIT

    play(scenario)


def test_an_answer_of_the_store_that_gets_lost_duplicates_nothing():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=300)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        lost = iter([True])
        one.store.loses = lambda: next(lost, False)
        for got in reads:
            assert (await got).tokens == answer(asked)
        assert next(lost, None) is None
        assert len(one.model.led) == 1

    play(scenario)


@pytest.mark.parametrize("suffix", [b"v", b"s"])
def test_garbage_in_the_store_is_a_miss(suffix: bytes):
    async def scenario() -> None:
        one, two = ingresses(2)
        reading = one.open(request(length=50))
        await anext(reading)
        await asyncio.sleep(0.3)
        redis = one.store.redis
        (name,) = {key[:-1] for key in redis.held() if key.endswith(b"l")}
        await reading.aclose()
        await at_rest()
        redis.set(name + b"v", b"nonsense", 100) if suffix == b"v" else redis.add(name + b"s", 99, b"nonsense")
        got = await two.read(request(length=50))
        assert got.tokens == answer(request(length=50))
        assert two.count("response_cache_rejected_total", reason="unreadable") == 1
        await at_rest()
        assert (await one.read(request(length=50))).status is CacheStatus.HIT

    play(scenario)


def test_a_value_moved_to_anothers_key_is_a_miss():
    async def scenario() -> None:
        one, two = ingresses(2)
        await one.read(request(1), scope="a")
        await one.read(request(2), scope="b")
        await asyncio.sleep(10)  # no stream is left
        redis = one.store.redis
        first, second = [key for key in sorted(redis.held()) if key.endswith(b"v")]
        values = redis.get(first), redis.get(second)
        redis.set(first, values[1], 100)
        redis.set(second, values[0], 100)
        for prompt, scope in ((1, "a"), (2, "b")):
            got = await two.read(request(prompt), scope=scope)
            assert (got.status, got.tokens) == (CacheStatus.MISS, answer(request(prompt)))

    play(scenario)


def test_a_bug_in_what_leads_ends_every_reader():
    async def scenario() -> None:
        one, two = ingresses(2)

        def explode(_: GenerationRequest, i: int) -> None:
            if i == 5:
                raise ZeroDivisionError

        one.model.interfere = explode
        reads = await asyncio.gather(*(i.read(request()) for i in (one, one, two)), return_exceptions=True)
        assert [type(got).__name__ for got in reads] == ["ZeroDivisionError", "ZeroDivisionError", "EngineError"]

    play(scenario)
