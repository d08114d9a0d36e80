"""What an engine tells a router of itself: which blocks can be found, and how much of its prompts is yet to be done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from shoal.runtime.async_engine import MAX_CHANGES, AsyncEngine
from shoal.runtime.blocks import SHORT, BlockNames, BlockPool, Changes, tenant_salt
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits

from .fakes import VOCAB, FakeGroup, FakeWorker

SIZE = 4
LIMITS = Limits(max_model_len=1000, max_num_seqs=1, max_num_batched_tokens=16, max_queued=9, vocab_size=VOCAB)


def build() -> tuple[Engine, FakeGroup]:
    group = FakeGroup(FakeWorker(block_size=SIZE, reads=False))
    pool = BlockPool(100, block_size=SIZE)
    return Engine(Scheduler(LIMITS, pool=pool, policy=FirstCome(), clock=lambda: 0.0, secret=b"s"), group), group


def request(name: str, *, num: int = 40, max_tokens: int = 4) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(id=name, prompt=[2 + i % 20 for i in range(num)], params=params, seed=1)


def names(count: int) -> set[bytes]:
    made = BlockNames(request("a").prompt, salt=tenant_salt(b"s", ""), block_size=SIZE)
    return {made[i][:SHORT] for i in range(count)}


def heard(told: Iterable[Changes], known: set[bytes]) -> set[bytes]:
    for changes in told:
        gone, new = (
            {row[at : at + SHORT] for at in range(0, len(row), SHORT)} for row in (changes.removed, changes.added)
        )
        known = (set() if changes.anew else known) - gone | new
    return known


def test_a_prompt_is_published_as_it_is_computed_and_forgotten_when_the_ranks_fail() -> None:
    engine, group = build()
    known = heard([engine.take_cache_changes()], set())
    engine.add(request("a"))
    for num_computed in (16, 32, 40):
        engine.step()
        known = heard([engine.take_cache_changes()], known)
        assert known == names(num_computed // SIZE)
    group.fail()
    engine.step()
    assert heard([engine.take_cache_changes()], known) == set(), "the new ranks' caches are empty"
    engine.step()
    engine.step()
    assert heard([engine.take_cache_changes()], set()) == names(16 // SIZE)


def test_the_backlog_is_what_is_yet_to_be_computed_but_for_what_the_cache_spares() -> None:
    engine, _ = build()
    engine.add(request("a"))
    engine.add(request("b", num=42))
    assert engine.stats().prefill_tokens_owed == 82
    engine.step()
    assert engine.stats().prefill_tokens_owed == 24 + 42 - 16
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert stats.prefill_tokens_owed == 2, "an answer's next token is no backlog; two tokens are in no cached block"
    while engine.has_work:
        engine.step()
    assert engine.stats().prefill_tokens_owed == 0


def test_a_thread_of_steps_hands_its_changes_over_and_keeps_none_back() -> None:
    async def scenario() -> None:
        engine, _ = build()
        serving = AsyncEngine(engine)
        known: set[bytes] = set()
        for name in "abc":
            async for _ in serving.generate(request(name)):
                known = heard(serving.take_cache_changes(), known)
        async with asyncio.timeout(10):
            while not names(10) <= known:
                await asyncio.sleep(0.01)
                known = heard(serving.take_cache_changes(), known)
        for i in range(3 * MAX_CHANGES):  # nobody takes
            async for _ in serving.generate(request(f"late-{i}", num=5 + i, max_tokens=1)):
                pass
        async with asyncio.timeout(10):
            while (now := {name[:SHORT] for name in engine._scheduler.pool._by_digest}) != known:
                await asyncio.sleep(0.01)
                told = serving.take_cache_changes()
                assert len(told) <= MAX_CHANGES
                known = heard(told, known)
        assert now
        serving.close()

    asyncio.run(scenario())
