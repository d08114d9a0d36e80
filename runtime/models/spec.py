"""What a model is, read once from `config.json` (or the same made from GGUF metadata): `ModelSpec`, a plain value.

Nothing after this asks which family a model is of. What the config does not say is in `families.py`. transformers
takes seconds to import and is so only when a config is read; a spec itself needs none of it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...kernels.ops import Activation, AttentionSpec
from ...parallel.partition import cut_heads
from .naming import Names


class NormKind(Enum):
    """RMS: x / rms(x) * weight. LAYER: (x - mean) / std * weight + bias."""

    RMS = "rms"
    LAYER = "layer"


class QKNorm(Enum):
    """What is normalised in queries and keys before they are rotated."""

    NONE = "nothing"
    HEAD = "each head, with the weight of one head"
    EACH_HEAD = "each head, with weights of its own"
    FULL = "all heads together"


@dataclass(frozen=True, slots=True)
class NormSpec:
    """offset: what is added to the stored weight (Gemma stores w of `1 + w`)."""

    kind: NormKind
    eps: float
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: dims (i, i + C/2), or (2i, 2i + 1), turn by `position * inv_freq[i]`, and grow by `scale`."""

    inv_freq: tuple[float, ...]  # C/2 float32 values
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """Gated: act(gate) * up; else act(up)."""

    size: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer. `rope` None: this layer's attention does not see positions."""

    attention: AttentionSpec
    rope: RopeSpec | None
    mlp: MLPSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Sizes are of the whole model, before any cut over ranks."""

    family: str  # transformers' model_type, for messages
    names: Names
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int  # positions the model is made for
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    qk_norm: QKNorm = QKNorm.NONE
    parallel: bool = False  # attention and MLP read the same input and are added together
    qkv_bias: bool = False
    out_bias: bool = False
    head_bias: bool = False
    tied: bool = False  # the head's weight is the embedding's
    learned_positions: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dtype: str | None = None  # of the checkpoint, as torch names it; None: not said
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_shape(self, *, shard: int = 0, shards: int = 1) -> tuple[int, int]:
        """(KV heads, head dim) of the cache that one tensor-parallel shard keeps for each of its layers."""
        return cut_heads(self.num_heads, self.num_kv_heads, shard=shard, size=shards).num_kv, self.head_dim

    @staticmethod
    def from_config(config: dict[str, Any], *, max_len: int | None = None) -> "ModelSpec":
        """Read a `config.json`. Raises `ConfigError` where it is wrong or its architecture is not supported.

        max_len: the longest sequence that will be run; default: the model's own. It fixes the frequencies of the
        rope types that depend on a length (`dynamic`, `longrope`): one set for all positions, so that a key never
        has to be rotated anew. Up to the original length this is what transformers does.
        """
        from .families import read_config

        return read_config(config, max_len)
