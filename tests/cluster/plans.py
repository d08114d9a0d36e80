"""Models and plans for tests of the planner: config.json files of real sizes, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.cluster.plan import Asked, Plan, Problem, make_plan, make_problem

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def folder(at: Path, sizes: dict[str, Any], **more: Any) -> str:
    """A folder with nothing but a config.json."""
    at.mkdir(exist_ok=True)
    (at / "config.json").write_text(json.dumps(sizes | more))
    return str(at)


def problem(model: str, gpu: str, **asked: Any) -> Problem:
    """What the command line would make of it; engine fields go under their own names."""
    overrides = {("engine", name): asked.pop(name) for name in list(asked) if name in ENGINE}
    return make_problem(Asked(model=model, gpu=gpu, **asked), overrides)


def plan(model: str, gpu: str, **asked: Any) -> Plan:
    return make_plan(problem(model, gpu, **asked))


ENGINE = {"kv_cache_dtype", "max_num_seqs", "kv_cache_memory_gb", "dtype", "enforce_eager"}
