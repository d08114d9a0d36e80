"""A model of random weights that needs no file: its spec, and a checkpoint that makes what it is asked for."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.ops import Activation, AttentionSpec
from shoal.runtime.models.naming import LLAMA
from shoal.runtime.models.spec import LayerSpec, MLPSpec, ModelSpec, NormKind, NormSpec, QKNorm, RopeSpec

HEAD_DIM, HIDDEN, MLP, HEADS, KV_HEADS = 16, 32, 64, 4, 2


def random_spec(*, num_layers: int = 2, vocab_size: int = 50, max_len: int = 64) -> ModelSpec:
    """A Qwen 3 in miniature."""
    rope = RopeSpec(tuple(1e4 ** (-i / HEAD_DIM) for i in range(0, HEAD_DIM, 2)))
    layer = LayerSpec(AttentionSpec(HEAD_DIM**-0.5), rope, MLPSpec(MLP, Activation.SILU))
    return ModelSpec(
        family="random",
        names=LLAMA,
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_len=max_len,
        layers=(layer,) * num_layers,
        norm=NormSpec(NormKind.RMS, 1e-5),
        qk_norm=QKNorm.HEAD,
    )


class RandomCheckpoint:
    """A `Checkpoint` of a LLAMA-named model: each tensor is random, and the same whenever it is asked for."""

    def __init__(self, spec: ModelSpec) -> None:
        self.config: dict[str, Any] = {}
        self._shapes = _shapes(spec)

    def names(self) -> list[str]:
        return list(self._shapes)

    def file_of(self, name: str) -> str:
        return "random"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str, cut: tuple[slice, ...] = ()) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        numbers = torch.randn(shape, generator=generator)
        whole = 1 + 0.2 * numbers if len(shape) == 1 else numbers * 2 / math.sqrt(shape[1])
        return whole[cut]

    def form(self, name: str) -> None:
        return None

    def codes(self, name: str, cut: tuple[slice, ...] = ()) -> None:
        return None

    def blocks(self, name: str, cut: tuple[slice, ...] = ()) -> None:
        return None


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, dim = spec.hidden_size, spec.head_dim
    query, keys = spec.num_heads * dim, spec.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "lm_head.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index, layer in enumerate(spec.layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (dim,),
            "self_attn.k_norm": (dim,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (layer.mlp.size, hidden),
            "mlp.up_proj": (layer.mlp.size, hidden),
            "mlp.down_proj": (hidden, layer.mlp.size),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in parts.items()}
    return shapes
