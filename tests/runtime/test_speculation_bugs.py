"""Tests the tests of guessing: bugs put into it on purpose, each of which the scheduler's state machine must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shoal.runtime import plan as plan_module
from shoal.runtime import scheduler as scheduler_module
from shoal.runtime import speculation as speculation_module
from shoal.runtime.blocks import BlockNames
from shoal.runtime.outline import Outline
from shoal.runtime.plan import Drawn, drawn_by
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Sequence
from shoal.runtime.speculation import Speculation

from .test_planted_bugs import Patch, around, hunt
from .test_scheduler_machine import SchedulerMachine

BUGS: list[Callable[[Patch], None]] = []


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BUGS.append(plant)
    return plant


@bug
def one_guess_too_many_is_accepted(patch: Patch) -> None:
    accepted = plan_module.num_accepted
    patch.setattr(plan_module, "num_accepted", lambda drafts, drawn: min(accepted(drafts, drawn) + 1, len(drafts)))


@bug
def guesses_are_said_without_being_drawn(patch: Patch) -> None:
    def drawn(plan, result):  # type: ignore[no-untyped-def]
        for part, found in zip(plan.slices, drawn_by(plan, result), strict=True):
            yield ([*plan.drafts[part.slot], found[0][-1]], None) if part.slot in plan.drafts else found

    patch.setattr(scheduler_module, "drawn_by", drawn)


@bug
def wrong_guesses_count_as_computed(patch: Patch) -> None:
    def append(original, self, seq, drawn):  # type: ignore[no-untyped-def]
        known, num_drafts = len(seq.tokens), seq.num_guesses
        original(self, seq, drawn)
        if num_drafts and seq.slot >= 0:
            seq.num_computed = min(known + num_drafts, len(seq.tokens))

    around(patch, Scheduler, "_append", append)


@bug
def guessed_tokens_name_a_block(patch: Patch) -> None:
    def extend(original, self, outline, pool, *, num_running):  # type: ignore[no-untyped-def]
        original(self, outline, pool, num_running=num_running)
        for seq, _ in outline.single_rows:
            tokens = [*seq.tokens, *outline.drafts.get(seq.slot, [])]
            names = BlockNames(tokens, salt=seq.names._salt, block_size=pool.block_size)
            for index in range(seq.num_published, len(tokens) // pool.block_size):
                pool.publish(seq.blocks[index], names[index])

    around(patch, Speculation, "extend", extend)


@bug
def all_guesses_get_the_first_mask(patch: Patch) -> None:
    around(
        patch,
        Outline,
        "guess",
        lambda original, self, i, drafts, masks: original(self, i, drafts, masks[:1] * len(masks)),
    )


@bug
def masks_lag_behind_by_one(patch: Patch) -> None:
    def guess(original, self, index, drafts, masks):  # type: ignore[no-untyped-def]
        slot = self.singles[index].slot
        original(self, index, drafts, [self.masks[slot], *masks[:-1]] if masks else [])

    around(patch, Outline, "guess", guess)


@bug
def a_grammar_is_not_asked(patch: Patch) -> None:
    patch.setattr(speculation_module, "_allowed", lambda seq, drafts: (drafts, []))


@bug
def guesses_cost_no_budget(patch: Patch) -> None:
    def guess(original, self, index, drafts, masks):  # type: ignore[no-untyped-def]
        budget = self.budget
        original(self, index, drafts, masks)
        self.budget = budget

    around(patch, Outline, "guess", guess)


@bug
def guesses_have_no_blocks(patch: Patch) -> None:
    patch.setattr(speculation_module, "_room", lambda outline, seq, most, **rest: most)


@bug
def blocks_for_guesses_are_not_told(patch: Patch) -> None:
    def room(outline, seq, most, **rest):  # type: ignore[no-untyped-def]
        told = list(outline.blocks)
        found = original(outline, seq, most, **rest)
        outline.blocks[:] = told
        return found

    original = speculation_module._room
    patch.setattr(speculation_module, "_room", room)


@bug
def a_guess_does_not_wait_for_the_last_token(patch: Patch) -> None:
    patch.setattr(
        speculation_module, "_is_ready", lambda seq: seq.num_pending > 0 and (seq.free or seq.mask is not None)
    )
    patch.setattr(Scheduler, "_is_ready", lambda self, seq: True)


@bug
def a_guess_does_not_wait_for_the_last_chunk(patch: Patch) -> None:
    def is_ready(seq: Sequence) -> bool:
        return seq.num_pending == 1 and (seq.free or seq.mask is not None)

    patch.setattr(speculation_module, "_is_ready", is_ready)


@bug
def guesses_go_past_the_end(patch: Patch) -> None:
    def extend(original, self, outline, pool, *, num_running):  # type: ignore[no-untyped-def]
        seqs = [seq for seq, _ in outline.single_rows]
        for seq in seqs:
            seq.limit += 2
        original(self, outline, pool, num_running=num_running)
        for seq in seqs:
            seq.limit -= 2

    around(patch, Speculation, "extend", extend)


@bug
def what_comes_behind_the_end_is_said(patch: Patch) -> None:
    def take(original, self, drawn):  # type: ignore[no-untyped-def]
        ending = original(self, drawn)
        if ending is not None and drawn[-1] not in self.tokens[-len(drawn) :]:
            self.tokens.append(drawn[-1])
        return ending

    around(patch, Sequence, "take", take)


@bug
def all_tokens_of_a_step_get_the_last_ones_logprob(patch: Patch) -> None:
    def drawn(plan, result) -> Iterator[Drawn]:  # type: ignore[no-untyped-def]
        for tokens, logprobs in drawn_by(plan, result):
            yield tokens, logprobs and logprobs[-1:] * len(tokens)

    patch.setattr(scheduler_module, "drawn_by", drawn)


@bug
def what_fails_behind_a_wrong_guess_ends_the_log(patch: Patch) -> None:
    def drawn(plan, result) -> Iterator[Drawn]:  # type: ignore[no-untyped-def]
        found = list(drawn_by(plan, result))
        for index, part in enumerate(plan.slices):
            if part.slot in plan.drafts and -1 in result.tokens:
                found[index] = ([*found[index][0], -1], found[index][1])
        yield from found

    patch.setattr(scheduler_module, "drawn_by", drawn)


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_machine_notices(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises((Exception, ExceptionGroup)):
        hunt(SchedulerMachine)
