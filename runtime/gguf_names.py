"""GGUF's vocabulary as data: which Hugging Face tensor and config key each of its names is (start-up, under `gguf.py`).

llama.cpp's converter changes some tensors on the way in; `Change` says what `gguf.py` has to undo.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .gguf_file import GGUFFile, MetaValue

Shapes = dict[str, tuple[int, ...]]
_T = TypeVar("_T", bound=int | float | str)


class Change(Enum):
    """What the converter did to a tensor."""

    NONE = "none"
    PAIRED_Q = "rows of each query head reordered so that rotated pairs are neighbours"
    PAIRED_K = "the same for key heads"
    PLUS_ONE = "1 added (gemma's norms multiply by 1 + w)"
    TRANSPOSED = "turned from gpt2's [in, out] to [out, in]"


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER = _LLAMA_LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: its names, and where its metadata goes in the config (GGUF key without prefix: HF key)."""

    model_type: str
    config_class: str
    layers: str  # HF prefix of layer i
    top: dict[str, str]
    layer: dict[str, str]
    keys: dict[str, str]
    changed_weights: dict[str, Change]

    def locate(self, gguf_name: str) -> tuple[str, Change] | None:
        """The Hugging Face name and what was changed; None for a name this family does not have."""
        stem, _, suffix = gguf_name.rpartition(".")
        if suffix not in ("weight", "bias"):
            return None
        if stem in self.top:
            return f"{self.top[stem]}.{suffix}", self._change(stem, suffix)
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
        if match is None or match[2] not in self.layer:
            return None
        return f"{self.layers}.{match[1]}.{self.layer[match[2]]}.{suffix}", self._change(match[2], suffix)

    def _change(self, part: str, suffix: str) -> Change:
        change = self.changed_weights.get(part, Change.NONE)
        return Change.NONE if change is Change.TRANSPOSED and suffix == "bias" else change


_COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_PAIRED = {"attn_q": Change.PAIRED_Q, "attn_k": Change.PAIRED_K}
_ADDED = {part: Change.PLUS_ONE for part in ("output_norm", *_GEMMA3_LAYER) if part.endswith("_norm")}
_TURNED: dict[str, Change] = dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), Change.TRANSPOSED)


def _dense(model_type: str, config_class: str, layer: dict[str, str], changed: dict[str, Change]) -> Family:
    return Family(model_type, config_class, "model.layers", _TOP, layer, _COMMON_KEYS, changed)


FAMILIES = {
    "llama": _dense("llama", "LlamaForCausalLM", _LLAMA_LAYER, _PAIRED),
    "qwen2": _dense("qwen2", "Qwen2ForCausalLM", _LLAMA_LAYER, {}),
    "qwen3": _dense("qwen3", "Qwen3ForCausalLM", _LLAMA_LAYER, {}),
    "gemma3": _dense("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_LAYER, _ADDED),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", "transformer.h", _GPT2_TOP, _GPT2_LAYER, _GPT2_KEYS, _TURNED),
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IGNORED_TENSORS = frozenset({"rope_freqs.weight"})  # its content goes into the config's rope_parameters


class Metadata:
    """Typed reads of one architecture's metadata; a missing or ill-typed key is a `CheckpointError`."""

    def __init__(self, values: dict[str, MetaValue], path: Path) -> None:
        self.values = values
        self.path = path
        self.architecture = self.get("general.architecture", str)

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.values.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            found = "nothing" if value is None else type(value).__name__
            raise CheckpointError(f"{self.path}: metadata {key!r}: expected {kind.__name__}, found {found}")
        return value

    def own(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """A key under the architecture's prefix."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.values


def family_of(metadata: Metadata) -> Family:
    if metadata.architecture not in FAMILIES:
        raise CheckpointError(
            f"{metadata.path}: architecture {metadata.architecture!r} is not supported from GGUF: "
            f"expected one of {', '.join(FAMILIES)}; use the model's safetensors instead"
        )
    return FAMILIES[metadata.architecture]


def build_config(file: GGUFFile) -> dict[str, Any]:
    """What the model's `config.json` would say. Raises CheckpointError."""
    metadata = Metadata(file.metadata, file.path)
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    family = family_of(metadata)
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.config_class]}
    for key, hf_key in family.keys.items():
        config[hf_key] = metadata.own(key, float) if key.endswith("epsilon") else metadata.own(key, int)
    config["vocab_size"] = shapes.get("token_embd.weight", (0,))[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= _special_ids(metadata)
    if family.model_type != "gpt2":
        config |= _heads(metadata)
        config["rope_parameters"] = _rope(metadata, config, _rope_factors(file))
    match family.model_type:
        case "llama":
            config |= _llama_extras(metadata, shapes)
        case "gemma3_text":
            config |= _gemma3_extras(metadata, config)
    formats = {entry.format for entry in file.tensors.values() if len(entry.shape) > 1}
    # Blocks dequantise to float32, but nothing in them is finer than bfloat16: what the models were trained in.
    config["dtype"] = _FLOATS.get(formats.pop(), "bfloat16") if len(formats) == 1 else "bfloat16"
    return config


def _rope_factors(file: GGUFFile) -> NDArray[np.float32] | None:
    name = "rope_freqs.weight"
    entry = file.tensors.get(name)
    return None if entry is None else file.numbers(entry, file.rows(name)).flatten()


def _special_ids(metadata: Metadata) -> dict[str, Any]:
    def ids(*names: str) -> list[int]:
        keys = [f"tokenizer.ggml.{name}_token_id" for name in names]
        return list(dict.fromkeys(metadata.get(key, int) for key in keys if key in metadata.values))

    ends = ids("eos", "eot", "eom")  # chat models end a turn with another token than a text
    return {
        "bos_token_id": next(iter(ids("bos")), None),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": next(iter(ids("padding")), None),
    }


def _heads(metadata: Metadata) -> dict[str, Any]:
    heads, hidden = metadata.own("attention.head_count", int), metadata.own("embedding_length", int)
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"{metadata.path}: expected at least one head and column, found {heads} and {hidden}")
    return {
        "num_key_value_heads": metadata.own("attention.head_count_kv", int, heads),
        "head_dim": metadata.own("attention.key_length", int, hidden // heads),
    }


def _rope(metadata: Metadata, config: dict[str, Any], factors: NDArray[np.float32] | None) -> dict[str, Any]:
    theta = metadata.own("rope.freq_base", float, 1e6 if metadata.architecture == "gemma3" else 1e4)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling = metadata.own("rope.scaling.type", str, "none")
    if factors is not None:
        rope |= _llama3_scaling(metadata, theta, config["head_dim"], factors)
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": metadata.own("rope.scaling.factor", float)}
        if scaling == "yarn":
            original = metadata.own("rope.scaling.original_context_length", int, config["max_position_embeddings"])
            rope["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise CheckpointError(f"{metadata.path}: rope scaling {scaling!r} is not supported: expected linear or yarn")
    if metadata.architecture != "gemma3":
        return rope
    # The local theta is not in the file: it is the same in all gemma 3 models, and scaling concerns global layers only.
    local = metadata.own("rope.freq_base_swa", float, 1e4)
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _llama3_scaling(
    metadata: Metadata, theta: float, head_dim: int, factors: NDArray[np.float32]
) -> dict[str, float | int | str]:
    """The parameters of llama 3's rope scaling, found again from the factors it gave.

    The factor is the largest one; the low and high frequency bounds have been 1 and 4 in every release; the original
    context is the power of two that gives these factors.
    """
    low, high, factor = 1.0, 4.0, float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for original in (1 << exponent for exponent in range(10, 21)):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(f"{metadata.path}: tensor 'rope_freqs.weight' is not llama 3's scaling for any context")


def _llama_extras(metadata: Metadata, shapes: Shapes) -> dict[str, Any]:
    extras: dict[str, Any] = {
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    if metadata.has("attention.sliding_window"):  # a mistral: the converter gives it llama's name
        window = metadata.own("attention.sliding_window", int)
        extras |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return extras


def _gemma3_extras(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads, hidden = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
    # The scale is not in the file. All sizes use the head dim but the 27B one (62 layers), which uses hidden / heads.
    scalar = hidden // heads if layers == 62 else config["head_dim"]
    kinds = ("full_attention" if i % 6 == 5 else "sliding_attention" for i in range(min(layers, 1 << 16)))
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": metadata.own("attention.sliding_window", int),
        "layer_types": list(kinds),
    }
