"""Shared flights: one generation for whoever asks, at this ingress or another, as long as anybody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from shoal.router.cache import CacheStatus, Reading
from shoal.router.config import RouterConfig
from shoal.router.log_cache import LogCache
from shoal.runtime.errors import QueueFull, RowFailed
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent

from .cache_fakes import (
    NOW,
    REPRODUCIBLE,
    SECRET,
    Ingress,
    Model,
    Read,
    answer,
    at_rest,
    event_of,
    ingresses,
    play,
    read,
    request,
)
from .memory_store import MemoryRedis, MemoryStore

FULL: dict[str, Any] = {"logprobs": 1, "prompt_logprobs": 1}


def test_a_hundred_equal_readers_at_two_ingresses_cost_one_generation():
    async def scenario() -> None:
        both = ingresses(2)
        asked = request(length=50)
        reads = await asyncio.gather(*(both[i % 2].read(asked) for i in range(100)))
        assert all(got.tokens == answer(asked) for got in reads)
        assert len(both[0].model.led) == 1
        statuses = [got.status for got in reads]
        assert statuses.count(CacheStatus.MISS) == 1
        assert statuses.count(CacheStatus.SHARED) == 99
        await at_rest()
        await asyncio.sleep(0)
        assert {one.count("flights") for one in both} == {0.0}

    play(scenario)


def test_who_comes_right_behind_the_end_gets_a_hit():
    """The log is on its way to the store, where nobody has looked for it yet."""

    async def scenario() -> None:
        (one,) = ingresses(1)
        one.store.delay_s = 0.01  # type: ignore[attr-defined]
        asked = request(length=20)
        assert (await one.read(asked)).status is CacheStatus.MISS
        again = await one.read(asked)
        assert (again.status, again.tokens) == (CacheStatus.HIT, answer(asked))
        assert len(one.model.led) == 1

    play(scenario)


def test_caches_of_several_models_count_their_flights_together():
    async def scenario() -> None:
        (one,) = ingresses(1)
        other = LogCache(
            one.store, model="other", secret=SECRET, config=RouterConfig(), meter=one.cache._meter, clock=lambda: NOW
        )
        readings = [one.open(request()), other.open(request(), one.model.lead, REPRODUCIBLE)]
        assert one.count("flights") == 2
        await asyncio.gather(*map(read, readings))
        await at_rest()
        await asyncio.sleep(0)
        assert one.count("flights") == 0

    play(scenario)


def test_who_joins_late_gets_all_of_it():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=200, **FULL)

        async def late(ingress: Ingress, after_s: float):
            await asyncio.sleep(after_s)
            return await ingress.read(asked)

        reads = await asyncio.gather(one.read(asked), *(late(i, t) for i in (one, two) for t in (0.3, 1.0, 1.9)))
        assert len({repr(got.content) for got in reads}) == 1
        assert [got.status for got in reads[1:]] == [CacheStatus.SHARED] * 6
        assert len(one.model.led) == 1

    play(scenario)


def test_the_generation_goes_on_for_those_who_follow_when_its_own_reader_leaves():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=1000)
        leading = one.open(asked)
        await anext(leading)
        follower = asyncio.create_task(two.read(asked))
        await asyncio.sleep(1)
        await leading.aclose()
        assert (await follower).tokens == answer(asked)
        assert len(one.model.led) == 1
        await at_rest()
        assert (await one.read(asked)).status is CacheStatus.HIT

    play(scenario)


@pytest.mark.parametrize("followers", [0, 1])
def test_it_is_aborted_when_nobody_reads_any_more(followers: int):
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=100_000)
        readings = [one.open(asked)] + [two.open(asked) for _ in range(followers)]
        for reading in readings:
            await anext(reading)
        for reading in readings:
            await reading.aclose()
        await asyncio.sleep(3 if followers else 0.1)
        assert one.model.live.total() == 0
        assert one.model.aborted == 1

    play(scenario)


def test_an_unfinished_log_goes_on_where_it_was_left():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=200)
        leading = one.open(asked)
        while (await anext(leading))[-1].start < 99:
            pass
        await leading.aclose()
        await asyncio.sleep(100)
        second = await two.read(asked)
        assert second.tokens == answer(asked)
        assert second.status is CacheStatus.SHARED
        assert two.model.led[1].tokens == answer(asked)[:100]
        assert two.model.tokens_made == 200

    play(scenario)


def test_a_kept_log_is_forgotten_in_time():
    async def scenario() -> None:
        one, two = ingresses(2, flight_keep_s=50)
        leading = one.open(request(length=200))
        await anext(leading)
        await leading.aclose()
        await asyncio.sleep(60)
        assert (await two.read(request(length=200))).status is CacheStatus.MISS
        assert one.store.redis.held() - two.store.redis.held() == set()

    play(scenario)


def test_a_follower_takes_over_from_an_ingress_that_dies():
    async def scenario() -> None:
        one, two, three = ingresses(3)
        asked = request(length=500, **FULL)
        leading = asyncio.create_task(one.read(asked))
        await asyncio.sleep(0.1)
        followers = [asyncio.create_task(ingress.read(asked)) for ingress in (two, three)]
        await asyncio.sleep(1)
        one.kill()
        with pytest.raises(Exception, match="before the answer's end"):
            await leading
        reads = await asyncio.gather(*followers)
        assert all(got.tokens == answer(asked) and len(got.logprobs) == 500 for got in reads)
        assert [len(got.prompt_logprobs) for got in reads] == [1, 1]
        assert len(one.model.led) == 2
        assert len(one.model.led[1].tokens) > 90
        assert one.model.led[1].params.prompt_logprobs is None
        assert two.count("flight_takeovers_total") + three.count("flight_takeovers_total") == 1

    play(scenario)


def test_a_follower_goes_on_at_once_where_an_ingress_closes():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=500)
        leading = asyncio.create_task(one.read(asked))
        await asyncio.sleep(0.1)
        follower = asyncio.create_task(two.read(asked))
        await asyncio.sleep(0.5)  # it would not look again for as long
        began = asyncio.get_running_loop().time()
        await one.cache.close()
        with pytest.raises(Exception, match="shutting down"):
            await leading
        while len(one.model.led) < 2:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began < 0.2
        assert (await follower).tokens == answer(asked)

    play(scenario)


def test_a_replaced_leader_tails_the_new_one_and_its_readers_see_nothing_of_it():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=1500)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        one.store.down = True  # for longer than its lease
        await asyncio.sleep(5)
        one.store.down = False
        for got in reads:
            assert (await got).tokens == answer(asked)
        assert len(one.model.led) == 2
        assert one.model.aborted == 1  # its own, when it found out

    play(scenario)


def test_a_leader_that_leads_again_leaves_no_gap():
    async def scenario() -> None:
        one, two, three = ingresses(3)
        asked = request(length=1500)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        one.store.down = True
        await asyncio.sleep(5)
        one.store.down = False  # now the other one leads, with less of it
        await asyncio.sleep(0.5)
        two.kill()
        await asyncio.sleep(4)
        newcomer = await three.read(asked)
        assert newcomer.tokens == (await reads[0]).tokens == answer(asked)
        assert newcomer.status is CacheStatus.SHARED
        assert len(one.model.led) == 3
        with pytest.raises(Exception, match="before the answer's end"):
            await reads[1]

    play(scenario)


def test_what_readers_were_given_stands_where_the_store_says_otherwise():
    async def scenario() -> None:
        redis = MemoryRedis()
        one, two = Ingress(MemoryStore(redis), Model()), Ingress(MemoryStore(redis), Model(salt=1))
        asked = request(length=1500)
        reads = [asyncio.create_task(ingress.read(asked)) for ingress in (one, two)]
        await asyncio.sleep(1)
        one.store.down = True
        await asyncio.sleep(5)
        one.store.down = False
        assert (await reads[0]).tokens == answer(asked)
        begun, went_on = answer(asked), answer(asked, 1)
        mixed = (await reads[1]).tokens
        change = next(i for i in range(1500) if mixed[i:] == went_on[i:])
        assert mixed[:change] == begun[:change]
        await at_rest()
        assert (await one.read(asked)).tokens == mixed
        assert one.count("response_cache_rejected_total", reason="differs") == 1
        assert one.count("response_cache_stored_total") == 0

    play(scenario)


def test_a_shared_error_ends_it_for_all_and_is_not_kept():
    async def scenario() -> None:
        one, two = ingresses(2)
        asked = request(length=100)

        def fail(_: GenerationRequest, i: int) -> None:
            if i == 50:
                raise QueueFull("no room")

        one.model.interfere = fail
        reads = await asyncio.gather(*(i.read(asked) for i in (one, one, two, two)), return_exceptions=True)
        assert [type(got) for got in reads] == [QueueFull] * 4
        assert len(one.model.led) == 1
        await at_rest()
        one.model.interfere = lambda asked, i: None
        assert (await two.read(asked)).tokens == answer(asked)

    play(scenario)


def test_a_refusal_is_for_its_own_tenant_and_ingress():
    async def scenario() -> None:
        one, two = ingresses(2)

        async def lead(asked: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
            await asyncio.sleep(1)
            if asked.account == "full":
                raise QueueFull("no room for full")
            async for events in one.model.lead(asked):
                yield events

        asks = [msgspec.structs.replace(request(), account=account) for account in ("full", "full", "other")]
        here = [asyncio.create_task(read(one.cache.open(asked, lead, REPRODUCIBLE))) for asked in asks]
        there = asyncio.create_task(two.read(asks[0]))
        got = await asyncio.gather(*here, there, return_exceptions=True)
        assert [type(each) for each in got] == [QueueFull, QueueFull, Read, Read]
        assert got[2].tokens == got[3].tokens == answer(asks[0])

    async def nobody_else_here() -> None:
        one, two = ingresses(2)

        async def lead(asked: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
            await asyncio.sleep(1)
            raise QueueFull("no room")
            yield []

        refused = asyncio.create_task(read(one.cache.open(request(), lead, REPRODUCIBLE)))
        await asyncio.sleep(0.5)
        follower = asyncio.create_task(two.read(request()))
        with pytest.raises(QueueFull):
            await refused
        assert (await follower).tokens == answer(request())

    play(scenario)
    play(nobody_else_here)


def test_what_there_is_comes_before_the_error_and_no_empty_event_with_it():
    async def scenario() -> None:
        (one,) = ingresses(1)

        async def lead(asked: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
            yield [event_of(asked, 0, [5], None)]
            yield [event_of(asked, 1, [6], None)]
            raise RowFailed("a NaN")

        reading = one.cache.open(request(), lead, REPRODUCIBLE)
        events: list[TokenEvent] = []
        with pytest.raises(RowFailed):
            await collect(reading, events)
        assert [token for event in events for token in event.tokens] == [5, 6]
        assert all(event.tokens for event in events)

    play(scenario)


def test_the_leading_requests_deadline_is_nobody_elses():
    async def scenario() -> None:
        one, two = ingresses(2)
        asks = [request(length=300, timeout_s=timeout_s) for timeout_s in (1.0, 1.5, 60.0)]
        reads = [asyncio.create_task(one.read(asked)) for asked in asks]
        elsewhere = asyncio.create_task(two.read(request(length=300, timeout_s=2.0)))
        short, middle, patient = [await got for got in reads]
        assert (short.finish_reason, middle.finish_reason) == (FinishReason.TIMEOUT,) * 2
        assert 95 <= len(short.tokens) <= 100
        assert 145 <= len(middle.tokens) <= 150
        assert (patient.tokens, patient.finish_reason) == (answer(asks[0]), FinishReason.LENGTH)
        assert (await elsewhere).finish_reason is FinishReason.TIMEOUT

    play(scenario)


def test_a_leader_whose_readers_are_all_late_leaves_it_to_those_who_are_not():
    async def scenario() -> None:
        one, two = ingresses(2)
        reads = asyncio.gather(one.read(request(length=300, timeout_s=1.0)), two.read(request(length=300)))
        late, patient = await reads
        assert late.finish_reason is FinishReason.TIMEOUT
        assert patient.tokens == answer(request(length=300))

    play(scenario)


@pytest.mark.parametrize("where", [0, 1], ids=["leading", "following"])
def test_a_stop_string_ends_it_for_all_and_is_stored(where: int):
    async def scenario() -> None:
        both = ingresses(2)
        asked = request(length=1000)
        readings = [ingress.open(asked) for ingress in both]
        got = []
        for reading in readings:
            got += await anext(reading)
        reader = readings[where]
        length = 0
        while length < 105:
            length = (await anext(reader))[-1].start + 1
        reader.stopped(100, "###")
        await asyncio.gather(*(reading.aclose() for reading in readings))
        await asyncio.sleep(3)
        assert both[0].model.live.total() == 0
        hit = await both[0].read(asked)
        assert (hit.status, hit.tokens) == (CacheStatus.HIT, answer(asked)[:100])
        assert (hit.finish_reason, hit.stop_reason) == (FinishReason.STOP, "###")
        await at_rest()
        await asyncio.sleep(0)
        assert both[0].count("flights") == 0

    play(scenario)


def test_a_stop_string_ends_it_for_others_that_read_here():
    async def scenario() -> None:
        (one,) = ingresses(1)
        asked = request(length=1000)
        finder, other = one.open(asked), asyncio.create_task(one.read(asked))
        while (await anext(finder))[-1].start < 99:
            pass
        finder.stopped(100, "###")
        await finder.aclose()
        got = await other
        assert (got.tokens, got.stop_reason) == (answer(asked)[:100], "###")

    play(scenario)


def test_a_slow_reader_holds_up_nobody_and_gets_fewer_longer_batches():
    async def scenario() -> None:
        (one,) = ingresses(1)
        asked = request(length=200)
        slow, quick = one.open(asked), asyncio.create_task(one.read(asked))
        await anext(slow)
        assert (await quick).num_batches == 200
        await asyncio.sleep(1)
        rest = await anext(slow)
        assert (len(rest[-1].tokens), rest[-1].finish_reason) == (199, FinishReason.LENGTH)

    play(scenario)


async def collect(reading: Reading, events: list[TokenEvent]) -> None:
    async for batch in reading:
        events += batch
