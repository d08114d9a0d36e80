"""The families: what `config.json` leaves unsaid or says in a dialect of its own, as one table. Read by `spec.py` only.

A new dense family is an entry of `FAMILIES`, with its tensor names in `naming.py`. Where an entry's field may be a
flag's name, a string names the key of the config that holds it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...kernels.ops import Activation, AttentionSpec
from ..errors import ConfigError
from . import naming
from .naming import Names
from .rope import rope_spec
from .spec import LayerSpec, MLPSpec, ModelSpec, NormKind, NormSpec, QKNorm

Config = Any
"""A transformers config: its attributes are the keys of `config.json`, with defaults filled in and names normalised."""

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


def head_dim(c: Config) -> int:
    return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def by_head_dim(c: Config, _layer: int) -> float:
    return float(head_dim(c) ** -0.5)


def by_query_scalar(c: Config, _layer: int) -> float:
    return float(c.query_pre_attn_scalar**-0.5)


def by_multiplier(c: Config, _layer: int) -> float:
    return float(c.attention_multiplier)


def by_gpt2_flags(c: Config, layer: int) -> float:
    scale = by_head_dim(c, layer) if c.scale_attn_weights else 1.0
    return scale / (layer + 1) if c.scale_attn_by_inverse_layer_idx else scale


def no_window(_c: Config, _layer: int) -> int | None:
    return None


def window_everywhere(c: Config, _layer: int) -> int | None:
    return c.sliding_window or None


def window_by_layer_type(c: Config, layer: int) -> int | None:
    return c.sliding_window if c.layer_types[layer] == "sliding_attention" else None


def always(_c: Config, _layer: int) -> bool:
    return True


def never(_c: Config, _layer: int) -> bool:
    return False


def by_no_rope_layers(c: Config, layer: int) -> bool:
    return bool(c.no_rope_layers[layer])


def in_windowed_layers(c: Config, layer: int) -> bool:
    return window_by_layer_type(c, layer) is not None


def one(_c: Config) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table."""

    names: Names = naming.LLAMA
    norm: NormKind = NormKind.RMS
    norm_eps: str = "rms_norm_eps"
    norm_offset: float = 0.0
    norm_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    qk_norm_if: bool | str = True
    parallel: bool | str = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    gated: bool = True
    activation: str = "hidden_act"
    mlp_size: Callable[[Config], int] = lambda c: int(c.intermediate_size)
    scale: Callable[[Config, int], float] = by_head_dim
    softcap: str | None = None
    window: Callable[[Config, int], int | None] = no_window
    rope: Callable[[Config, int], bool] = always
    interleaved: bool = False
    embedding_scale: Callable[[Config], float] = one
    residual_scale: Callable[[Config], float] = one
    logit_scale: Callable[[Config], float] = one
    logit_softcap: str | None = None


LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
MISTRAL = Family(window=window_everywhere)
QWEN2 = Family(qkv_bias=True, window=window_by_layer_type)
QWEN3 = Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=QKNorm.HEAD, window=window_by_layer_type)
GEMMA = Family(
    norm_offset=1.0,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    embedding_scale=lambda c: float(c.hidden_size**0.5),
)
GEMMA2 = replace(
    GEMMA,
    names=naming.GEMMA2,
    activation="hidden_activation",
    scale=by_query_scalar,
    softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
    window=window_by_layer_type,
)
OLMO2 = Family(names=naming.OLMO2, qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=QKNorm.FULL)
COHERE = Family(
    names=naming.COHERE,
    norm=NormKind.LAYER,
    norm_eps="layer_norm_eps",
    qk_norm=QKNorm.EACH_HEAD,
    qk_norm_if="use_qk_norm",
    parallel=True,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    interleaved=True,
    logit_scale=lambda c: float(c.logit_scale),
)
GLM = Family(names=naming.GLM, qkv_bias="attention_bias", interleaved=True)
GPT2 = Family(
    names=naming.GPT2,
    norm=NormKind.LAYER,
    norm_eps="layer_norm_epsilon",
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation="activation_function",
    mlp_size=lambda c: int(c.n_inner or 4 * c.hidden_size),
    scale=by_gpt2_flags,
    rope=never,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral": Family(window=window_by_layer_type),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, qk_norm=QKNorm.HEAD, softcap=None),
    "phi": Family(
        names=naming.PHI,
        norm=NormKind.LAYER,
        norm_eps="layer_norm_eps",
        norm_bias=True,
        qk_norm=QKNorm.HEAD,
        qk_norm_if="qk_layernorm",
        parallel=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
    ),
    "phi3": Family(names=naming.PHI3, window=window_everywhere),
    "smollm3": replace(LLAMA, window=window_by_layer_type, rope=by_no_rope_layers),
    "granite": replace(
        LLAMA,
        scale=by_multiplier,
        embedding_scale=lambda c: float(c.embedding_multiplier),
        residual_scale=lambda c: float(c.residual_multiplier),
        logit_scale=lambda c: 1.0 / float(c.logits_scaling),
    ),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, window=window_by_layer_type),
    "glm": GLM,
    "glm4": replace(GLM, names=naming.GLM4),
    "cohere": COHERE,
    "cohere2": replace(
        COHERE, qk_norm=QKNorm.NONE, qk_norm_if=True, window=window_by_layer_type, rope=in_windowed_layers
    ),
    "starcoder2": Family(
        names=naming.STARCODER2,
        norm=NormKind.LAYER,
        norm_eps="norm_epsilon",
        norm_bias=True,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated=False,
        window=window_everywhere,
    ),
    "gpt_neox": Family(
        names=naming.GPT_NEOX,
        norm=NormKind.LAYER,
        norm_eps="layer_norm_eps",
        norm_bias=True,
        parallel="use_parallel_residual",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        gated=False,
    ),
    "gpt2": GPT2,
}


def read_config(config: dict[str, Any], max_len: int | None) -> ModelSpec:
    """`ModelSpec.from_config`."""
    outer, c = _through_transformers(config)
    family = FAMILIES.get(c.model_type)
    if family is None:
        raise ConfigError(
            f"model_type {c.model_type!r} in config.json is not supported; supported are: {', '.join(sorted(FAMILIES))}"
        )
    if getattr(c, "use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention in config.json: only causal language models are supported")
    _check(c)
    return _spec(c, family, max_len, tied=bool(outer.tie_word_embeddings))


def _through_transformers(config: dict[str, Any]) -> tuple[Config, Config]:
    """The config with transformers' defaults and normalisation: as it stands, and the text model's part of it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = copy.deepcopy(config)  # transformers writes into nested dicts
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json has no model_type; supported are: {', '.join(sorted(FAMILIES))}")
    try:
        outer = AutoConfig.for_model(model_type, **fields)
        return outer, outer.get_text_config(decoder=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"config.json of model_type {model_type!r} is not valid: {error}; "
            f"supported are: {', '.join(sorted(FAMILIES))}"
        ) from error


def _check(c: Config) -> None:
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": _num_kv_heads(c),
        "max_position_embeddings": c.max_position_embeddings,
    }
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key} in config.json must be a positive integer, not {value!r}")
    if c.num_attention_heads % _num_kv_heads(c):
        raise ConfigError(
            f"num_attention_heads ({c.num_attention_heads}) in config.json must be a multiple of "
            f"num_key_value_heads ({_num_kv_heads(c)})"
        )


def _num_kv_heads(c: Config) -> Any:
    heads = getattr(c, "num_key_value_heads", None)
    return c.num_attention_heads if heads is None else heads


def _spec(c: Config, family: Family, max_len: int | None, *, tied: bool) -> ModelSpec:
    return ModelSpec(
        family=c.model_type,
        names=family.names,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=_num_kv_heads(c),
        head_dim=head_dim(c),
        max_len=c.max_position_embeddings,
        layers=_layers(c, family, max_len),
        norm=NormSpec(family.norm, float(getattr(c, family.norm_eps)), family.norm_offset, family.norm_bias),
        qk_norm=family.qk_norm if _flag(c, family.qk_norm_if) else QKNorm.NONE,
        parallel=_flag(c, family.parallel),
        qkv_bias=_flag(c, family.qkv_bias),
        out_bias=_flag(c, family.out_bias),
        head_bias=family.head_bias,
        tied=tied,
        learned_positions=family.names.positions is not None,
        embedding_scale=family.embedding_scale(c),
        residual_scale=family.residual_scale(c),
        logit_scale=family.logit_scale(c),
        logit_softcap=getattr(c, family.logit_softcap) if family.logit_softcap else None,
        dtype=str(c.dtype).removeprefix("torch.") if c.dtype is not None else None,
        bos_token_id=c.bos_token_id,
        eos_token_ids=_token_ids(c.eos_token_id),
    )


def _layers(c: Config, family: Family, max_len: int | None) -> tuple[LayerSpec, ...]:
    mlp = MLPSpec(family.mlp_size(c), _activation(c, family), family.gated, _flag(c, family.mlp_bias))
    softcap = getattr(c, family.softcap) if family.softcap else None
    kinds = _layer_types(c)
    # One object for layers of a kind, which then share one table of angles.
    ropes = {
        kind: rope_spec(c, head_dim=head_dim(c), layer_type=kind, max_len=max_len, interleaved=family.interleaved)
        for kind in set(kinds)
    }
    return tuple(
        LayerSpec(
            AttentionSpec(scale=family.scale(c, i), window=family.window(c, i), softcap=softcap),
            ropes[kinds[i]] if family.rope(c, i) else None,
            mlp,
        )
        for i in range(c.num_hidden_layers)
    )


def _layer_types(c: Config) -> list[str | None]:
    kinds = getattr(c, "layer_types", None)
    if not kinds:
        return [None] * c.num_hidden_layers
    if len(kinds) != c.num_hidden_layers:
        raise ConfigError(f"layer_types in config.json has {len(kinds)} entries for {c.num_hidden_layers} layers")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"layer_types in config.json: {', '.join(map(repr, sorted(unknown)))} not supported; supported are: "
            "full_attention, sliding_attention"
        )
    return list(kinds)


def _activation(c: Config, family: Family) -> Activation:
    name = getattr(c, family.activation)
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"{family.activation} {name!r} in config.json is not supported; supported are: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _flag(c: Config, value: bool | str) -> bool:
    return bool(getattr(c, value)) if isinstance(value, str) else value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
