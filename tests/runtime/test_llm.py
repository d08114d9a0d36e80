"""`LLM` as a program uses it: a tiny random model in a folder, with a byte tokenizer beside it."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from shoal.runtime import LLM, SamplingParams, StructuredOutputs
from shoal.runtime.build import build_replica
from shoal.runtime.config import EngineConfig
from shoal.runtime.errors import ConfigError, ContextTooLong, InvalidRequest, MemoryPlanError
from shoal.runtime.stats import Stats

from ..tiny import tiny_model

OPTIONS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_memory_gb": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny-llama"), max_len=128)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as built:  # type: ignore[arg-type]
        yield built


def settled(llm: LLM) -> Stats:
    """The statistics once nothing runs; they are published a moment after the last step."""
    for _ in range(250):
        if (stats := llm.stats()).num_running == 0:
            return stats
        time.sleep(0.02)
    pytest.fail("a generation goes on that nobody listens to")


def test_greedy_tokens_are_transformers(folder: Path, llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [[5, 6, 7], list(range(40)), [200] * 17]
    outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for prompt, out in zip(prompts, outs, strict=True):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert out.prompt_token_ids == prompt
        assert out.outputs[0].token_ids == want[0, len(prompt) :].tolist()
        assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("stored", "asked", "taken"),
    [
        ("float16", "auto", torch.bfloat16),
        ("float16", "float16", torch.float16),
        ("float32", "auto", torch.float32),
    ],
)
def test_a_cpu_computes_float16_in_bfloat16_unless_told(
    stored: str, asked: Literal["auto", "float16"], taken: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path, max_len=32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    replica = build_replica(EngineConfig(model=str(folder), dtype=asked, device="cpu", kv_cache_memory_gb=0.01))
    assert replica.dtype is taken
    replica.engine.close()


def test_a_seed_fixes_the_answer_alone_or_in_a_batch_whole_or_preempted(folder: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=48, ignore_eos=True)
    prompts = [f"prompt number {i}" for i in range(8)]
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    together = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert together == alone
    # Ten blocks of 16: not even three sequences of 63 tokens fit together; chunks are of at most 16 tokens.
    block = 2 * 2 * 2 * 8 * 16 * 4
    small = OPTIONS | {"kv_cache_memory_gb": 10.5 * block / 2**30, "max_model_len": 64, "max_num_batched_tokens": 16}
    small["block_size"] = 16
    with LLM(str(folder), **small) as tight:  # type: ignore[arg-type]
        preempted = [out.outputs[0].token_ids for out in tight.generate(prompts, params)]
        assert settled(tight).preemptions > 0
    assert preempted == alone


def test_n_choices_differ_and_logprobs_are_of_the_drawn_tokens(llm: LLM) -> None:
    out = llm.generate("abc", SamplingParams(n=3, seed=1, logprobs=2, max_tokens=5, ignore_eos=True))[0]
    assert len({tuple(choice.token_ids) for choice in out.outputs}) == 3
    for choice in out.outputs:
        assert choice.logprobs is not None
        for token, entries in zip(choice.token_ids, choice.logprobs, strict=True):
            assert next(iter(entries)) == token
            assert len(entries) >= 2
        total = sum(entries[token].logprob for token, entries in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_are_transformers(folder: Path, llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    prompt = list(range(30, 60))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        want = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    out = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=1))[0]
    assert out.outputs[0].token_ids == []
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    for i in range(1, len(prompt)):
        entries = out.prompt_logprobs[i]
        assert entries is not None
        assert entries[prompt[i]].logprob == pytest.approx(float(want[i - 1, prompt[i]]), abs=1e-4)


def test_a_stop_string_ends_text_and_tokens(llm: LLM) -> None:
    free = llm.generate("hello", SamplingParams(seed=4, max_tokens=40, ignore_eos=True))[0].outputs[0]
    stop = free.text[10:12]
    cut = llm.generate("hello", SamplingParams(seed=4, max_tokens=40, ignore_eos=True, stop=[stop]))[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_chat_prefix_cache_and_constraint(llm: LLM) -> None:
    messages = [{"role": "user", "content": "a rather long message that fills more than one block"}]
    params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputs(choice=["yes", "no"]))
    first = llm.chat(messages, params)[0]
    again = llm.chat(messages, params)[0]
    assert first.outputs[0].text in ("yes", "no")
    assert again.outputs[0].text == first.outputs[0].text
    assert again.num_cached_tokens >= 16


def test_streams_run_side_by_side_and_end_with_the_same_answer(llm: LLM) -> None:
    params = SamplingParams(seed=9, max_tokens=10, ignore_eos=True)
    whole = llm.generate("stream me", params)[0].outputs[0]

    async def read() -> list[str]:
        texts = [out.outputs[0].text async for out in llm.stream("stream me", params)]
        assert len(texts) > 1
        return texts

    async def both() -> list[list[str]]:
        return await asyncio.gather(read(), read())

    for texts in asyncio.run(both()):
        assert texts[-1] == whole.text
        assert all(whole.text.startswith(text) for text in texts)


def test_a_stream_that_is_left_is_aborted(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.stream("x", SamplingParams(max_tokens=100, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(settled, llm)

    asyncio.run(leave())


@pytest.mark.parametrize(
    ("prompt", "params", "error", "says"),
    [
        ("", None, InvalidRequest, "no tokens"),
        ([[5, 999]], None, InvalidRequest, "999"),
        ([[5, -1]], None, InvalidRequest, "-1"),
        ([[1] * 200], None, ContextTooLong, "128"),
        ("abc", SamplingParams(max_tokens=1000), ContextTooLong, "1000"),
        ({"text": "x"}, None, InvalidRequest, "prompt_token_ids"),
        ("abc", SamplingParams(structured_outputs=StructuredOutputs(regex="(")), InvalidRequest, "regex"),
    ],
)
def test_bad_input_names_what_is_wrong_and_the_next_prompt_works(
    llm: LLM, prompt: object, params: SamplingParams | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        llm.generate(prompt, params)  # type: ignore[arg-type]
    assert llm.generate("ok", SamplingParams(max_tokens=1))[0].finished


def test_without_a_tokenizer_prompts_are_ids_and_texts_are_empty(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    with LLM(str(tmp_path), **OPTIONS) as bare:  # type: ignore[arg-type]
        out = bare.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0))[0].outputs[0]
        assert (len(out.token_ids), out.text) == (3, "")
        with pytest.raises(InvalidRequest, match="token ids"):
            bare.generate("text")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_model_len": 4096}, ConfigError, "128 positions"),
        ({"block_size": 15}, ConfigError, "block_size"),
        ({"kv_cache_memory_gb": 1e-5}, MemoryPlanError, "--kv-cache-memory-gb"),
        ({"colour": "red"}, ConfigError, "colour"),
    ],
)
def test_bad_options_are_refused_with_the_knob(
    folder: Path, options: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LLM(str(folder), **(OPTIONS | options))  # type: ignore[arg-type]


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        LLM(str(tmp_path / "nothing"))


def test_it_works_unguarded_from_standard_input(folder: Path) -> None:
    program = f"""
from shoal.runtime import LLM, SamplingParams
llm = LLM({str(folder)!r}, **{OPTIONS!r})
print("tokens", len(llm.generate("hi", SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids))
llm.close()
"""
    done = subprocess.run(
        [sys.executable, "-P", "-"], input=program, capture_output=True, text=True, timeout=120, check=False
    )
    assert "tokens 4" in done.stdout, done.stderr
