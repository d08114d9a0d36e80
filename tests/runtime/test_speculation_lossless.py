"""The same answers with guesses and without where clients look: choices, stop strings, log-probabilities with their
alternatives, the end of the context, an end in the middle of right guesses, and an answer taken over at any place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.parallel.grid import Grid
from shoal.runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs
from shoal.runtime.llm import LLM
from shoal.runtime.propose import Ask
from shoal.runtime.stats import Stats

from ..tiny import tiny_model
from .grid_engine import engine_over
from .test_grid import save_tiny
from .test_speculation_engine import VOCAB, converse, guessing

pytestmark = pytest.mark.slow

MAX_LEN = 96
PROMPT = "abcabcabcabcabc"
FIELDS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": MAX_LEN, "max_num_seqs": 4, "block_size": 16,
    "kv_cache_memory_gb": 0.01, "num_threads": 1, "speculative_max_batch": 4,
}  # fmt: skip
WISHES: dict[str, dict[str, Any]] = {
    "choices": {"n": 3, "temperature": 0.9, "seed": 4, "max_tokens": 24},
    "logprobs": {"temperature": 0, "max_tokens": 20, "logprobs": 5, "prompt_logprobs": 2},
    "sampled logprobs": {"temperature": 0.8, "seed": 1, "max_tokens": 20, "logprobs": 3, "presence_penalty": 0.7},
    "to the end of the context": {"temperature": 0.7, "seed": 2, "max_tokens": None, "ignore_eos": True},
    "min_p": {"temperature": 1.3, "min_p": 0.05, "top_p": 0.95, "seed": 8, "max_tokens": 20},
    "a schema": {"temperature": 0.6, "seed": 3, "max_tokens": 40, "repetition_penalty": 1.2,
                 "structured_outputs": StructuredOutputs(json={"type": "array", "items": {"type": "boolean"}})},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), max_len=MAX_LEN)


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **FIELDS) as llm:
        yield llm


@pytest.fixture(scope="module", params=["ngram", "itself"])
def by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def guessed(by: str, model: Path) -> Iterator[LLM]:
    with LLM(str(model), speculative_model=str(model) if by == "itself" else "ngram", **FIELDS) as llm:
        yield llm


def answers(llm: LLM, **wish: Any) -> list[dict[str, Any]]:
    (output,) = llm.generate(PROMPT, SamplingParams(**wish), progress=False)
    return [asdict(choice) for choice in output.outputs]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        logprobs = one.pop("logprobs"), other.pop("logprobs")
        sums = one.pop("cumulative_logprob"), other.pop("cumulative_logprob")
        assert one == other
        assert sums[0] == pytest.approx(sums[1], abs=1e-3)
        for place, there in zip(*(entries or [] for entries in logprobs), strict=True):
            assert list(place) == list(there)
            for token, entry in place.items():
                assert entry["rank"] == there[token]["rank"]
                assert entry["logprob"] == pytest.approx(there[token]["logprob"], abs=1e-4)


@pytest.mark.parametrize("wish", WISHES)
def test_answers_are_the_same(alone: LLM, guessed: LLM, by: str, wish: str) -> None:
    before = guessed.stats().spec_accepted_tokens
    assert_same(answers(guessed, **WISHES[wish]), answers(alone, **WISHES[wish]))
    assert guessed.stats().spec_accepted_tokens > before or by == "ngram"  # which finds little in random answers


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_end_at_the_same_letter(alone: LLM, guessed: LLM, length: int) -> None:
    """The string is one that comes: it may be completed by any guess of a step, or by the token behind them."""
    wish = {"temperature": 0, "max_tokens": 40}
    (whole,) = answers(alone, **wish)
    for at in range(4, 12):
        stop = whole["text"][at : at + length]
        if stop.strip("\ufffd"):
            for included in (False, True):
                stopping = wish | {"stop": [stop], "include_stop_str_in_output": included}
                assert_same(answers(guessed, **stopping), answers(alone, **stopping))


@pytest.mark.parametrize("at", range(3, 12))
def test_an_end_in_the_middle_of_right_guesses(alone: LLM, guessed: LLM, at: int) -> None:
    """Whatever token ends the log, nothing behind it is said."""
    (whole,) = answers(alone, temperature=0, max_tokens=30)
    for wish in ({}, {"min_tokens": at + 2}):
        ending = {"temperature": 0, "max_tokens": 30, "stop_token_ids": [whole["token_ids"][at]], **wish}
        assert_same(answers(guessed, **ending), answers(alone, **ending))


@pytest.mark.parametrize("length", range(MAX_LEN - 7, MAX_LEN))
def test_the_last_places_of_the_context(alone: LLM, guessed: LLM, length: int) -> None:
    prompt = [3, 7] * (length // 2) + [3] * (length % 2)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
    (found,), (expected,) = (llm.generate([prompt], params, progress=False) for llm in (guessed, alone))
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(found.outputs[0].token_ids) == MAX_LEN - length
    assert found.outputs[0].finish_reason == expected.outputs[0].finish_reason == "length"


class Oracle:
    """Guesses the log that is said without guesses, and stop tokens and what stands behind them, too."""

    def __init__(self, log: list[int]) -> None:
        self.log = log

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        return [self.log[len(ask.tokens) :][: ask.most] for ask in asks]

    def follow(self, *_: Any) -> None:
        pass


def test_an_end_that_is_guessed_ends_the_log_as_if_drawn_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", vocab_size=VOCAB)
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=1)
    request = GenerationRequest(id="a", prompt=[5, 6, 7], params=params, seed=1)
    whole = converse(engine_over(folder, Grid()), [request])[0]["a"][0]
    for at in range(1, 9):
        ending = msgspec.structs.replace(params, stop_token_ids=[whole[at]])
        wanted = [msgspec.structs.replace(request, params=ending)]
        expected, _ = converse(engine_over(folder, Grid()), wanted)
        engine = guessing(folder, Grid(), "ngram", num_speculative_tokens=5)
        engine._scheduler._speculation._proposer = Oracle([5, 6, 7, *whole])
        said, _ = converse(engine, wanted)
        assert said["a"][0] == expected["a"][0]
        assert said["a"][2:] == expected["a"][2:]


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 2)], ids=str)
def test_taken_over_at_any_place_it_goes_on_as_it_would_have(grid: Grid, tmp_path: Path) -> None:
    """As a replica with guesses does when it takes over a stream of one without, or the other way round."""
    folder = save_tiny(tmp_path, "llama", vocab_size=VOCAB)
    params = SamplingParams(temperature=0.8, max_tokens=18, repetition_penalty=1.2, min_tokens=9, logprobs=0)
    request = GenerationRequest(id="a", prompt=[5, 6, 7, 5, 6], params=params, seed=77)
    whole = converse(engine_over(folder, Grid()), [request])[0]["a"]
    resumed = [msgspec.structs.replace(request, id=str(at), tokens=whole[0][:at]) for at in range(1, len(whole[0]), 3)]
    stats: Stats
    said, stats = converse(guessing(folder, grid, folder), resumed)
    assert {tuple(tokens) for tokens, *_ in said.values()} == {tuple(whole[0])}
    assert stats.spec_accepted_tokens > 0
