"""Tiny random checkpoints of any family, made by transformers, and what it means to agree with them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.runtime.models.decoder import Decoder

from .support import TINY, PagedRun, Tiny, prompts_of, randomise


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """tiny("llama", attention_bias=True): TINY sizes unless told otherwise."""

    def make(model_type: str, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any) -> Tiny:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, **(TINY | changes))
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval()
        randomise(model)
        model.tie_weights()
        folder = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
        if dtype != torch.float32:  # the cast went into buffers, too: begin again from the file
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return Tiny(model.eval(), folder)

    return make


@pytest.fixture
def agree() -> Callable[..., None]:
    """Asserts that a decoder gives transformers' logits, prompt and decode, and its greedy tokens."""

    def check(tiny: Tiny, decoder: Decoder, *, tolerance: float = 1e-5, produce: int = 6) -> None:
        for sequence in PagedRun(decoder).run(prompts_of(decoder.spec.vocab_size), produce=produce):
            expected = tiny.expected(sequence.tokens[:-1])
            found = torch.cat(sequence.logits)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
            assert sequence.produced == expected.argmax(-1)[len(sequence.prompt) - 1 :].tolist()

    return check
