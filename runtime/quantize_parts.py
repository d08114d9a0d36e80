"""What is quantised in a layer, and where the factors of a linear layer's inputs can be taken in: names, no tensors.

Dividing an input by factors and multiplying the weight's columns by them changes nothing, as long as what makes the
input takes the division in: the norm before it, or the rows of the linear layer before it.
"""

from dataclasses import dataclass

from .models.naming import Fusion
from .models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Source:
    """What makes the input of a part: a norm, or rows of a linear layer's matrix. Full names of modules.

    rows: those that make the input; None: the module is a norm, its weight and bias are vectors of the input's length.
    heads, repeats: the rows are so many heads (of values), each of which is read by so many heads of the input.
    """

    module: str
    rows: slice | None = None
    bias: bool = False
    heads: int = 1
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Linear layers with one input. Where it has no source, `why` says why."""

    role: str
    modules: tuple[str, ...]
    source: Source | None
    why: str = ""


def layer_name(spec: ModelSpec, prefix: str, index: int) -> str:
    """What the names of a layer's modules begin with."""
    return prefix + spec.names.layer.format(index)


def layer_parts(spec: ModelSpec, prefix: str, index: int) -> list[Part]:
    """The parts of a layer, in the order in which the decoder runs them."""
    names, layer = spec.names, layer_name(spec, prefix, index)
    qkv = _behind_norm(spec, "qkv", layer, modules=names.qkv, norm=names.before_attention)
    up = _behind_norm(spec, "up", layer, modules=names.up, norm=names.before_mlp)
    out = _attention_out(spec, layer)
    down = _mlp_down(spec, layer, index)
    return [up, down, qkv, out] if spec.parallel else [qkv, out, up, down]


def _behind_norm(spec: ModelSpec, role: str, layer: str, *, modules: tuple[str, ...], norm: str | None) -> Part:
    full = tuple(layer + name for name in modules)
    if spec.parallel and spec.names.before_mlp is None:
        return Part(role, full, None, "attention and MLP share a norm")
    if norm is None:
        return Part(role, full, None, "no norm stands before it")
    if spec.norm.offset:  # of 1 + w in 16 bits, a w near -1 keeps too few
        return Part(role, full, None, f"its norm multiplies by {spec.norm.offset:g} + w")
    return Part(role, full, Source(layer + norm, bias=spec.norm.bias))


def _attention_out(spec: ModelSpec, layer: str) -> Part:
    modules = (layer + spec.names.out,)
    num_q, num_kv, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if spec.names.qkv_fusion is Fusion.GROUPED:
        return Part("out", modules, None, "its values lie between queries and keys")
    first = 0 if spec.names.qkv_fusion is Fusion.SEPARATE else (num_q + num_kv) * dim
    rows = slice(first, first + num_kv * dim)
    source = Source(layer + spec.names.qkv[-1], rows, spec.qkv_bias, heads=num_kv, repeats=num_q // num_kv)
    return Part("out", modules, source)


def _mlp_down(spec: ModelSpec, layer: str, index: int) -> Part:
    mlp, modules = spec.layers[index].mlp, (layer + spec.names.down,)
    if not mlp.gated:
        return Part("down", modules, None, "a non-linearity stands before it")
    first = 0 if len(spec.names.up) == 2 else mlp.size
    return Part("down", modules, Source(layer + spec.names.up[-1], slice(first, first + mlp.size), mlp.bias))
