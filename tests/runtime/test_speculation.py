"""Guesses: where they come from, what they may take, and when they stop. `test_scheduler_machine.py` mixes it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernels.native import load_native
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.select import select_ops
from shoal.runtime.batch import SequenceTable
from shoal.runtime.build_speculation import plan_draft
from shoal.runtime.config import EngineConfig
from shoal.runtime.errors import ConfigError
from shoal.runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs
from shoal.runtime.grammar import GrammarCompiler
from shoal.runtime.loader import load_decoder
from shoal.runtime.memory import workspace_bytes
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.plan import Admission, Slice, StepPlan, StepResult, drawn_by
from shoal.runtime.propose import Ask
from shoal.runtime.propose_ngram import NgramProposer, PairIndex
from shoal.runtime.rank import open_checkpoint
from shoal.runtime.sampler import Sampler
from shoal.runtime.sequence import Limits
from shoal.runtime.speculation import REST

from ..tiny import EOS as BYTE_EOS
from ..tiny import byte_text
from .fakes import VOCAB, Stepwise
from .harness import Harness
from .test_gguf import reference_model, write_model
from .test_grid import save_tiny

CPU = torch.device("cpu")


@dataclass
class Fixed:
    """Guesses what the logs will say, or never does: `right` of each row's guesses, and then a wrong one."""

    harness: Harness
    right: int
    asked: list[int] = field(default_factory=list)

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        self.asked.append(len(asks))
        return [self._guess(ask) for ask in asks]

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        pass

    def _guess(self, ask: Ask) -> list[int]:
        (seq,) = [seq for seq in self.harness.scheduler._running if seq.slot == ask.slot]
        log = self.harness.logs[seq.request.id]
        future = self.harness.outcome(log).tokens[len(log.tokens) :]
        if self.right < len(future):
            future[self.right] = (future[self.right] + 1) % VOCAB
        return future[: ask.most]


def harness(right: int, *, num_blocks: int = 100, max_guessed: int = 8, **changes: object) -> Harness:
    fields = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_queued": 99, "vocab_size": VOCAB, **changes}
    limits = Limits(max_model_len=300, **fields)  # type: ignore[arg-type]
    made = Harness(limits, num_blocks=num_blocks, block_size=4, num_guesses=4, max_guessed=max_guessed)
    made.scheduler._speculation._proposer = Fixed(made, right)
    return made


def request(name: str, *, num: int = 6, max_tokens: int = 20, **params: object) -> GenerationRequest:
    chosen = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)  # type: ignore[arg-type]
    return GenerationRequest(id=name, prompt=[2 + i % 20 for i in range(num)], params=chosen, seed=1)


def finish(test: Harness) -> int:
    """Steps until all logs have ended as they should."""
    steps = 0
    while test.scheduler.has_work:
        test.step()
        test.check()
        steps += 1
    test.check_at_rest()
    return steps


# What guesses bring


def test_right_guesses_save_steps_and_are_counted() -> None:
    test = harness(right=99)
    test.add(request("a", max_tokens=21, logprobs=0))
    assert finish(test) == 1 + 20 // 5
    counters = test.scheduler.counters
    assert (counters.spec_drafts, counters.spec_drafted_tokens, counters.spec_accepted_tokens) == (4, 16, 16)
    assert counters.generation_tokens == 21


def test_a_row_goes_on_with_what_was_drawn_in_place_of_a_wrong_guess() -> None:
    test = harness(right=2)
    test.add(request("a", max_tokens=16))
    assert finish(test) == 1 + 15 // 3


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_guesses_end_with_the_log(max_tokens: int) -> None:
    test = harness(right=99)
    test.add(request("a", max_tokens=max_tokens))
    finish(test)
    assert test.scheduler.counters.spec_accepted_tokens <= max(0, max_tokens - 2)


def test_whoever_is_guessed_at_in_vain_rests_and_gets_another_chance() -> None:
    test = harness(right=0)
    test.add(request("a", max_tokens=120))
    finish(test)
    counters = test.scheduler.counters
    assert counters.spec_accepted_tokens == 0
    assert 120 // REST <= counters.spec_drafts <= 4 + 120 // REST


def test_with_many_running_nobody_is_guessed_at() -> None:
    test = harness(right=99, max_guessed=2)
    for i in range(3):
        test.add(request(f"{i}", max_tokens=20))
    for _ in range(8):
        test.step()
    assert test.scheduler.counters.spec_drafts == 0
    test.abort("1")
    finish(test)
    assert test.scheduler.counters.spec_drafts > 0


def test_a_row_with_guesses_waits_for_its_result_though_others_have_come_meanwhile() -> None:
    test = harness(right=99, max_guessed=1)
    test.depth = 3
    test.add(request("a", max_tokens=60))
    while test.scheduler.counters.spec_drafts < 2:
        test.step()
    assert test.submit() is not None, "with guesses"
    test.add(request("b", max_tokens=9))
    assert test.submit() is not None, "which lets b in"
    test.submit()
    finish(test)


# What they may take


def test_guesses_take_no_block_that_somebody_may_need() -> None:
    """Five blocks of four, two sequences of seven tokens: what is left is less than one for each of them."""
    test = harness(right=99, num_blocks=5)
    test.add(request("a", num=7, max_tokens=3))
    test.add(request("b", num=7, max_tokens=3))
    finish(test)
    assert test.scheduler.counters.preemptions == 0


def test_guesses_take_what_the_budget_has_left_when_every_row_has_its_token() -> None:
    test = harness(right=99, max_num_batched_tokens=5)
    for i in range(3):
        test.add(request(f"{i}", num=1, max_tokens=30))
    while test.scheduler.has_work:
        plan = test.step()
        test.check()
        if plan is not None and plan.drafts:
            assert len(plan.slices) == 3 or test.scheduler.num_running < 3
    test.check_at_rest()
    assert test.scheduler.counters.spec_drafts > 0


def test_a_grammar_cuts_guesses_and_masks_each_of_them() -> None:
    test = harness(right=99)
    test.add(request("a", max_tokens=17), Stepwise(period=3))
    assert finish(test) < 17
    assert test.scheduler.counters.spec_accepted_tokens > 0


# N-grams


def test_the_guess_is_what_followed_the_longest_and_latest_repeat() -> None:
    index = PairIndex()
    assert index.guess([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 3) == [9, 2, 3], "1 2 3 agrees longer than the later 2 3"
    assert PairIndex().guess([2, 3, 9, 2, 3, 7, 8, 2, 3], 2) == [7, 8], "of equals the latest"
    assert PairIndex().guess([1, 2, 3, 4], 2) == []
    assert PairIndex().guess([5], 2) == []


def test_a_log_that_goes_in_circles_is_guessed_to_go_on_so() -> None:
    assert PairIndex().guess([1, 8, 8, 8], 4) == [8, 8, 8, 8]
    assert PairIndex().guess([1, 2, 3, 1, 2, 3], 5) == [1, 2, 3, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5))
def test_an_index_that_grows_with_the_log_guesses_as_one_made_at_once(tokens: list[int], most: int) -> None:
    index, log = PairIndex(), list[int]()
    for token in tokens:
        log.append(token)
        grown = index.guess(log, most)
        assert grown == PairIndex().guess(list(log), most)
        assert len(grown) in (0, most)


def test_a_slots_next_holder_has_an_index_of_its_own() -> None:
    proposer = NgramProposer()
    assert proposer.propose([Ask(0, [1, 2, 9, 1, 2], [0], 1)]) == [[9]]
    proposer.follow(StepPlan(0, [Admission(0, [1, 2], 2, SamplingParams(), 1, [])], [], []), StepResult(0, []))
    assert proposer.propose([Ask(0, [1, 2], [0], 1)]) == [[]]


# On a rank


def test_guesses_are_rows_that_see_what_stands_before_them() -> None:
    table = SequenceTable(num_slots=2, max_model_len=64, block_size=16)
    tokens = [Admission(slot, [10 + slot] * 20, 20, SamplingParams(temperature=0), 3, []) for slot in (0, 1)]
    table.apply(StepPlan(0, tokens, [(0, [4, 5]), (1, [6, 7])], []))
    batch = table.batch([Slice(0, 19, 3, True), Slice(1, 0, 8, False)], {0: [77, 78]})
    assert batch.token_ids_T.tolist() == [10, 77, 78, *[11] * 8]
    assert batch.positions_T.tolist() == [19, 20, 21, *range(8)]
    assert batch.attention.kv_lens == (20, 21, 22, 8)
    assert batch.attention.block_table_SP.tolist() == [[4, 5]] * 3 + [[6, 7]]
    assert (batch.attention.num_decodes, batch.attention.query_lens) == (3, (1, 1, 1, 8))
    assert (batch.rows_R.tolist(), batch.slots, batch.next_positions.tolist()) == ([0, 1, 2], [0, 0, 0], [20, 21, 22])


@pytest.mark.parametrize("right", [0, 1, 2])
def test_penalties_and_minimum_lengths_count_the_guesses_before_a_row(right: int) -> None:
    """Against the same log drawn a token at a time, from the same logits."""
    params = SamplingParams(
        temperature=0, repetition_penalty=1.2, frequency_penalty=0.9, presence_penalty=0.4, min_tokens=3, max_tokens=9
    )
    admission = Admission(0, [3, 3, 4], 3, params, 5, [7])
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    logits[:, 7] += 2  # the stop token, which may not come before the fourth

    def rank() -> tuple[Sampler, SequenceTable]:
        sampler = Sampler(ReferenceOps(CPU), 12)
        table = SequenceTable(num_slots=1, max_model_len=32, block_size=16)
        table.apply(StepPlan(0, [admission], [(0, [0])], []))
        sampler.admit(admission)
        return sampler, table

    sampler, table = rank()
    expected = []
    for step in range(4):
        plan = StepPlan(step, [], [], [Slice(0, 2 + step, 1, True)])
        expected += sampler.sample(logits[step : step + 1].clone(), table.batch(plan.slices), plan).tokens
    sampler, table = rank()
    drafts = expected[:2]
    drafts[right:] = [(token + 1) % 12 for token in drafts[right:]]
    plan = StepPlan(0, [], [], [Slice(0, 2, 3, True)], drafts={0: drafts})
    drawn = sampler.sample(logits[:3].clone(), table.batch(plan.slices, plan.drafts), plan).tokens
    ((kept, _),) = drawn_by(plan, StepResult(0, drawn))
    assert kept == expected[: right + 1]
    for step in range(right + 1, 4):  # what was not kept has left no trace
        plan = StepPlan(step, [], [], [Slice(0, 2 + step, 1, True)])
        assert sampler.sample(logits[step : step + 1].clone(), table.batch(plan.slices), plan).tokens == [
            expected[step]
        ]


# Grammars


def test_looking_ahead_gives_the_masks_of_saying_it_and_says_nothing() -> None:
    compiler = GrammarCompiler(byte_text(), 300, (BYTE_EOS,))
    spec = StructuredOutputs(regex="ab[0-9]{2,3}c")
    constraint, walked = compiler.constraint(spec), compiler.constraint(spec)
    before = constraint.mask()
    masks = constraint.look_ahead([*b"ab7x1"])
    expected = []
    for byte in b"ab7":
        walked.advance(byte)
        expected.append(walked.mask())
    assert masks == expected, "up to the first that is not allowed"
    assert constraint.mask() == before
    assert len(constraint.look_ahead([*b"ab77c"])) == 4, "up to the one that ends the text"


# Configuration


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    model, other = save_tiny(tmp_path / "a", "llama"), save_tiny(tmp_path / "b", "llama", vocab_size=90)
    short = save_tiny(tmp_path / "c", "llama", max_position_embeddings=32)
    spec = ModelSpec.from_config(open_checkpoint(model).config)
    fields = {"model": str(model), "device": "cpu", "dtype": "float32", "max_model_len": 64}
    with pytest.raises(ConfigError, match=r"90 tokens and .* 101"):
        plan_draft(EngineConfig(**fields, speculative_model=str(other)), spec)
    with pytest.raises(ConfigError, match=r"32 positions, below the 64 of --max-model-len"):
        plan_draft(EngineConfig(**fields, speculative_model=str(short)), spec)
    assert plan_draft(EngineConfig(**fields, speculative_model="ngram"), spec) is None


def test_a_quantised_model_is_counted_as_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", reference_model("llama"), GGMLQuantizationType.Q4_1)
    spec = ModelSpec.from_config(open_checkpoint(path).config)
    fields = {"model": str(path), "device": "cpu", "dtype": "bfloat16", "max_model_len": 64}
    config = EngineConfig(**fields, speculative_model=str(path))
    draft = plan_draft(config, spec)
    assert draft is not None
    planned = draft.fixed_bytes - workspace_bytes(draft.share, config, torch.bfloat16)
    loaded = load_decoder(open_checkpoint(path), spec, ops=select_ops(CPU), dtype=torch.bfloat16).weight_bytes
    assert planned == pytest.approx(loaded, rel=0.15)  # tiny matrices are padded to whole tiles
    if load_native() is not None:
        assert planned < 0.6 * 2 * draft.share.num_weights()
