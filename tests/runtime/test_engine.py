"""The engine's loop, and many consumers at once around it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from shoal.runtime.async_engine import AsyncEngine
from shoal.runtime.blocks import BlockPool
from shoal.runtime.engine import Engine
from shoal.runtime.errors import ContextTooLong, EngineDead, EngineError, InvalidRequest, QueueFull, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits

from .fakes import EOS, VOCAB, Clock, FakeGroup, FakeWorker, Stepwise, isolated
from .harness import Log

LIMITS = Limits(
    max_model_len=1000,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_queued=4,
    vocab_size=VOCAB,
    eos_token_ids=frozenset([EOS]),
)


def request(request_id: str, *, num_prompt: int = 6, **params: object) -> GenerationRequest:
    chosen = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params})  # type: ignore[arg-type]
    tokens = [2 + (len(request_id) + i) % 20 for i in range(num_prompt)]
    return GenerationRequest(id=request_id, prompt=tokens, params=chosen, seed=len(request_id))


def forever(request_id: str) -> GenerationRequest:
    """Seconds long where a step takes milliseconds."""
    return request(request_id, max_tokens=990)


def build(*, depth: int = 1, breaks_at: int | None = None, limits: Limits = LIMITS) -> tuple[Engine, FakeGroup]:
    group = FakeGroup(FakeWorker(block_size=4, reads=False), depth=depth, breaks_at=breaks_at)
    pool = BlockPool(1000, block_size=4)
    scheduler = Scheduler(limits, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=b"")
    return Engine(scheduler, group), group


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


# In one thread


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_lead_to_the_isolated_logs(depth: int) -> None:
    engine, _ = build(depth=depth)
    logs = {name: Log(request(name), None, []) for name in ("a", "bb", "ccc", "dddd", "eeeee")}
    for log in logs.values():
        engine.add(log.request)
    while engine.has_work:
        for event in engine.step():
            logs[event.id].append(event)
    assert all(log.tokens == isolated(log.request, limits=LIMITS).tokens for log in logs.values())
    assert engine.step() == []


def test_as_many_plans_are_in_flight_as_the_group_takes() -> None:
    engine, group = build(depth=3)
    engine.add(request("a"))
    engine.step()
    assert group.worker.num_drawn == 3, "two rows were planned before their tokens came back"


def test_stats_count_what_happened() -> None:
    engine, _ = build()
    engine.add(request("a", num_prompt=8, max_tokens=3))
    engine.add(request("b", num_prompt=8, max_tokens=5))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_blocks_held) == (2, 0, 1000, 3)
    assert stats.tokens_owed == 3 + 5
    assert stats.kv_usage == 3 / 1000
    engine.abort("b")
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.tokens_owed) == (16, 4, 0)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (16, 4)
    assert stats.finished == {"length": 1, "abort": 1}
    assert stats.steps == 3
    assert stats.host_s > 0


def test_an_abort_gives_the_terminal_event() -> None:
    engine, _ = build(depth=2)
    engine.add(request("a"))
    said = tokens_of(engine.step())
    event = engine.abort("a")
    assert event is not None
    assert (event.start, event.tokens, event.finish_reason) == (len(said), [], FinishReason.ABORT)
    assert engine.abort("a") is None
    while engine.has_work:
        assert engine.step() == []


def test_a_broken_group_stops_the_engine() -> None:
    engine, _ = build(breaks_at=2)
    engine.add(request("a"))
    engine.step()
    engine.step()
    with pytest.raises(EngineDead, match="rank 0 is gone"):
        engine.step()
    with pytest.raises(EngineDead, match="rank 0 is gone"):
        engine.step()
    with pytest.raises(EngineDead):
        engine.add(request("b"))
    (event,) = engine.end_all(FinishReason.ERROR, error="broken")
    assert (event.id, event.start, event.finish_reason, event.error) == ("a", 2, FinishReason.ERROR, "broken")


# Around a thread


def asynchronous(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """Runs a test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def serving(
    *,
    depth: int = 1,
    breaks_at: int | None = None,
    limits: Limits = LIMITS,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[tuple[AsyncEngine, FakeGroup]]:
    engine, group = build(depth=depth, breaks_at=breaks_at, limits=limits)
    serving_engine = AsyncEngine(engine, clock=clock)
    try:
        yield serving_engine, group
    finally:
        group.gate.set()
        await asyncio.to_thread(serving_engine.close)


async def collect(engine: AsyncEngine, wanted: GenerationRequest, constraint: Stepwise | None = None) -> Log:
    log = Log(wanted, constraint, list(wanted.tokens))
    stream = engine.generate(wanted) if constraint is None else engine.generate(wanted, constraint)
    async for events in stream:
        assert events, "an item without events"
        for event in events:
            log.append(event)
    assert log.ended, "the stream ended without a terminal event"
    return log


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def start(engine: AsyncEngine, group: FakeGroup, wanted: GenerationRequest) -> asyncio.Task[Log]:
    """A consumer whose log is in a step that does not end before the gate is opened."""
    group.gate.clear()
    before = group.worker.num_drawn
    task = asyncio.create_task(collect(engine, wanted))
    await until(lambda: group.worker.num_drawn > before)
    return task


@pytest.mark.parametrize("depth", [1, 2])
@asynchronous
async def test_many_consumers_at_once(depth: int) -> None:
    async with serving(depth=depth, limits=LIMITS) as (engine, _):
        logs = await asyncio.gather(*(collect(engine, request("x" * i)) for i in range(1, 9)))
    for log in logs:
        assert log.tokens == isolated(log.request, limits=LIMITS).tokens


@asynchronous
async def test_constraints_reach_the_ranks() -> None:
    async with serving() as (engine, _):
        log = await collect(engine, request("a"), Stepwise(length=5))
    assert [token % 3 for token in log.tokens] == [0, 1, 2, 0, 1]


@asynchronous
async def test_a_consumer_that_leaves_frees_its_place() -> None:
    async with serving() as (engine, group):
        group.step_s = 0.002
        stream = engine.generate(forever("a"))
        assert await anext(stream)
        await stream.aclose()
        await until(lambda: engine.stats().finished == {"abort": 1})
        await until(lambda: engine.stats().num_blocks_held == 0)


@asynchronous
async def test_a_consumer_that_is_cancelled_frees_its_place_and_its_id() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, forever("a"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = asyncio.create_task(collect(engine, request("a", max_tokens=2)))
        await asyncio.sleep(0.01)
        group.gate.set()
        assert len((await again).tokens) == 2
        await until(lambda: engine.stats().finished == {"abort": 1, "length": 1})


@asynchronous
async def test_events_that_came_together_are_one_item() -> None:
    async with serving() as (engine, _):
        stream = engine.generate(request("a", max_tokens=12))
        first = await anext(stream)
        await until(lambda: engine.stats().num_running == 0)
        await asyncio.sleep(0.01)
        rest = [events async for events in stream]
        assert len(rest) <= 1
        assert len(tokens_of(first + [event for events in rest for event in events])) == 12


@asynchronous
async def test_a_step_makes_one_call_into_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, calls = asyncio.get_running_loop(), []
    original = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: object, **kwargs: object) -> object:
        calls.append(callback)
        return original(callback, *args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    async with serving() as (engine, group):
        await asyncio.gather(*(collect(engine, request("x" * i)) for i in range(1, 5)))
    assert len([call for call in calls if getattr(call, "__name__", "") == "_hand_over"]) <= group.num_collected


@asynchronous
async def test_refusals_come_on_the_first_item() -> None:
    async with serving() as (engine, group):
        with pytest.raises(ContextTooLong):
            await collect(engine, request("a", max_tokens=2000))
        task = await start(engine, group, request("b"))
        second = asyncio.create_task(collect(engine, request("b")))
        await asyncio.sleep(0.01)
        group.gate.set()
        with pytest.raises(InvalidRequest, match="is live"):
            await second
        assert (await task).ended


@asynchronous
async def test_a_full_queue_refuses_at_once() -> None:
    async with serving() as (engine, group):
        group.gate.clear()  # the step never ends, so the engine's thread cannot be asked
        tasks = [asyncio.create_task(collect(engine, request("x" * i))) for i in range(1, 9)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull, match="--max-queued"):
            await asyncio.wait_for(collect(engine, request("late")), 0.05)
        group.gate.set()
        assert all(log.ended for log in await asyncio.gather(*tasks))


@asynchronous
async def test_an_idle_engine_rests() -> None:
    async with serving() as (engine, _):
        await collect(engine, request("a"))
        await until(lambda: engine.stats().num_running == 0)
        spent = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - spent < 0.1
        assert engine.healthy
        assert engine.ready


@asynchronous
async def test_when_the_engine_dies_every_stream_ends_once() -> None:
    async with serving(breaks_at=3) as (engine, _):
        logs = await asyncio.gather(*(collect(engine, forever("x" * i)) for i in range(1, 7)))
        for log in logs:
            assert log.last is not None
            assert log.last.finish_reason is FinishReason.ERROR
            assert "rank 0 is gone" in (log.last.error or "")
        assert not engine.healthy
        with pytest.raises(EngineDead, match="rank 0 is gone"):
            await collect(engine, request("late"))


@asynchronous
async def test_alive_without_a_step_is_stuck() -> None:
    clock = Clock()
    async with serving(clock=clock) as (engine, group):
        clock.now = 100.0
        assert not engine.is_stuck(), "idle is not stuck"
        task = await start(engine, group, request("a"))
        clock.now = 109.0
        assert engine.healthy
        clock.now = 111.0
        assert engine.is_stuck()
        assert not engine.healthy
        group.gate.set()
        await task
        assert engine.healthy


@asynchronous
async def test_draining_lets_live_logs_end_and_takes_no_more() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, request("a"))
        drained = asyncio.create_task(engine.drain(5.0))
        await asyncio.sleep(0.01)
        assert not engine.ready
        with pytest.raises(Unavailable):
            await collect(engine, request("b"))
        group.gate.set()
        await drained
        assert (await task).last.finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]


@asynchronous
async def test_draining_aborts_the_rest_at_the_deadline() -> None:
    async with serving() as (engine, group):
        group.step_s = 0.002
        task = asyncio.create_task(collect(engine, forever("a")))
        await until(lambda: group.num_collected > 0)
        await engine.drain(0.01)
        log = await task
    assert log.last is not None
    assert log.last.finish_reason is FinishReason.ABORT


@asynchronous
async def test_a_drain_does_not_wait_for_a_stuck_engine() -> None:
    """It is dead, not leaving: its logs are not handed over as if nothing were wrong with them."""
    clock = Clock()
    async with serving(clock=clock) as (engine, group):
        task = await start(engine, group, forever("a"))
        clock.now = 11.0
        async with asyncio.timeout(1.0):
            await engine.drain(30.0)
            log = await task
    assert log.last is not None
    assert log.last.finish_reason is FinishReason.ERROR


@asynchronous
async def test_closing_ends_every_stream() -> None:
    engine, group = build()
    serving_engine = AsyncEngine(engine)
    group.step_s = 0.002
    tasks = [asyncio.create_task(collect(serving_engine, forever("x" * i))) for i in range(1, 7)]
    await until(lambda: group.num_collected > 0)
    await asyncio.to_thread(serving_engine.close)
    assert {log.last.finish_reason for log in await asyncio.gather(*tasks)} == {FinishReason.ABORT}  # type: ignore[union-attr]
    assert group.closed
    serving_engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await collect(serving_engine, request("late"))


@asynchronous
async def test_closing_does_not_wait_for_a_step_that_hangs() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, forever("a"))
        await asyncio.to_thread(engine.close, 0.01)
        log = await task
    assert log.last is not None
    assert (log.last.finish_reason, log.last.error) == (FinishReason.ABORT, "the engine was closed")


@asynchronous
async def test_a_request_that_nobody_thought_of_ends_no_other() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, request("a"))
        bad = asyncio.create_task(collect(engine, replace(request("b"), tenant=None)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        group.gate.set()
        with pytest.raises(EngineError, match="could not be taken in"):
            await bad
        assert (await task).last.finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]


def test_a_loop_that_goes_away_takes_its_logs_along() -> None:
    engine, group = build()
    group.step_s = 0.002
    serving_engine = AsyncEngine(engine)

    loop = asyncio.new_event_loop()
    stream = serving_engine.generate(forever("a"))
    loop.run_until_complete(anext(stream))
    loop.close()
    log = asyncio.run(collect(serving_engine, request("b")))
    assert log.ended
    assert serving_engine.healthy
    serving_engine.close()
    assert engine.stats().finished == {"abort": 1, "length": 1}
    assert engine.stats().num_blocks_held == 0
