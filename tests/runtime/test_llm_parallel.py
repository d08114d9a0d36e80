"""`LLM` over several ranks in processes of their own: the same tokens, and the same while ranks die."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.runtime import LLM, SamplingParams
from shoal.runtime.errors import CheckpointError, ConfigError, MemoryPlanError
from shoal.runtime.generation import StructuredOutputs

from .test_llm import OPTIONS, folder  # noqa: F401 - a fixture

PROMPTS = ["Once upon a time", "hi", "The quick brown fox jumps over the lazy dog", "a b c"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, max_tokens=40, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.8, seed=6, top_p=0.8, max_tokens=40, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, seed=7, max_tokens=40, structured_outputs=StructuredOutputs(regex="[a-f ]{30,60}")),
]


def tokens(llm: LLM) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:  # noqa: F811
    with LLM(str(folder), **OPTIONS) as llm:  # type: ignore[arg-type]
        return tokens(llm)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:  # noqa: F811
    with LLM(str(folder), tensor_parallel_size=2, pipeline_parallel_size=2, **OPTIONS) as built:  # type: ignore[arg-type]
        yield built


def test_the_same_tokens_from_four_processes(llm: LLM, expected: list[list[int]]) -> None:
    assert tokens(llm) == expected
    assert [(rank.stage, rank.shard) for rank in llm.ranks()] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("rank", [0, 3])
def test_the_same_tokens_when_a_rank_is_killed(llm: LLM, expected: list[list[int]], rank: int) -> None:
    restarts, pids = llm.stats().restarts, [info.pid for info in llm.ranks()]
    threading.Timer(0.15, os.kill, (pids[rank], signal.SIGKILL)).start()
    found = [tokens(llm) for _ in range(4)]  # it happens in the course of these
    assert found == [expected] * 4
    assert llm.stats().restarts == restarts + 1
    assert not {info.pid for info in llm.ranks()} & set(pids)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tensor_parallel_size": 7}, ConfigError, "1 to 6 ranks"),
        ({"pipeline_parallel_size": 3}, ConfigError, "has 2 layers"),
        ({"pipeline_parallel_size": 2, "pp_layers": (2, 1)}, ConfigError, "--pp-layers 2,1"),
        ({"tensor_parallel_size": 2, "kv_cache_memory_gb": 1e-5}, MemoryPlanError, "--kv-cache-memory-gb"),
        ({"micro_batches": 2}, ConfigError, "--pp-schedule gpipe"),
    ],
)
def test_bad_grids_are_refused_with_the_knob(
    folder: Path,  # noqa: F811
    options: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        LLM(str(folder), **(OPTIONS | options))  # type: ignore[arg-type]


def test_a_checkpoint_without_a_shard_is_one_clear_message(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    import torch
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.\w+_proj\.weight") as caught:
        LLM(str(tmp_path), pipeline_parallel_size=2, **OPTIONS)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_it_works_unguarded_from_standard_input(folder: Path) -> None:  # noqa: F811
    program = f"""
import os
from shoal.runtime import LLM, SamplingParams
llm = LLM({str(folder)!r}, tensor_parallel_size=2, **{OPTIONS!r})
pids = [info.pid for info in llm.ranks()]
print("tokens", len(llm.generate("hi", SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids))
llm.close()
for pid in pids:
    try:
        os.kill(pid, 0)
        print("alive", pid)
    except ProcessLookupError:
        pass
"""
    done = subprocess.run(
        [sys.executable, "-P", "-"], input=program, capture_output=True, text=True, timeout=120, check=False
    )
    assert "tokens 4" in done.stdout, done.stderr
    assert "alive" not in done.stdout
