"""What the scheduler promises, one promise a test. `test_scheduler_machine.py` mixes them all."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from shoal.runtime.blocks import BlockPool
from shoal.runtime.engine import Engine
from shoal.runtime.errors import ContextTooLong, InvalidRequest, QueueFull, RowFailed
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams
from shoal.runtime.plan import StepPlan
from shoal.runtime.policy import FirstCome, Key, Priority
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Ending, Limits

from .fakes import EOS, POISON, VOCAB, FakePipeline, FakeWorker, Stepwise
from .harness import Harness


def limits(**changes: object) -> Limits:
    fields: dict[str, object] = {
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_queued": 100,
        "vocab_size": VOCAB,
        "eos_token_ids": frozenset([EOS]),
    }
    return Limits(**{**fields, **changes})  # type: ignore[arg-type]


def harness(*, num_blocks: int = 100, depth: int = 1, priorities: bool = False, **changes: object) -> Harness:
    policy = Priority() if priorities else None
    return Harness(limits(**changes), num_blocks=num_blocks, block_size=4, depth=depth, policy=policy)


def prompt(num_tokens: int, *, first: int = 2) -> list[int]:
    return [first, *(2 + i % (VOCAB - 2) for i in range(num_tokens - 1))]


def request(request_id: str, tokens: list[int], *, seed: int = 1, **params: object) -> GenerationRequest:
    """Ends by length alone unless told otherwise."""
    chosen = SamplingParams(**{"max_tokens": 5, "ignore_eos": True, **params})  # type: ignore[arg-type]
    return GenerationRequest(id=request_id, prompt=tokens, params=chosen, seed=seed)


def shape(plan: StepPlan | None) -> list[tuple[int, int]]:
    """(start, count) of each slice."""
    assert plan is not None
    return [(part.start, part.count) for part in plan.slices]


def finish(test: Harness) -> None:
    test.run()
    test.check_at_rest()


# Budget and order


def test_a_long_prompt_is_computed_in_chunks_beside_running_rows() -> None:
    test = harness(max_num_batched_tokens=16)
    test.add(request("short", prompt(4), max_tokens=20))
    assert shape(test.step()) == [(0, 4)]
    test.add(request("long", prompt(40, first=9)))
    assert shape(test.step()) == [(4, 1), (0, 15)]
    assert shape(test.step()) == [(5, 1), (15, 15)]
    assert shape(test.step()) == [(6, 1), (30, 10)]
    assert shape(test.step()) == [(7, 1), (40, 1)]
    finish(test)


def test_only_the_last_chunk_draws() -> None:
    test = harness(max_num_batched_tokens=16)
    test.add(request("long", prompt(40)))
    draws = [plan.slices[0].samples for plan in (test.step(), test.step(), test.step()) if plan]
    assert draws == [False, False, True]


def test_several_prompts_share_a_step() -> None:
    test = harness(max_num_batched_tokens=16)
    for i in range(4):
        test.add(request(f"{i}", prompt(5, first=3 + i)))
    assert shape(test.step()) == [(0, 1), (0, 5), (0, 5), (0, 5)], "the last gets what is left of the budget"
    finish(test)


def test_no_more_run_than_there_are_slots() -> None:
    test = harness(max_num_seqs=2)
    for i in range(5):
        test.add(request(f"{i}", prompt(5)))
    test.step()
    assert (test.scheduler.num_running, test.scheduler.num_waiting) == (2, 3)
    finish(test)


def test_priorities_decide_who_is_next_and_who_gives_way() -> None:
    test = harness(priorities=True, max_num_seqs=1)
    test.add(request("late", prompt(5)))
    test.step()
    test.add(replace(request("urgent", prompt(5, first=7)), priority=-1))
    test.add(replace(request("later", prompt(5, first=8)), priority=1))
    ended = []
    for _ in range(100):
        test.step()
        ended += [name for name, log in test.logs.items() if log.ended and name not in ended]
    assert ended == ["urgent", "late", "later"]
    assert test.scheduler.counters.preemptions == 1
    finish(test)


def test_an_urgent_prompt_gets_the_budget_before_a_long_one() -> None:
    test = harness(priorities=True, max_num_batched_tokens=16)
    test.add(replace(request("long", prompt(60)), priority=1))
    test.step()
    test.add(request("urgent", prompt(10, first=7)))
    assert shape(test.step()) == [(0, 10), (16, 6)]
    finish(test)


# Blocks


def test_a_prefix_is_computed_once() -> None:
    test = harness()
    test.add(request("a", prompt(20), seed=1))
    finish(test)
    test.add(request("b", [*prompt(20), 5, 5], seed=2))
    assert shape(test.step()) == [(20, 2)]
    assert test.logs["b"].num_cached_tokens == 20
    finish(test)


def test_the_last_token_of_a_known_prompt_is_computed_again() -> None:
    test = harness()
    test.add(request("a", prompt(20)))
    finish(test)
    test.add(request("b", prompt(20)))
    assert shape(test.step()) == [(16, 4)], "the last block, as its last token draws the next"
    finish(test)


def test_equal_prompts_in_one_step_share_their_blocks() -> None:
    test = harness()
    for i in range(3):
        test.add(request(f"{i}", prompt(18), seed=i))
    assert shape(test.step()) == [(0, 18), (16, 2), (16, 2)]
    finish(test)


def test_answers_are_found_as_prefixes_too() -> None:
    test = harness()
    test.add(request("a", prompt(6), max_tokens=8))
    finish(test)
    test.add(request("b", [*prompt(6), *test.logs["a"].tokens, 5], seed=3))
    assert shape(test.step()) == [(12, 3)], "13 of the 14 were computed, 12 of them in full blocks"
    finish(test)


def test_tenants_do_not_share() -> None:
    test = harness()
    test.add(replace(request("a", prompt(20)), tenant="a", seed=1 << 32))
    finish(test)
    test.add(replace(request("b", prompt(20)), tenant="b", seed=2 << 32))
    assert shape(test.step()) == [(0, 20)]
    finish(test)


def test_caching_can_be_turned_off() -> None:
    test = harness(prefix_caching=False)
    for name in "ab":
        test.add(request(name, prompt(20)))
        assert shape(test.step()) == [(0, 20)]
        finish(test)
    assert test.scheduler.counters.prefix_hit_tokens == 0


def test_what_led_to_a_nan_is_not_shared() -> None:
    test = harness()
    test.add(request("bad", [*prompt(20), POISON]))
    test.add(request("good", prompt(9, first=5)))
    finish(test)
    last = test.logs["bad"].last
    assert last is not None
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "the logits were not finite")
    assert test.logs["good"].last.finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]
    test.add(request("again", prompt(20)))
    assert shape(test.step()) == [(0, 20)]
    finish(test)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preempted_logs_say_what_they_would_have_said(depth: int) -> None:
    test = harness(num_blocks=12, depth=depth, max_model_len=48)
    for i in range(4):
        test.add(request(f"{i}", prompt(6, first=3 + i), max_tokens=30, seed=i))
    finish(test)
    assert test.scheduler.counters.preemptions > 0


def test_the_first_to_come_is_never_preempted() -> None:
    test = harness(num_blocks=10, max_model_len=40)
    for i in range(5):
        test.add(request(f"{i}", prompt(4, first=3 + i), max_tokens=36, seed=i))
    order = []
    for _ in range(400):
        test.step()
        order += [name for name, log in test.logs.items() if log.ended and name not in order]
    assert order == ["0", "1", "2", "3", "4"]
    finish(test)


# Ends


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_token_ends_the_log_and_is_its_last(depth: int) -> None:
    test = harness(depth=depth)
    test.add(request("a", prompt(6), max_tokens=100))
    finish(test)
    stop = test.logs["a"].tokens[10]
    first = test.logs["a"].tokens.index(stop)
    test.add(request("b", prompt(6), max_tokens=100, stop_token_ids=[stop]))
    finish(test)
    log = test.logs["b"]
    assert log.tokens == test.logs["a"].tokens[: first + 1]
    assert (log.last.finish_reason, log.last.stop_reason) == (FinishReason.STOP, stop)  # type: ignore[union-attr]


def test_no_budget_is_spent_behind_max_tokens() -> None:
    test = harness(depth=3)
    test.add(request("a", prompt(6), max_tokens=4))
    finish(test)
    assert test.worker.num_drawn == 4


def test_max_tokens_0_reads_the_prompt() -> None:
    test = harness(max_num_batched_tokens=8)
    test.add(request("a", prompt(20), max_tokens=0, prompt_logprobs=0))
    test.run()
    log = test.logs["a"]
    assert (log.tokens, log.last.finish_reason) == ([], FinishReason.LENGTH)  # type: ignore[union-attr]
    assert log.prompt_logprobs is not None
    assert len(log.prompt_logprobs) == 20
    finish(test)


def test_without_max_tokens_the_context_ends_it() -> None:
    test = harness(max_model_len=30)
    test.add(request("a", prompt(6), max_tokens=None))
    finish(test)
    assert len(test.logs["a"].tokens) == 24


def test_prompt_logprobs_pass_by_the_cache() -> None:
    test = harness(max_num_batched_tokens=16)
    test.add(request("a", prompt(20)))
    finish(test)
    test.add(request("b", prompt(20), prompt_logprobs=0, logprobs=0))
    finish(test)
    assert test.logs["b"].num_cached_tokens == 0


def test_a_deadline_ends_running_and_waiting_logs() -> None:
    test = harness(max_num_seqs=1, depth=2)
    for name in "ab":
        test.add(replace(request(name, prompt(6), max_tokens=100), timeout_s=3.0))
    test.step()
    test.clock.now = 3.0
    test.step()
    for log in test.logs.values():
        assert log.last is not None
        assert log.last.finish_reason is FinishReason.TIMEOUT
        assert log.last.error == "the deadline of 3.0 s has passed"
    finish(test)


def test_an_abort_frees_everything_at_once() -> None:
    test = harness(max_num_seqs=1, depth=2)
    test.add(request("a", prompt(6), max_tokens=100))
    test.add(request("b", prompt(6), max_tokens=100))
    test.step()
    test.abort("a")
    test.abort("b")
    assert test.pool.num_free == 100
    assert test.scheduler.abort("a") is None
    assert test.scheduler.abort("nobody") is None
    finish(test)


def test_all_can_be_ended_at_once() -> None:
    test = harness(max_num_seqs=1)
    for name in "abc":
        test.add(request(name, prompt(6)))
    test.step()
    events = test.scheduler.end_all(Ending(FinishReason.ERROR, error="the rank is gone"))
    assert sorted(event.id for event in events) == ["a", "b", "c"]
    assert {event.finish_reason for event in events} == {FinishReason.ERROR}
    assert test.pool.num_free == 100


# Resume


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_resumed_log_goes_on_as_if_nothing_had_been(cut: int) -> None:
    test = harness()
    whole = request("whole", prompt(6), max_tokens=8)
    test.add(whole)
    finish(test)
    tokens = test.logs["whole"].tokens
    test.add(replace(whole, id="rest", tokens=tokens[:cut]))
    finish(test)
    assert test.logs["rest"].tokens == tokens


def test_a_log_that_has_ended_ends_at_once() -> None:
    test = harness()
    test.add(replace(request("long", prompt(6), max_tokens=3), tokens=[4, 5, 6]))
    test.add(replace(request("stop", prompt(6), ignore_eos=False), tokens=[4, EOS]))
    reasons = [test.logs[name].last.finish_reason for name in ("long", "stop")]  # type: ignore[union-attr]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP]
    assert test.worker.num_drawn == 0
    finish(test)


# Constraints


@pytest.mark.parametrize("depth", [1, 3])
def test_a_constraint_masks_every_token_and_ends_the_log(depth: int) -> None:
    test = harness(depth=depth)
    test.add(request("a", prompt(6), max_tokens=50), Stepwise(period=3, length=7))
    finish(test)
    log = test.logs["a"]
    assert [token % 3 for token in log.tokens] == [0, 1, 2, 0, 1, 2, 0]
    assert log.last.finish_reason is FinishReason.STOP  # type: ignore[union-attr]


def test_a_constrained_row_sits_out_and_others_do_not() -> None:
    test = harness(depth=2)
    test.add(request("free", prompt(6), max_tokens=20))
    test.add(request("bound", prompt(6, first=7), max_tokens=20), Stepwise())
    test.submit()
    assert shape(test.submit()) == [(6, 1)], "the constrained row's token is not known yet"
    finish(test)


def test_a_constraint_that_gives_up_fails_its_log_alone() -> None:
    test = harness(depth=2)
    test.add(request("bad", prompt(6), max_tokens=20), Stepwise(length=4, fails=True))
    test.add(request("good", prompt(6, first=7), max_tokens=20))
    finish(test)
    last = test.logs["bad"].last
    assert last is not None
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "the grammar gave up")


class Charged(FirstCome):
    """Counts the generations that an account is charged with."""

    num_live = 0

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        self.num_live += 1
        return super().key(request, arrival)

    def ended(self, request: GenerationRequest, key: Key, num_output: int | None) -> None:
        self.num_live -= 1


class Impossible(Stepwise):
    def mask(self) -> bytes | None:
        raise RowFailed("nothing that could follow satisfies it")


def test_the_policy_hears_of_the_end_of_all_that_it_was_asked_for() -> None:
    policy = Charged()
    test = Harness(limits(), num_blocks=100, block_size=4, policy=policy)
    with pytest.raises(RowFailed):
        test.scheduler.add(request("refused", prompt(9)), Impossible())
    assert policy.num_live == 0
    test.add(request("a", prompt(9)))
    test.add(request("b", prompt(9)))
    assert policy.num_live == 2
    finish(test)
    assert policy.num_live == 0


# Pipelines


def test_rows_are_spread_over_the_micro_batches() -> None:
    test = harness(depth=3, num_microbatches=2)
    for i in range(4):
        test.add(request(f"{i}", prompt(6, first=3 + i), max_tokens=30))
    for _ in range(10):
        test.step()
    sizes = [len(plan.slices) for plan, _ in test.in_flight]
    assert sizes == [2, 2]
    finish(test)


def pipeline(num_stages: int, *, num_rows: int, num_prompt: int = 6, **changes: object) -> tuple[Engine, FakePipeline]:
    fields = {"num_microbatches": num_stages, "max_num_seqs": 32, **changes}
    scheduler = Scheduler(
        limits(max_model_len=1000, **fields),
        pool=BlockPool(5000, block_size=4),
        policy=FirstCome(),
        clock=lambda: 0.0,
        secret=b"",
    )
    group = FakePipeline(FakeWorker(block_size=4, reads=False), num_stages=num_stages)
    engine = Engine(scheduler, group)
    for i in range(num_rows):
        engine.add(request(f"{i}", prompt(num_prompt, first=3 + i % 20), max_tokens=300, seed=i))
    return engine, group


def idle_in(engine: Engine, group: FakePipeline, *, num_steps: int) -> list[int]:
    """Ticks without work, for each stage, in the next steps."""
    before = list(group.idle)
    for _ in range(num_steps):
        engine.step()
    return [after - start for after, start in zip(group.idle, before, strict=True)]


@pytest.mark.parametrize(("num_stages", "num_rows"), [(p, n) for p in (1, 2, 3, 4) for n in range(p, 10)])
def test_every_stage_has_work_in_every_step(num_stages: int, num_rows: int) -> None:
    engine, group = pipeline(num_stages, num_rows=num_rows)
    idle_in(engine, group, num_steps=5 * num_stages)
    assert idle_in(engine, group, num_steps=40) == [0] * num_stages


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_pipeline_stays_full_when_rows_come_and_go(num_stages: int) -> None:
    engine, group = pipeline(num_stages, num_rows=9)
    idle_in(engine, group, num_steps=20)
    for i in (0, 1, 4, 7):
        engine.abort(f"{i}")
        idle_in(engine, group, num_steps=2 * num_stages)
        assert idle_in(engine, group, num_steps=20) == [0] * num_stages, "rows left"
    engine.add(request("new", prompt(6), max_tokens=200))
    idle_in(engine, group, num_steps=2 * num_stages)
    assert idle_in(engine, group, num_steps=20) == [0] * num_stages, "rows came"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_a_row_alone_goes_round_without_a_pause(num_stages: int) -> None:
    engine, group = pipeline(num_stages, num_rows=1)
    idle_in(engine, group, num_steps=5)
    began = group.now
    idle_in(engine, group, num_steps=20)
    assert group.now - began == 20 * num_stages


@pytest.mark.parametrize("num_stages", [2, 3])
def test_chunks_of_one_prompt_follow_each_other(num_stages: int) -> None:
    engine, group = pipeline(num_stages, num_rows=1, num_prompt=640, max_num_batched_tokens=16)
    assert idle_in(engine, group, num_steps=30) == [0] * num_stages


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 2), (2, 4), (3, 3), (3, 8), (4, 2)])
def test_gpipe_fills_and_drains(num_stages: int, num_microbatches: int) -> None:
    m, rounds = num_microbatches, 5
    engine, group = pipeline(num_stages, num_rows=11, schedule="gpipe", num_microbatches=m)
    idle_in(engine, group, num_steps=1)  # all prompts at once: a fill of one plan
    began = group.now
    idle_in(engine, group, num_steps=m * rounds)
    assert group.now - began == rounds * (m + num_stages - 1), "the bubble is (p - 1) of m + p - 1 ticks"


def test_gpipe_spreads_its_rows() -> None:
    test = harness(depth=4, num_microbatches=3, schedule="gpipe")
    for i in range(8):
        test.add(request(f"{i}", prompt(6, first=3 + i), max_tokens=30))
    test.step()
    sizes = []
    for _ in range(6):
        plan = test.submit()
        while plan is not None:
            sizes.append(len(plan.slices))
            plan = test.submit()
        test.collect()
    assert [sorted(sizes[:3]), sorted(sizes[3:])] == [[2, 3, 3]] * 2
    finish(test)


# Refusals


def test_a_full_queue_refuses() -> None:
    test = harness(max_num_seqs=2, max_queued=1)
    for i in range(3):
        test.add(request(f"{i}", prompt(6)))
    with pytest.raises(QueueFull, match=r"3 generations wait and 0 run; at most 1 may wait \(--max-queued\)"):
        test.add(request("3", prompt(6)))
    finish(test)
    test.add(request("3", prompt(6)))
    finish(test)


def test_a_queue_of_0_takes_what_can_run() -> None:
    test = harness(max_num_seqs=2, max_queued=0, num_blocks=4)
    test.add(request("0", prompt(12), max_tokens=2))
    test.step()
    test.add(request("1", prompt(12, first=5), max_tokens=2))
    test.step()
    assert test.scheduler.num_waiting == 1, "a slot is free, but no blocks"
    with pytest.raises(QueueFull):
        test.add(request("2", prompt(6)))
    finish(test)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (request("x", []), InvalidRequest, "no tokens"),
        (request("x", [3, VOCAB]), InvalidRequest, f"token id {VOCAB}"),
        (request("x", [3, -1]), InvalidRequest, "token id -1"),
        (request("x", [3, 1.5]), InvalidRequest, "not an integer"),  # type: ignore[list-item]
        (request("x", [3], n=2), InvalidRequest, "n is 2"),
        (request("x", [3], logit_bias={VOCAB: 1.0}), InvalidRequest, "logit_bias"),
        (request("x", [3], stop_token_ids=[VOCAB]), InvalidRequest, "stop_token_ids"),
        (replace(request("x", [3]), tokens=[VOCAB]), InvalidRequest, "tokens holds"),
        (request("x", prompt(40), max_tokens=None), ContextTooLong, "--max-model-len"),
        (request("x", prompt(36), max_tokens=5), ContextTooLong, "together at least 41, above the 40"),
        (request("live", [3]), InvalidRequest, "is live"),
    ],
)
def test_what_could_never_run_is_refused(bad: GenerationRequest, error: type[Exception], message: str) -> None:
    test = harness(max_model_len=40)
    test.add(request("live", prompt(6)))
    with pytest.raises(error, match=message):
        test.scheduler.add(bad)
    finish(test)


def test_what_the_cache_cannot_hold_is_refused() -> None:
    test = harness(num_blocks=5)
    with pytest.raises(ContextTooLong, match=r"above the 20 that fit \(--kv-cache-memory-gb\)"):
        test.add(request("a", prompt(18), max_tokens=5))
    test.add(request("b", prompt(18), max_tokens=None))
    finish(test)
    assert len(test.logs["b"].tokens) == 2
