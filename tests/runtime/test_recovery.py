"""An engine that outlives its ranks. `RecoveryMachine` (test_scheduler_machine.py) mixes what is told apart here."""

from __future__ import annotations

import asyncio
import logging

import pytest
from msgspec.structs import replace

from shoal.parallel.group import GroupFailure, GroupStartError
from shoal.runtime.engine import GOOD_STEPS, Engine
from shoal.runtime.errors import EngineDead, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest

from .fakes import POISON, Clock, FakeGroup, Stepwise, isolated
from .harness import Harness, Log
from .test_engine import LIMITS, asynchronous, build, collect, request, serving, start, until

GUILTY = "this request made a rank of the engine fail"


def poison(request_id: str, *, at: int, **params: object) -> GenerationRequest:
    """A rank that computes the token at this position dies."""
    return request(request_id, logit_bias={POISON: float(at)}, **params)


class Run:
    """An engine with some logs, in one thread."""

    def __init__(self, *wanted: GenerationRequest, depth: int = 1, names_rows: bool = False) -> None:
        self.engine, self.group = build(depth=depth)
        self.group.names_rows = names_rows
        self.logs: dict[str, Log] = {}
        for each in wanted:
            self.add(each)

    def add(self, wanted: GenerationRequest, constraint: Stepwise | None = None) -> None:
        self.engine.add(wanted, *([] if constraint is None else [constraint.after([])]))
        self.logs[wanted.id] = Log(wanted, constraint, [])

    def steps(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                self.logs[event.id].append(event)

    def finish(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                return
            self.steps(1)
        raise AssertionError("the engine does not come to rest")

    def check(self, *, failed: str = "") -> None:
        """All logs have ended as they do alone, but the one that failed."""
        assert self.engine.stats().num_blocks_held == 0
        for name, log in self.logs.items():
            assert log.last is not None
            expected = isolated(log.request, log.constraint.after([]) if log.constraint else Stepwise(1), limits=LIMITS)
            if name == failed:
                assert (log.last.finish_reason, log.last.error) == (FinishReason.ERROR, GUILTY)
                assert log.tokens == expected.tokens[: len(log.tokens)]
            else:
                assert (log.tokens, log.last.finish_reason) == (expected.tokens, expected.reason)
            if name != failed:
                log.check_logprobs()


# The scheduler and the engine


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("is_suspect", [False, True])
def test_logs_go_on_token_for_token(depth: int, is_suspect: bool) -> None:
    run = Run(request("a"), request("bb", num_prompt=30), request("ccc", logprobs=0, prompt_logprobs=0), depth=depth)
    run.add(request("dddd"), Stepwise())
    num_failures = 1 if is_suspect else 3
    for _ in range(num_failures):
        run.steps(3)
        run.group.fail(is_suspect=is_suspect)
    run.finish()
    run.check()
    stats = run.engine.stats()
    assert (run.group.num_restarts, stats.restarts, stats.poisoned) == (num_failures, num_failures, 0)
    assert stats.rank_failures == {f"{'exception' if is_suspect else 'killed'},0,step": num_failures}
    assert (stats.quarantined > 0) == is_suspect


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("at", [2, 6, 11])
def test_a_poison_costs_two_restarts_and_no_other_request(depth: int, at: int) -> None:
    run = Run(request("a"), poison("bb", at=at), request("ccc"), request("dddd"), depth=depth)
    run.finish()
    run.check(failed="bb")
    stats = run.engine.stats()
    assert (stats.restarts, stats.poisoned, stats.finished["error"]) == (2, 1, 1)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_rank_that_names_the_row_costs_one_restart(depth: int) -> None:
    run = Run(request("a"), poison("bb", at=9), request("ccc"), depth=depth, names_rows=True)
    run.finish()
    run.check(failed="bb")
    assert (run.engine.stats().restarts, run.engine.stats().quarantined) == (1, 0)


def test_a_poison_that_only_reads_its_prompt_is_found() -> None:
    run = Run(request("a"), poison("bb", at=3, max_tokens=0), request("ccc", max_tokens=0), depth=2)
    run.finish()
    run.check(failed="bb")


def test_nothing_that_the_lost_cache_held_is_found_again() -> None:
    run = Run(request("a", num_prompt=20), depth=1)
    run.finish()
    run.add(request("b", num_prompt=20, max_tokens=30))
    run.steps(2)
    run.group.fail()
    run.steps(2)
    hits = run.engine.stats().prefix_hit_tokens
    run.add(request("c", num_prompt=20, max_tokens=1))
    run.finish()
    run.check()
    assert hits == 16, "the first log's prompt, before the failure"
    assert run.engine.stats().prefix_hit_tokens == 16 + 16, "the second log's, computed anew"


def test_a_kill_while_a_suspect_is_alone_leaves_it_a_suspect() -> None:
    run = Run(request("a"), poison("bb", at=9))
    while run.engine.stats().restarts == 0:
        run.steps(1)
    run.steps(1)  # `a` draws alone and is cleared
    run.group.fail(is_suspect=False)
    run.finish()
    run.check(failed="bb")
    assert (run.engine.stats().restarts, run.engine.stats().quarantined) == (3, 2)


def test_an_aborted_suspect_makes_room_for_the_next() -> None:
    run = Run(request("a"), poison("bb", at=9), request("ccc"))
    while run.engine.stats().quarantined == 0:
        run.steps(1)
    for name in ("a", "bb"):
        event = run.engine.abort(name)
        assert event is not None
        run.logs.pop(name).append(event)
    run.finish()
    run.check()
    assert run.engine.stats().restarts == 1


def test_the_next_suspect_waits_for_the_plans_of_an_aborted_one() -> None:
    test = Harness(LIMITS, num_blocks=100, block_size=4, depth=3)
    for name in ("a", "bb"):
        test.add(request(name))
    test.step()
    test.fail(is_suspect=True)
    test.submit()
    test.abort("a")
    assert test.submit() is None, "should the ranks fail now, the second would be blamed for the first"
    test.collect()
    plan = test.submit()
    assert plan is not None
    assert len(plan.slices) == 1
    test.run()
    test.check_at_rest()


def test_newcomers_wait_while_suspects_are_tried() -> None:
    run = Run(request("a"), request("bb"))
    run.steps(2)
    run.group.fail(is_suspect=True)
    run.steps(2)  # the failure, the restart
    run.add(request("ccc"))
    for _ in range(2):
        run.steps(1)
        assert len(run.logs["ccc"].tokens) == 0
    run.finish()
    run.check()


def test_a_failure_is_told_before_the_restart() -> None:
    run = Run(poison("a", at=7), names_rows=True)
    run.steps(2)
    assert run.engine.restarting is None
    run.steps(1)
    assert run.logs["a"].ended
    assert (run.group.num_restarts, run.engine.has_work) == (0, True)
    assert run.engine.restarting == "restarting the ranks after: rank 0 (stage 0, shard 0) raised ValueError"
    run.steps(1)
    assert (run.group.num_restarts, run.engine.has_work, run.engine.restarting) == (1, False, None)


def test_one_line_is_logged_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(request("a"), request("bb"))
    run.steps(2)
    run.group.fail(is_suspect=True)
    with caplog.at_level(logging.INFO, logger="shoal.runtime.engine"):
        run.finish()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the ranks failed: rank 0 (stage 0, shard 0) raised ValueError (rank 0, station 'step'); "
        "2 generations go on, 2 of them alone first; 0 ended"
    )


@pytest.mark.parametrize("error", [GroupStartError("no device"), GroupFailure("cannot be started anew")])
def test_ranks_that_do_not_come_back_end_the_engine(error: GroupStartError | GroupFailure) -> None:
    run = Run(request("a"))
    run.steps(2)
    run.group.start_error = error
    run.group.fail()
    run.steps(1)
    with pytest.raises(EngineDead, match=rf"rank 0 .* was killed; the ranks did not come back: {error}"):
        run.steps(1)
    with pytest.raises(EngineDead):
        run.engine.add(request("bb"))
    (event,) = run.engine.end_all(FinishReason.ERROR, error="broken")
    assert (event.start, event.finish_reason) == (2, FinishReason.ERROR)


def restarts_until_dead(engine: Engine, group: FakeGroup, *, steps_between: int) -> int:
    engine.add(request("a", max_tokens=900))
    for _ in range(7):
        try:
            for _ in range(steps_between):
                engine.step()
            group.fail()
            engine.step()
            engine.step()
        except EngineDead:
            break
    return group.num_restarts


@pytest.mark.parametrize(("steps_between", "restarts"), [(0, 5), (10, 5), (GOOD_STEPS - 1, 5), (GOOD_STEPS, 7)])
def test_ranks_that_fail_again_and_again_end_the_engine(steps_between: int, restarts: int) -> None:
    engine, group = build(limits=LIMITS)
    assert restarts_until_dead(engine, group, steps_between=steps_between) == restarts


def test_poison_after_poison_does_not_end_the_engine() -> None:
    run = Run(request("a", max_tokens=100))
    for i in range(8):
        run.add(poison("x" * (2 + i), at=7))
        run.steps(12)
        assert run.logs.pop("x" * (2 + i)).ended
    run.finish()
    run.check()
    assert run.engine.stats().poisoned == 8


# Around a thread


@asynchronous
async def test_clients_see_a_pause() -> None:
    async with serving(depth=2) as (engine, group):
        task = await start(engine, group, request("a"))
        group.restart_gate.clear()
        group.fail()
        group.gate.set()
        await until(lambda: not engine.ready)
        assert engine.state == "restarting the ranks after: rank 0 (stage 0, shard 0) was killed"
        assert engine.healthy
        late = asyncio.create_task(collect(engine, request("bb")))
        await asyncio.sleep(0.01)
        assert not task.done()
        group.restart_gate.set()
        for log in await asyncio.gather(task, late):
            assert log.tokens == isolated(log.request, limits=LIMITS).tokens
        assert (engine.ready, engine.state) == (True, "ready")
        await until(lambda: engine.stats().restarts == 1)


@asynchronous
async def test_ranks_that_die_while_nobody_asks_are_back_before_somebody_does() -> None:
    async with serving() as (engine, group):
        group.gate.set()
        group.restart_gate.set()
        group.fail()
        await until(lambda: engine.stats().restarts == 1)
        await until(lambda: engine.ready)
        assert (await collect(engine, request("a"))).tokens == isolated(request("a"), limits=LIMITS).tokens


@asynchronous
async def test_a_restart_is_not_stuck() -> None:
    clock = Clock()
    async with serving(clock=clock) as (engine, group):
        task = await start(engine, group, request("a"))
        group.restart_gate.clear()
        group.fail()
        group.gate.set()
        await until(lambda: not engine.ready)
        clock.now = 100.0
        assert engine.healthy
        group.restart_gate.set()
        await task
        assert engine.healthy


@asynchronous
async def test_draining_waits_for_a_restart() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, request("a"))
        group.restart_gate.clear()
        group.fail()
        group.gate.set()
        await until(lambda: not engine.ready)
        drained = asyncio.create_task(engine.drain(5.0))
        await until(lambda: engine.state == "the engine is draining")
        with pytest.raises(Unavailable):
            await collect(engine, request("bb"))
        group.restart_gate.set()
        await drained
        assert (await task).last.finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]


@asynchronous
async def test_draining_does_not_wait_for_ever() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, request("a"))
        group.restart_gate.clear()
        group.fail()
        group.gate.set()
        await until(lambda: not engine.ready)
        await engine.drain(0.01)
        log = await asyncio.wait_for(task, 1.0)
        group.restart_gate.set()
        assert (log.last.finish_reason, log.last.error) == (FinishReason.ABORT, "the engine is shutting down")  # type: ignore[union-attr]


@asynchronous
async def test_closing_in_a_restart_leaves_no_ranks() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, request("a"))
        group.restart_gate.clear()
        group.fail()
        group.gate.set()
        await until(lambda: not engine.ready)
        await asyncio.to_thread(engine.close, 0.01)
        assert (await task).last.finish_reason is FinishReason.ABORT  # type: ignore[union-attr]
        await until(lambda: group.num_restarts == 1 and group.closed)


@asynchronous
async def test_an_abort_in_a_restart_frees_the_log() -> None:
    async with serving() as (engine, group):
        task = await start(engine, group, replace(request("a"), timeout_s=60.0))
        group.restart_gate.clear()
        group.fail(is_suspect=True)
        group.gate.set()
        await until(lambda: not engine.ready)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        group.restart_gate.set()
        assert (await collect(engine, request("bb"))).ended
        await until(lambda: engine.stats().finished == {"abort": 1, "length": 1})
