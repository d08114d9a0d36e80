"""`--kv-cache-dtype`, observed from outside: an 8-bit cache says nearly what a plain one says, and says it again."""

import json
from pathlib import Path

import pytest
import torch

from shoal.runtime import LLM, SamplingParams

from ..tiny import EOS, byte_tokenizer

SIZES = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
}
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
PROMPTS = [list(range(3, 3 + length)) for length in (5, 60, 130)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("tiny-llama")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(out)
    byte_tokenizer().save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>"}))
    return out


Said = list[tuple[list[int], float]]


def said(folder: Path, **options: object) -> tuple[Said, Said, Said]:
    """Tokens and their joint logprob: of each prompt alone, of all together, and with prefixes from the cache."""
    fixed = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_memory_gb": 0.01}
    with LLM(str(folder), **fixed, **options) as llm:  # type: ignore[arg-type]
        rounds = ([llm.generate([p], PARAMS)[0] for p in PROMPTS], *(llm.generate(PROMPTS, PARAMS) for _ in range(2)))
        assert all(output.num_cached_tokens for output in rounds[2][1:])
        first, second, third = ([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in r] for r in rounds)
        return first, second, third


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_answers_are_near_those_of_a_plain_cache(folder: Path, dtype: str) -> None:
    plain, _, _ = said(folder)
    coded, together, cached = said(folder, kv_cache_dtype=dtype, deterministic=True)
    assert coded == together == cached
    for (_, expected), (_, actual) in zip(plain, coded, strict=True):
        assert actual != expected, "it should have been rounded"
        assert actual == pytest.approx(expected, rel=0.01)
