"""The response cache: finished logs are replayed, kept ones continued, and nobody gets what is not theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal.router.cache import CacheMode, CacheStatus, Caching, Reading
from shoal.router.config import RouterConfig
from shoal.runtime.errors import CacheMiss, InvalidRequest, LogLost, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent

from .cache_fakes import REPRODUCIBLE, Ingress, Model, answer, at_rest, event_of, ingresses, play, read, request

DRAWN = Caching(scope="tenant", is_reproducible=False)
NAMED = Caching(scope="tenant", is_reproducible=False, idempotency=("once", 0))
FULL: dict[str, Any] = {"logprobs": 1, "prompt_logprobs": 1}


def test_a_second_request_is_answered_from_the_store_with_the_same_log_in_one_batch():
    async def scenario() -> None:
        one, two = ingresses(2)
        first = await one.read(request(**FULL))
        await at_rest()
        two.now += 12.5
        second = await two.read(request(id="other", **FULL))
        assert first.tokens == answer(request())
        assert second.content == first.content
        assert len(second.logprobs) == 10
        assert len(second.prompt_logprobs) == 1
        assert (first.status, second.status) == (CacheStatus.MISS, CacheStatus.HIT)
        assert second.age_s == 12.5
        assert second.num_batches == len(second.events) == 1
        assert second.events[0].id == "other"
        assert len(one.model.led) == 1
        assert one.count("response_cache_stored_total") == 1
        assert two.count("response_cache_requests_total", status="hit") == 1

    play(scenario)


def test_a_hit_costs_one_get_and_a_miss_one_script_more():
    async def scenario() -> None:
        (one,) = ingresses(1, Model(step_s=0.0))
        reading = one.open(request())
        await anext(reading)
        assert one.store.calls == {"get": 1, "open": 1}
        await read_rest(reading)
        await at_rest()
        one.store.calls.clear()
        await one.read(request())
        assert one.store.calls == {"get": 1}

    play(scenario)


def test_an_answer_is_used_for_its_time_to_live():
    async def scenario() -> None:
        (one,) = ingresses(1, cache_ttl_s=60)
        await one.read(request())
        await asyncio.sleep(59)
        assert (await one.read(request())).status is CacheStatus.HIT
        await asyncio.sleep(61)
        assert (await one.read(request())).status is CacheStatus.MISS

    play(scenario)


def test_only_complete_answers_are_stored():
    async def scenario() -> None:
        for reason in FinishReason:
            (one,) = ingresses(1)

            async def lead(asked: GenerationRequest, reason: FinishReason = reason) -> AsyncIterator[list[TokenEvent]]:
                yield [event_of(asked, len(asked.tokens), [5], None)]
                yield [event_of(asked, len(asked.tokens) + 1, [], reason)]

            got = await read(one.cache.open(request(), lead, REPRODUCIBLE))
            assert got.finish_reason is reason
            await at_rest()
            is_complete = reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert one.count("response_cache_stored_total") == is_complete
            assert ((await one.read(request())).status is CacheStatus.HIT) == is_complete

    play(scenario)


def test_what_is_too_large_is_not_stored():
    async def scenario() -> None:
        (one,) = ingresses(1, cache_max_bytes=1024)
        await one.read(request(length=4000))
        await asyncio.sleep(400)
        assert (await one.read(request(length=4000))).status is CacheStatus.MISS
        await at_rest()
        assert one.count("response_cache_rejected_total", reason="too_large") == 2

    play(scenario)


def test_modes():
    async def scenario() -> None:
        (one,) = ingresses(1)
        with pytest.raises(CacheMiss, match="no cached answer"):
            await one.read(request(), mode=CacheMode.ONLY)
        assert (await one.read(request(), mode=CacheMode.BYPASS)).status is CacheStatus.BYPASS
        assert (await one.read(request(), mode=CacheMode.AUTO)).status is CacheStatus.MISS
        await at_rest()
        assert (await one.read(request(), mode=CacheMode.ONLY)).status is CacheStatus.HIT
        one.now += 100
        assert (await one.read(request(), mode=CacheMode.REFRESH)).status is CacheStatus.MISS
        await at_rest()
        hit = await one.read(request())
        assert (hit.status, hit.age_s) == (CacheStatus.HIT, 0.0)
        assert len(one.model.led) == 3
        with pytest.raises(CacheMiss):
            await one.read(request(temperature=1.0), DRAWN, mode=CacheMode.ONLY)

    play(scenario)


def test_a_refreshed_answer_is_made_anew_while_the_last_one_still_lingers():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=200)
        await one.read(asked)
        one.model.salt = 1  # another answer, as of other numerics
        got = await two.read(asked, mode=CacheMode.REFRESH)
        assert (got.status, got.tokens) == (CacheStatus.MISS, answer(asked, 1))
        await at_rest()
        assert (await one.read(asked)).tokens == answer(asked, 1)

    play(scenario)


def test_scopes_do_not_share():
    async def scenario() -> None:
        one, two = ingresses(2)
        await one.read(request(), scope="a")
        await at_rest()
        assert (await two.read(request(), scope="b")).status is CacheStatus.MISS
        assert (await two.read(request(), scope="a")).status is CacheStatus.HIT

    play(scenario)


# Idempotency-Key


def test_a_request_sent_again_with_its_key_gets_the_first_ones_answer():
    async def scenario() -> None:
        one, two = ingresses(2)
        first, again = request(temperature=1.0, seed=1), request(temperature=1.0, seed=2)
        assert (await one.read(first, NAMED)).status is CacheStatus.MISS
        await at_rest()
        got = await two.read(again, NAMED)
        assert (got.status, got.tokens) == (CacheStatus.HIT, answer(first))
        other = await two.read(again, NAMED, idempotency=("another", 0))
        assert other.tokens == answer(again)

    play(scenario)


def test_a_request_sent_again_after_its_ingress_died_goes_on_with_its_seed():
    async def scenario() -> None:
        one, two = ingresses(2)
        first, again = (request(temperature=1.0, seed=seed, length=300) for seed in (1, 2))
        reading = one.open(first, NAMED)
        had: list[int] = []
        while len(had) < 100:
            had += (await anext(reading))[-1].tokens
        one.kill()
        await asyncio.sleep(0.1)
        got = await two.read(again, NAMED, resumes=True)
        assert got.tokens == answer(first)
        assert got.tokens[:100] == had

    play(scenario)


def test_a_key_sent_with_another_body_is_refused_wherever_the_first_one_is():
    async def scenario() -> None:
        one, two = ingresses(2)
        first, other = (request(prompt, temperature=1.0, length=1000) for prompt in (1, 2))
        reading = one.open(first, NAMED)
        await anext(reading)
        for ingress in (one, two):  # live here, live elsewhere
            with pytest.raises(InvalidRequest) as refused:
                await ingress.read(other, NAMED)
            assert (refused.value.code, refused.value.param) == ("idempotency_key_reused", "idempotency-key")
        await reading.aclose()
        await at_rest()
        assert one.model.aborted == 1
        with pytest.raises(InvalidRequest):  # left unfinished
            await two.read(other, NAMED)
        assert (await one.read(first, NAMED)).tokens == answer(first)
        await at_rest()
        with pytest.raises(InvalidRequest):  # finished
            await two.read(other, NAMED)
        assert len(one.model.led) == 2

    play(scenario)


def test_a_log_that_is_gone_cannot_be_continued():
    async def scenario() -> None:
        (one,) = ingresses(1)
        asked = request(temperature=1.0)
        for caching in (DRAWN, NAMED):
            with pytest.raises(LogLost):
                await one.read(asked, caching, resumes=True)
        assert one.model.led == []
        assert one.store.redis.held() == set()
        assert (await one.read(request(), resumes=True)).tokens == answer(request())

    play(scenario)


def test_a_log_is_continued_once_the_store_can_be_asked():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(temperature=1.0, length=300)
        await begun(one, asked, tokens=1)
        await asyncio.sleep(0.5)
        one.kill()
        two.store.down = True
        again = asyncio.create_task(two.read(request(temperature=1.0, seed=8, length=300), NAMED, resumes=True))
        await asyncio.sleep(RouterConfig().resume_wait_s - 1)
        two.store.down = False
        assert (await again).tokens == answer(asked)
        two.store.down = True
        with pytest.raises(Unavailable, match="resume_wait_s"):  # to be asked again: it may be there
            await two.read(asked, NAMED, idempotency=("another", 0), resumes=True)
        assert two.model.led[-1].seed == asked.seed

    play(scenario)


def test_one_whose_store_fails_before_it_told_how_the_log_began_does_not_begin_another():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(temperature=1.0, length=300)
        reading = await begun(one, asked, tokens=1)
        again = two.open(request(temperature=1.0, seed=8, length=300), NAMED, resumes=True)
        await again.settled()  # it knows that there is a leader, and nothing else yet
        two.store.down = True
        await asyncio.sleep(1)
        two.store.down = False
        rest = asyncio.create_task(read_rest(reading))
        assert (await read(again)).tokens == answer(asked)
        assert len(one.model.led) == 1
        await rest

    play(scenario)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.0}])
def test_a_log_begun_without_the_store_goes_there_once_it_is_back(params: dict[str, Any]):
    async def scenario() -> None:
        one, two = ingresses(2)
        first, again = (request(seed=seed, length=500, **params) for seed in (1, 2))
        one.store.down = True
        await begun(one, first, tokens=100)
        one.store.down = False
        await asyncio.sleep(1)
        made = one.model.tokens_made
        one.kill()
        got = await two.read(again, NAMED, resumes=True)
        assert got.tokens == answer(first)
        assert 100 < len(two.model.led[-1].tokens) <= made

    play(scenario)


def test_two_that_began_one_log_without_the_store_each_go_on_with_their_own():
    async def scenario() -> None:
        one, two = ingresses(2)
        first, second = (request(temperature=1.0, seed=seed, length=300) for seed in (1, 2))
        for ingress in (one, two):
            ingress.store.down = True
        both = [asyncio.create_task(ingress.read(a, NAMED)) for ingress, a in ((one, first), (two, second))]
        await asyncio.sleep(1)
        for ingress in (one, two):
            ingress.store.down = False
        assert [(await got).tokens for got in both] == [answer(first), answer(second)]

    play(scenario)


async def begun(ingress: Ingress, asked: GenerationRequest, *, tokens: int) -> Reading:
    """A reading under a key, of which so many tokens have been made."""
    reading = ingress.open(asked, NAMED)
    while ingress.model.tokens_made < tokens:
        await anext(reading)
    return reading


async def read_rest(reading: Reading) -> None:
    async for _ in reading:
        pass
