"""The same log with guesses and without: whole engines over real, tiny models in float32, alone and over grids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from shoal.parallel.grid import Grid
from shoal.runtime.build import build_replica
from shoal.runtime.build_speculation import plan_draft
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs, TokenLogprob
from shoal.runtime.grammar import FREE, Constraint, GrammarCompiler
from shoal.runtime.memory import plan_memory
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.rank import RankSpec, open_checkpoint, plan_beside_draft
from shoal.runtime.share import deal
from shoal.runtime.stats import Stats

from ..tiny import EOS, byte_text
from .grid_engine import engine_over
from .test_grid import save_tiny

VOCAB = 300
COMPILER = GrammarCompiler(byte_text(), VOCAB, (EOS,))
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
WISHES: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 30, "logprobs": 2},
    {"temperature": 1.0, "max_tokens": 26},
    {"temperature": 0.8, "top_k": 7, "max_tokens": 24, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.7, "top_p": 0.8, "max_tokens": 22, "logit_bias": {5: 3.0}, "logprobs": 0, "prompt_logprobs": 1},
    {"temperature": 0, "max_tokens": 25, "structured_outputs": StructuredOutputs(regex="(ab|cd){2,9}x[0-9]*")},
    {"temperature": 0.9, "max_tokens": 25, "structured_outputs": StructuredOutputs(regex="[a-c]{3,30}")},
    {"temperature": 0, "max_tokens": 30, "min_tokens": 6, "stop_token_ids": list(range(0, 300, 9))},
    {"temperature": 0, "max_tokens": 1},
]
Said = tuple[list[int], list[TokenLogprob], Any, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has nothing to do with the other one but its vocabulary."""
    return save_tiny(tmp_path_factory.mktemp("stranger"), "llama", vocab_size=VOCAB, **SMALL)


def requests() -> list[GenerationRequest]:
    """Twice the wishes, half of the prompts sharing a block and more."""
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(0, VOCAB, (19,), generator=generator).tolist()
    made = []
    for index, wish in enumerate(WISHES * 2):
        own = torch.randint(0, VOCAB, (1 + 7 * index % 13,), generator=generator).tolist()
        prompt = [*shared, *own] if index % 2 else [*own, *own, *own][:20]
        made.append(GenerationRequest(id=str(index), prompt=prompt, params=SamplingParams(**wish), seed=90 + index))
    return made


def constraint(request: GenerationRequest) -> Constraint:
    spec = request.params.structured_outputs
    return FREE if spec is None else COMPILER.constraint(spec, request.tokens)


def converse(engine: Engine, work: list[GenerationRequest]) -> tuple[dict[str, Said], Stats]:
    """What each log says; they come while others run."""
    said: dict[str, Said] = {request.id: (list(request.tokens), [], None, None) for request in work}
    coming = list(work)
    try:
        while coming or engine.has_work:
            if coming:
                engine.add(coming[0], constraint(coming.pop(0)))
            for event in engine.step():
                assert event.error is None
                tokens, logprobs, *_ = said[event.id]
                assert event.start == len(tokens)
                tokens += event.tokens
                logprobs += event.logprobs or []
                said[event.id] = (tokens, logprobs, event.finish_reason, event.stop_reason)
        return said, engine.stats()
    finally:
        engine.close()


def assert_same(said: dict[str, Said], expected: dict[str, Said]) -> None:
    for name, (tokens, logprobs, *ending) in expected.items():
        found = said[name]
        assert found[0] == tokens, name
        assert [found[2], found[3]] == ending, name
        assert [entry.rank for entry in found[1]] == [entry.rank for entry in logprobs]
        assert [entry.logprob for entry in found[1]] == pytest.approx([e.logprob for e in logprobs], abs=1e-4)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Said]:
    said, stats = converse(engine_over(model, Grid()), requests())
    assert stats.spec_drafts == 0
    return said


def guessing(model: Path, grid: Grid, by: Path | str, **changes: Any) -> Engine:
    options = {"speculative_model": str(by), "speculative_max_batch": 16, "num_speculative_tokens": 3} | changes
    return engine_over(model, grid, **options)


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 1), Grid(1, 2), Grid(2, 2)], ids=str)
@pytest.mark.parametrize("by", ["ngram", "itself", "stranger"])
def test_a_log_says_the_same_whoever_guesses(
    by: str, grid: Grid, model: Path, stranger: Path, expected: dict[str, Said]
) -> None:
    said, stats = converse(guessing(model, grid, {"itself": model, "stranger": stranger}.get(by, by)), requests())
    assert_same(said, expected)
    assert stats.spec_drafts > 0


def free_requests() -> list[GenerationRequest]:
    """Those whose tokens are the model's own, sampled ones too: no penalty, no grammar, nothing that ends early."""
    return [request for request in requests() if int(request.id) % len(WISHES) in (0, 1)]


def test_the_model_itself_is_always_right_and_a_stranger_is_not(model: Path, stranger: Path) -> None:
    """Under masks, biases, minimum lengths and penalties, too: it draws from the logits that the model draws from."""
    _, by_itself = converse(guessing(model, Grid(), model), requests())
    assert by_itself.spec_accepted_tokens == by_itself.spec_drafted_tokens > 100
    _, by_itself = converse(guessing(model, Grid(), model), free_requests())
    assert by_itself.acceptance_length > 3.5
    _, by_stranger = converse(guessing(model, Grid(), stranger), free_requests())
    assert by_stranger.spec_accepted_tokens < 0.1 * by_stranger.spec_drafted_tokens


@pytest.mark.parametrize("by", ["ngram", "itself"])
@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 6}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 16}, {"speculative_max_batch": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_preempted_chunked_or_uncached_it_is_the_same(
    by: str, changes: dict[str, Any], model: Path, expected: dict[str, Said]
) -> None:
    said, stats = converse(guessing(model, Grid(), model if by == "itself" else by, **changes), requests())
    assert_same(said, expected)
    assert stats.preemptions > 0 or "num_blocks" not in changes


def test_a_prefix_found_in_the_cache_is_in_the_draft_models_too(model: Path) -> None:
    engine = guessing(model, Grid(), model)
    first = free_requests()[0]
    long = msgspec.structs.replace(first, prompt=list(range(34)))
    for name in ("a", "b"):
        engine.add(msgspec.structs.replace(long, id=name))
        while engine.has_work:
            engine.step()
    stats = engine.stats()
    engine.close()
    assert stats.prefix_hit_tokens >= 32
    assert stats.spec_accepted_tokens == stats.spec_drafted_tokens > 0


def test_a_log_that_comes_with_tokens_goes_on_as_it_would_have(model: Path, expected: dict[str, Said]) -> None:
    work = [
        msgspec.structs.replace(request, tokens=expected[request.id][0][:7])
        for request in requests()
        if len(expected[request.id][0]) > 8
    ]
    said, _ = converse(guessing(model, Grid(), model), work)
    assert {name: tokens for name, (tokens, *_) in said.items()} == {
        request.id: expected[request.id][0] for request in work
    }


def test_a_replica_is_built_with_a_draft_model_beside_its_rank(model: Path) -> None:
    fields = {"model": str(model), "device": "cpu", "max_model_len": 64, "block_size": 16, "max_num_seqs": 4}
    request = free_requests()[1]
    said = {}
    for by in (None, "ngram", str(model)):
        engine = build_replica(EngineConfig(**fields, speculative_model=by)).engine
        said[by] = converse(engine, [request])[0][request.id][0]
    assert said[None] == said["ngram"] == said[str(model)]


@pytest.mark.parametrize("tokens_free", [70, 200, 5000])
def test_the_memory_plan_counts_a_draft_model(tokens_free: int, model: Path) -> None:
    config = EngineConfig(
        model=str(model), device="cpu", dtype="float32", max_model_len=64, block_size=16, max_num_seqs=8
    )
    spec = ModelSpec.from_config(open_checkpoint(model).config)
    draft = plan_draft(config.model_copy(update={"speculative_model": str(model)}), spec)
    assert draft is not None
    (share,) = deal(spec, Grid())
    plan = partial(plan_memory, share, config, max_model_len=64, dtype=torch.float32)
    weights = plan(free=1 << 30)
    block = weights.kv_bytes // weights.num_blocks
    free = weights.weight_bytes + weights.workspace_bytes + draft.fixed_bytes + tokens_free * 2 * block // 16
    rank_spec = msgspec.structs.replace(
        RankSpec.of(config, model_path=model, spec=spec, depth=1),
        set_aside_bytes=draft.fixed_bytes,
        set_aside_bytes_a_block=draft.block_bytes,
    )
    memory = plan_beside_draft(rank_spec, plan, free)
    assert memory.num_blocks == min(tokens_free // 16, 8 * 64 // 16)


def test_deterministic_in_bfloat16_it_is_the_same_to_the_bit(model: Path) -> None:
    """There sums in another order do decide tokens: a guess's row is computed as the token's own would be."""
    options = {"dtype": "bfloat16", "deterministic": True}
    expected, _ = converse(engine_over(model, Grid(), **options), requests())
    said, stats = converse(guessing(model, Grid(), model, **options), requests())
    assert said == expected
    assert stats.spec_accepted_tokens > 0
