"""Tests the tests: bugs put into the scheduler and the pool on purpose, each of which the state machine must notice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from shoal.runtime import scheduler as scheduler_module
from shoal.runtime.blocks import BlockNames, BlockPool
from shoal.runtime.outline import Outline
from shoal.runtime.quarantine import Quarantine, Verdict
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Sequence

from .test_scheduler_machine import RecoveryMachine, SchedulerMachine

Patch = pytest.MonkeyPatch
BUGS: list[Callable[[Patch], None]] = []
RECOVERY_BUGS: list[Callable[[Patch], None]] = []


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BUGS.append(plant)
    return plant


def recovery_bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    RECOVERY_BUGS.append(plant)
    return plant


def around(patch: Patch, cls: type, name: str, wrapper: Callable[..., object]) -> None:
    """Replace a method by `wrapper(original, self, *args)`."""
    original = getattr(cls, name)
    patch.setattr(cls, name, lambda self, *args, **kwargs: wrapper(original, self, *args, **kwargs))


# Names of blocks


@bug
def the_salt_is_dropped(patch: Patch) -> None:
    patch.setattr(scheduler_module, "tenant_salt", lambda secret, tenant: b"")


@bug
def a_name_leaves_out_the_last_token(patch: Patch) -> None:
    def name(self: BlockNames, index: int) -> bytes:
        return hashlib.sha256(self._salt + repr(self._tokens[: (index + 1) * self._size - 1]).encode()).digest()

    patch.setattr(BlockNames, "__getitem__", name)


@bug
def a_name_leaves_out_what_came_before(patch: Patch) -> None:
    def name(self: BlockNames, index: int) -> bytes:
        content = self._tokens[index * self._size : (index + 1) * self._size]
        return hashlib.sha256(self._salt + repr(content).encode()).digest()

    patch.setattr(BlockNames, "__getitem__", name)


# The pool


@bug
def a_match_takes_no_reference(patch: Patch) -> None:
    def match(original, self, digests):  # type: ignore[no-untyped-def]
        found = original(self, digests)
        for block in found[:1]:
            self._references[block] -= 1
        return found

    around(patch, BlockPool, "match", match)


@bug
def a_match_leaves_the_block_free(patch: Patch) -> None:
    def match(original, self, digests):  # type: ignore[no-untyped-def]
        cached = dict(self._cached)
        found = original(self, digests)
        self._cached.update((block, None) for block in found if block in cached)
        return found

    around(patch, BlockPool, "match", match)


@bug
def eviction_takes_a_held_block(patch: Patch) -> None:
    def evict(original, self):  # type: ignore[no-untyped-def]
        held = [block for block in self._by_digest.values() if self._references[block]]
        if not held:
            return original(self)
        self._forget(held[0])
        return held[0]

    around(patch, BlockPool, "_evict", evict)


@bug
def eviction_keeps_the_name(patch: Patch) -> None:
    patch.setattr(BlockPool, "_evict", lambda self: self._cached.popitem(last=False)[0])


@bug
def blocks_are_released_twice(patch: Patch) -> None:
    def release(original, self, blocks):  # type: ignore[no-untyped-def]
        original(self, blocks)
        self._blank.extend(block for block in blocks[-1:] if not self._references[block])

    around(patch, BlockPool, "release", release)


@bug
def a_second_block_takes_the_name(patch: Patch) -> None:
    def publish(original, self, block, digest):  # type: ignore[no-untyped-def]
        self._by_digest[digest] = block
        self._digests[block] = digest

    around(patch, BlockPool, "publish", publish)


# The scheduler


@bug
def a_block_is_published_before_it_is_full(patch: Patch) -> None:
    def publish(original, self, seq):  # type: ignore[no-untyped-def]
        original(self, seq)
        for index in range(seq.num_published, min(len(seq.blocks), len(seq.tokens) // self.pool.block_size)):
            self.pool.publish(seq.blocks[index], seq.names[index])

    around(patch, Scheduler, "_publish", publish)


@bug
def the_last_token_is_taken_from_the_cache(patch: Patch) -> None:
    def first(original, self, count):  # type: ignore[no-untyped-def]
        return original(self, len(self._tokens) // self._size)

    around(patch, BlockNames, "first", first)


@bug
def the_budget_is_ignored(patch: Patch) -> None:
    def advance(original, self, seq, num_tokens):  # type: ignore[no-untyped-def]
        budget = self.budget
        original(self, seq, num_tokens)
        self.budget = budget

    around(patch, Outline, "advance", advance)


@bug
def long_slices_go_first(patch: Patch) -> None:
    def plan(original, self):  # type: ignore[no-untyped-def]
        self.singles, self.chunks = self.chunks, self.singles
        self.single_rows, self.chunk_rows = self.chunk_rows, self.single_rows
        return original(self)

    around(patch, Outline, "plan", plan)


@bug
def growth_comes_a_token_late(patch: Patch) -> None:
    def grow(original, self, outline, seq):  # type: ignore[no-untyped-def]
        late = seq.num_computed == len(seq.blocks) * self.pool.block_size and self.pool.num_free > 1
        return True if late else original(self, outline, seq)

    around(patch, Scheduler, "_grow", grow)


@bug
def the_slot_is_not_given_back(patch: Patch) -> None:
    def leave(original, self, seq):  # type: ignore[no-untyped-def]
        original(self, seq)
        if len(self._free_slots) > 1:
            self._free_slots.pop()

    around(patch, Scheduler, "_leave_slot", leave)


@bug
def an_abort_keeps_its_blocks(patch: Patch) -> None:
    def abort(original, self, request_id):  # type: ignore[no-untyped-def]
        seq = self._live.get(request_id)
        if seq is not None:
            seq.blocks = []
        return original(self, request_id)

    around(patch, Scheduler, "abort", abort)


@bug
def an_abort_leaves_it_in_the_queue(patch: Patch) -> None:
    def abort(original, self, request_id):  # type: ignore[no-untyped-def]
        waiting = list(self._waiting)
        event = original(self, request_id)
        self._waiting = waiting
        return event

    around(patch, Scheduler, "abort", abort)


@bug
def preemption_drops_what_was_said(patch: Patch) -> None:
    def preempt(original, self, seq):  # type: ignore[no-untyped-def]
        del seq.tokens[seq.prompt_len :]
        original(self, seq)

    around(patch, Scheduler, "_preempt", preempt)


@bug
def preemption_puts_it_at_the_end(patch: Patch) -> None:
    def preempt(original, self, seq):  # type: ignore[no-untyped-def]
        original(self, seq)
        seq.key = (seq.key[0], next(self._arrivals))
        self._waiting.sort(key=lambda waiting: waiting.key)

    around(patch, Scheduler, "_preempt", preempt)


@bug
def preemption_forgets_to_compute_again(patch: Patch) -> None:
    def leave(original, self):  # type: ignore[no-untyped-def]
        computed = self.num_computed
        original(self)
        self.num_computed = computed

    around(patch, Sequence, "leave", leave)


@bug
def results_from_before_a_preemption_count(patch: Patch) -> None:
    def leave(original, self):  # type: ignore[no-untyped-def]
        original(self)
        self.epoch -= 1

    around(patch, Sequence, "leave", leave)


@bug
def a_constrained_row_does_not_wait_for_its_token(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_ready", lambda self, seq: True)


@bug
def one_token_too_many(patch: Patch) -> None:
    def create(original, self, request, constraint, limit):  # type: ignore[no-untyped-def]
        return original(self, request, constraint, limit + 1)

    around(patch, Scheduler, "_sequence", create)


@bug
def deadlines_pass_unseen(patch: Patch) -> None:
    patch.setattr(Scheduler, "_expire", lambda self: None)


@bug
def prompt_logprobs_are_lost_to_the_cache(patch: Patch) -> None:
    patch.setattr(Sequence, "reads_prompt_logprobs", False)


@bug
def the_head_of_the_queue_is_passed_by(patch: Patch) -> None:
    def rest(original, self, outline, behind):  # type: ignore[no-untyped-def]
        self._waiting.reverse()
        original(self, outline, behind)
        self._waiting.sort(key=lambda seq: seq.key)

    around(patch, Scheduler, "_plan_rest", rest)


# Recovery


@recovery_bug
def names_outlive_the_cache(patch: Patch) -> None:
    patch.setattr(BlockPool, "reset", lambda self: None)


@recovery_bug
def computed_tokens_outlive_the_cache(patch: Patch) -> None:
    def leave(original, self):  # type: ignore[no-untyped-def]
        computed = self.num_computed
        original(self)
        self.num_computed = computed

    around(patch, Sequence, "leave", leave)


@recovery_bug
def lost_plans_stay_in_flight(patch: Patch) -> None:
    def recover(original, self, *, is_suspect, slots=()):  # type: ignore[no-untyped-def]
        flights = list(self._flights)
        verdict = original(self, is_suspect=is_suspect, slots=slots)
        self._flights.extend(flights)
        return verdict

    around(patch, Scheduler, "recover", recover)


@recovery_bug
def lost_tokens_stay_pending(patch: Patch) -> None:
    def leave(original, self):  # type: ignore[no-untyped-def]
        pending = self.num_pending
        original(self)
        self.num_pending = pending

    around(patch, Sequence, "leave", leave)


@recovery_bug
def a_restart_drops_what_was_said(patch: Patch) -> None:
    def put_back(original, self, seq):  # type: ignore[no-untyped-def]
        del seq.tokens[seq.prompt_len :]
        original(self, seq)

    around(patch, Scheduler, "_put_back", put_back)


@recovery_bug
def a_plain_kill_makes_suspects(patch: Patch) -> None:
    def judge(original, self, flights, *, is_suspect, **rest):  # type: ignore[no-untyped-def]
        return original(self, flights, is_suspect=True, **rest)

    around(patch, Quarantine, "judge", judge)


@recovery_bug
def nobody_is_ever_a_suspect(patch: Patch) -> None:
    def judge(original, self, flights, *, is_suspect, **rest):  # type: ignore[no-untyped-def]
        return original(self, flights, is_suspect=False, **rest)

    around(patch, Quarantine, "judge", judge)


@recovery_bug
def all_suspects_are_guilty(patch: Patch) -> None:
    def judge(original, self, flights, **rest):  # type: ignore[no-untyped-def]
        guilty, suspects = original(self, flights, **rest)
        return Verdict([*guilty, *suspects], [])

    around(patch, Quarantine, "judge", judge)


@recovery_bug
def rows_that_are_named_are_not_heard(patch: Patch) -> None:
    def judge(original, self, flights, *, slots, **rest):  # type: ignore[no-untyped-def]
        return original(self, flights, slots=(), **rest)

    around(patch, Quarantine, "judge", judge)


@recovery_bug
def a_suspect_is_cleared_after_one_token(patch: Patch) -> None:
    def judge(original, self, flights, **rest):  # type: ignore[no-untyped-def]
        verdict = original(self, flights, **rest)
        self._places.update((seq, len(seq.tokens) + 1) for seq in verdict.suspects)
        return verdict

    around(patch, Quarantine, "judge", judge)


@recovery_bug
def a_suspect_is_cleared_at_once(patch: Patch) -> None:
    def release(original, self):  # type: ignore[no-untyped-def]
        return [self._places.popitem()[0]] if self.suspect and self.suspect.slot >= 0 else []

    around(patch, Quarantine, "release", release)


@recovery_bug
def a_cleared_suspect_keeps_its_blocks(patch: Patch) -> None:
    def release(original, self):  # type: ignore[no-untyped-def]
        original(self)
        return []

    around(patch, Quarantine, "release", release)


@recovery_bug
def an_ended_suspect_stays_in_quarantine(patch: Patch) -> None:
    patch.setattr(Quarantine, "discharge", lambda self, seq: None)


def hunt(machine: type[SchedulerMachine]) -> None:
    """Raises what the machine notices, if it does."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=4000,  # hypothesis biases what it draws by the modules that are loaded: one may need luck
            stateful_step_count=30,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_machine_notices(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises((Exception, ExceptionGroup)):
        hunt(SchedulerMachine)


@pytest.mark.parametrize("plant", RECOVERY_BUGS, ids=lambda plant: plant.__name__)
def test_the_machine_that_fails_notices(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises((Exception, ExceptionGroup)):
        hunt(RecoveryMachine)
