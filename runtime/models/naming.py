"""How each family calls its tensors on the Hugging Face hub: data for `pieces.py`.

Names are those of modules (the tensor is `<module>.weight` or `.bias`), inside a layer relative to the layer. A norm
without a name is one that the family does not have: this is what makes a block pre-norm, post-norm or both.
"""

from dataclasses import dataclass, replace
from enum import Enum


class Fusion(Enum):
    """How a stored matrix holds queries, keys and values."""

    SEPARATE = "three matrices"
    STACKED = "one: all queries, all keys, all values"
    GROUPED = "one: for each KV head its queries, its key, its value"


@dataclass(frozen=True, slots=True)
class Names:
    """Module names of one family."""

    prefixes: tuple[str, ...] = ("model.", "", "model.language_model.", "language_model.model.", "language_model.")
    embedding: str = "embed_tokens"
    positions: str | None = None
    layer: str = "layers.{}."
    final_norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")  # full names

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_fusion: Fusion = Fusion.SEPARATE
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # one name for gate and up: stacked, or no gate at all
    down: str = "mlp.down_proj"
    transposed: bool = False  # matrices inside layers are stored [in, out]


LLAMA = Names()
GEMMA2 = replace(
    LLAMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
OLMO2 = replace(
    LLAMA,
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
COHERE = replace(LLAMA, before_mlp=None)
PHI = replace(
    COHERE,
    final_norm="final_layernorm",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    out="self_attn.dense",
    up=("mlp.fc1",),
    down="mlp.fc2",
)
PHI3 = replace(LLAMA, qkv=("self_attn.qkv_proj",), qkv_fusion=Fusion.STACKED, up=("mlp.gate_up_proj",))
GLM = replace(LLAMA, up=("mlp.gate_up_proj",))
GLM4 = replace(GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
STARCODER2 = replace(LLAMA, up=("mlp.c_fc",), down="mlp.c_proj")
GPT_NEOX = Names(
    prefixes=("gpt_neox.", ""),
    embedding="embed_in",
    final_norm="final_layer_norm",
    heads=("embed_out", "lm_head"),
    qkv=("attention.query_key_value",),
    qkv_fusion=Fusion.GROUPED,
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
GPT2 = Names(
    prefixes=("transformer.", ""),
    embedding="wte",
    positions="wpe",
    layer="h.{}.",
    final_norm="ln_f",
    before_attention="ln_1",
    before_mlp="ln_2",
    qkv=("attn.c_attn",),
    qkv_fusion=Fusion.STACKED,
    out="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    transposed=True,
)
