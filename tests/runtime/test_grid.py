"""The same tokens from every grid: a whole engine over ranks that are threads, in float32, against one rank alone.

Random weights spread the logits widely, so that a sum taken in another order never decides a token.
"""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.parallel.grid import Grid
from shoal.parallel.threads import thread_comms
from shoal.runtime.config import EngineConfig
from shoal.runtime.errors import ConfigError
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.rank import RankSpec, build_worker
from shoal.runtime.safetensors_checkpoint import SafetensorsCheckpoint
from shoal.runtime.share import deal

from ..models.support import TINY, randomise
from .grid_engine import engine_over, run

GRIDS = [Grid(tp, pp) for tp, pp in itertools.product((1, 2, 3), (1, 2, 3)) if tp * pp > 1]
NINE = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}  # SmolLM2's heads
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": NINE,
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 64, "num_key_value_heads": 6},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": 6},
    "cohere": {"use_qk_norm": True},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 5.0},
    "glm4": {"head_dim": 16},
    "starcoder2": {},
}
SAMPLING = [
    SamplingParams(temperature=0, max_tokens=22),
    SamplingParams(temperature=1.0, max_tokens=22),
    SamplingParams(temperature=0.8, top_k=7, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(temperature=1.2, top_p=0.8, min_p=0.02, max_tokens=7, logit_bias={5: 3.0}),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=0.7, max_tokens=10, min_tokens=4, presence_penalty=0.5),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tiny random checkpoint of a family, saved once."""

    @cache
    def save(family: str) -> Any:
        return save_tiny(tmp_path_factory.mktemp(family), family, **FAMILIES[family])

    return save


def save_tiny(folder: Path, family: str, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(TINY | changes)))
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def requests(num: int, vocab_size: int = 101) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(11)
    shared = torch.randint(0, vocab_size, (18,), generator=generator).tolist()
    made = []
    for index in range(num):
        own = torch.randint(0, vocab_size, (1 + 5 * index % 23,), generator=generator).tolist()
        prompt = shared + own if index % 3 == 0 else own
        params = SAMPLING[index % len(SAMPLING)]
        made.append(GenerationRequest(id=str(index), prompt=prompt, params=params, seed=1000 + index))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_grid_gives_the_same_tokens(family, saved):
    folder, work = saved(family), requests(6)
    expected = run(engine_over(folder, Grid()), work)
    for grid in GRIDS:
        assert run(engine_over(folder, grid), work) == expected, grid


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_batch_of_16_preempted_chunked_and_cached_gives_what_each_gives_alone(grid, saved):
    folder, work = saved("llama"), requests(16)
    by_itself = engine_over(folder, Grid(), max_num_seqs=1, enable_prefix_caching=False)
    alone = run(by_itself, work)
    for changes in ({}, {"max_num_batched_tokens": 256}, {"enable_prefix_caching": False}):
        assert run(engine_over(folder, grid, **changes), work) == alone, changes
    narrow = engine_over(folder, grid, num_blocks=6)
    assert run(narrow, work) == alone
    assert narrow.stats().preemptions > 0


@pytest.mark.parametrize("tp", [3, 5, 6, 11])
def test_32_heads_over_any_width(tp, tmp_path):
    """8 KV heads: contiguous ones up to 8 ranks, copies beyond."""
    folder = save_tiny(tmp_path, "llama", hidden_size=64, num_attention_heads=32, num_key_value_heads=8, head_dim=4)
    work = requests(6)
    expected = run(engine_over(folder, Grid()), work)
    assert run(engine_over(folder, Grid(tp, 1)), work) == expected


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(3, 2)], ids=str)
def test_deterministic_grids_say_the_same_alone_and_together(grid, saved):
    """In bfloat16, where sums in another order do decide tokens: over one grid, whatever else is in the batch."""
    folder, work = saved("llama"), requests(16)
    options = {"dtype": "bfloat16", "deterministic": True}
    alone = run(engine_over(folder, grid, max_num_seqs=1, enable_prefix_caching=False, **options), work)
    assert run(engine_over(folder, grid, **options), work) == alone
    narrow = engine_over(folder, grid, num_blocks=6, **options)
    assert run(narrow, work) == alone
    assert narrow.stats().preemptions > 0


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_gpipe_gives_the_same_tokens(micro_batches, saved):
    folder, work = saved("llama"), requests(8)
    expected = run(engine_over(folder, Grid()), work)
    engine = engine_over(folder, Grid(1, 3), pp_schedule="gpipe", micro_batches=micro_batches)
    assert run(engine, work) == expected


def test_layers_are_cut_as_told(saved):
    folder, work = saved("llama"), requests(4)
    expected = run(engine_over(folder, Grid()), work)
    assert run(engine_over(folder, Grid(1, 2), pp_layers=(1, 2)), work) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pp_layers": (1, 1)}, ["--pp-layers 1,1", "3 in all"]),
        ({"pp_layers": (1, 1, 1)}, ["--pp-layers 1,1,1", "2 stages"]),
        ({"pipeline_parallel_size": 4}, ["--pipeline-parallel-size 4", "1 to 3"]),
        ({"tensor_parallel_size": 10}, ["--tensor-parallel-size 10", "1 to 9 ranks", "1, 3, 9"]),
    ],
)
def test_an_impossible_grid_is_refused_with_what_is_possible(changes, words, saved):
    spec = ModelSpec.from_config(SafetensorsCheckpoint(saved("llama")).config)
    fields = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "pp_layers": None} | changes
    with pytest.raises(ConfigError) as caught:
        deal(spec, Grid(fields["tensor_parallel_size"], fields["pipeline_parallel_size"]), fields["pp_layers"])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("grid", [Grid(3, 1), Grid(1, 3), Grid(3, 3), Grid(2, 1)], ids=str)
def test_a_rank_holds_its_share_and_nothing_twice(grid, saved):
    """Norms alone are on every shard of a stage."""
    spec = ModelSpec.from_config(SafetensorsCheckpoint(saved("llama")).config)
    whole = bytes_held(saved("llama"), spec, Grid())[0]
    ranks = bytes_held(saved("llama"), spec, grid)
    norms = (2 * spec.num_layers + 1) * spec.hidden_size * 4
    assert sum(ranks) <= whole + (grid.tp - 1) * norms
    assert max(ranks) <= 1.25 * whole / grid.size * (4 / 3 if grid.tp == 2 else 1) + norms  # 9 heads over 2: 6 and 3


def bytes_held(folder, spec, grid):
    """Weights of each rank, which are built one by one: loading asks the others nothing."""
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        tensor_parallel_size=grid.tp,
        pipeline_parallel_size=grid.pp,
        max_model_len=64,
        max_num_seqs=2,
    )
    rank_spec = RankSpec.of(config, model_path=folder, spec=spec, depth=2)
    return [
        build_worker(rank_spec, share, comm=thread_comms(grid.tp)[share.place.shard], ring=None).weight_bytes
        for share in deal(spec, grid)
    ]
