"""What rows ask for beyond the fused draw; each row alone."""

import math

import numpy as np
import pytest
import torch

from shoal.kernels.reference import ReferenceOps
from shoal.runtime.batch import SequenceTable
from shoal.runtime.generation import SamplingParams
from shoal.runtime.plan import Admission, Slice, StepPlan
from shoal.runtime.sampler import Sampled, Sampler

V = 40
CPU = torch.device("cpu")


class Rank:
    """A table and a sampler over given logits: every sequence draws one token a step."""

    def __init__(self) -> None:
        self.sampler = Sampler(ReferenceOps(CPU), V)
        self.table = SequenceTable(num_slots=8, max_model_len=32, block_size=16)
        self.lengths: list[int] = []

    def admit(self, *requests: tuple[list[int], int, SamplingParams], stop: tuple[int, ...] = ()) -> None:
        for slot, (tokens, prompt_len, params) in enumerate(requests):
            admission = Admission(slot, tokens, prompt_len, params, 11, list(stop))
            self.table.apply(StepPlan(0, [admission], [(slot, [0, 1])], []))
            self.sampler.admit(admission)
            self.lengths.append(len(tokens))

    def draw(self, logits: torch.Tensor, masks: dict[int, bytes] | None = None) -> Sampled:
        slices = [Slice(slot, length - 1, 1, True) for slot, length in enumerate(self.lengths)]
        self.lengths = [length + 1 for length in self.lengths]
        return self.sampler.sample(logits.clone(), self.table.batch(slices), StepPlan(1, [], [], slices, masks or {}))


def greedy(**extra: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **extra)  # type: ignore[arg-type]


def falling() -> torch.Tensor:
    """Logits that prefer low ids: 0 is the greedy choice."""
    return torch.arange(V, 0, -1, dtype=torch.float32) / 4


def test_logit_bias_bans_and_forces_only_its_own_row() -> None:
    rank = Rank()
    rank.admit(
        ([1, 2], 2, greedy(logit_bias={0: -100.0})), ([1, 2], 2, greedy(logit_bias={30: 100.0})), ([1], 1, greedy())
    )
    assert rank.draw(falling().repeat(3, 1)).tokens == [1, 30, 0]


def test_min_tokens_masks_stop_tokens_until_enough_are_there() -> None:
    rank = Rank()
    rank.admit(([1, 2], 2, greedy(min_tokens=2, max_tokens=5)), stop=(0, 1))
    drawn = [rank.draw(falling()[None]).tokens[0] for _ in range(3)]
    assert drawn == [2, 2, 0]


def test_penalties_follow_the_log_and_are_rebuilt_from_it() -> None:
    params = greedy(frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.1)
    whole = Rank()
    whole.admit(([3, 9], 2, params))
    logits = [torch.randn(1, V, generator=torch.Generator().manual_seed(i)) * 2 + falling() / 3 for i in range(8)]
    undisturbed = [whole.draw(x).tokens[0] for x in logits]
    resumed = Rank()
    resumed.admit(([3, 9, *undisturbed[:4]], 2, params))
    assert [resumed.draw(x).tokens[0] for x in logits[4:]] == undisturbed[4:]


def test_penalties_equal_their_definition() -> None:
    rank = Rank()
    params = greedy(frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.3, logprobs=1)
    prompt, output = [4, 5], [6, 6, 7]
    rank.admit(([*prompt, *output], 2, params))
    raw = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    expected = raw[0].clone()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        expected[token] -= 0.7 * output.count(token) + 0.3
    drawn = rank.draw(raw)
    assert drawn.tokens == [int(expected.argmax())]
    assert drawn.logprobs is not None
    assert drawn.logprobs[0] is not None
    assert drawn.logprobs[0].logprob == pytest.approx(float(raw[0].log_softmax(-1)[drawn.tokens[0]]), rel=1e-5)


def test_a_mask_admits_only_its_tokens() -> None:
    rank = Rank()
    rank.admit(([1], 1, greedy()), ([1], 1, greedy()))
    allowed = np.zeros(64, np.uint8)
    allowed[[17, 23]] = 1
    assert rank.draw(falling().repeat(2, 1), {1: np.packbits(allowed, bitorder="little").tobytes()}).tokens == [0, 17]


def test_a_row_with_nan_fails_alone() -> None:
    rank = Rank()
    rank.admit(([1], 1, greedy()), ([1], 1, SamplingParams()), ([1], 1, greedy(frequency_penalty=1.0)))
    logits = falling().repeat(3, 1)
    logits[1, 5] = math.nan
    tokens = rank.draw(logits).tokens
    assert (tokens[0], tokens[1], tokens[2]) == (0, -1, 0)


def test_logprobs_only_for_rows_that_ask_and_as_many_as_they_ask() -> None:
    rank = Rank()
    rank.admit(([1], 1, greedy(logprobs=2)), ([1], 1, greedy()), ([1], 1, greedy(logprobs=0)))
    drawn = rank.draw(falling().repeat(3, 1))
    assert drawn.logprobs is not None
    first, none, chosen_only = drawn.logprobs
    assert first is not None
    assert [token for token, _ in first.top] == [0, 1]
    assert first.rank == 1
    assert none is None
    assert chosen_only is not None
    assert chosen_only.top == []


def test_a_slot_forgets_whoever_held_it() -> None:
    rank = Rank()
    rank.admit(([1], 1, greedy(logit_bias={0: -100.0}, logprobs=1)))
    rank.lengths.clear()
    rank.admit(([1], 1, greedy()))
    drawn = rank.draw(falling()[None])
    assert (drawn.tokens, drawn.logprobs) == ([0], None)
