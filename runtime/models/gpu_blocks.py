"""Blocks of a GPU in which what stands around products is part of a launch, by the number of a step's rows.

Few rows: a step takes as long as reading the weights, and every launch less is a gap less in that; a layer is six.
Many rows whose inputs are rounded to 8 bits: norms and activations write codes, and no 16-bit rows beside them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels.coded_weight import CodedWeight, dense_weight
from ...kernels.eight_bit_matmul import coding_of, eight_bit_matmul
from ...kernels.fused_product import normed_product, plain_product
from ...kernels.ops import KVLayer, NormWeight, Ops
from ...kernels.product import Stream
from ...kernels.quant_tiles import DECODE_ROWS, FEW_ROWS
from ...kernels.quantise import CodedRows, activate_and_quantise, norm_and_quantise
from ...parallel.comm import Comm
from ...parallel.gpu import CodedLinear
from ...parallel.linear import Layer, row_linear, then
from ...parallel.quant import DenseLinear, LinearMethod
from .decoder import Attention, Block, SequentialBlock, Step, X
from .fuse import Fuse, LayerParts


def gpu_fuse(ops: Ops, comm: Comm, *, dtype: torch.dtype) -> Fuse:
    """What a rank does with its blocks. ops: Triton's, which do not compute deterministically. dtype: of 16 bits."""

    def fuse(block: Block, parts: LayerParts) -> Block:
        match parts.norms:
            case [NormWeight() as first, NormWeight() as second] if parts.spec.mlp.gated:
                norms = first, second
            case _:
                return block
        coded = _coded_rows(norms, parts, ops=ops, comm=comm, dtype=dtype)
        block = block if coded is None else ByRows(DECODE_ROWS, few=block, many=coded)
        # Float16 may not hold the stream before it is normalised.
        few = _few_rows(norms, parts, ops=ops, comm=comm) if dtype is torch.bfloat16 else None
        return block if few is None else ByRows(FEW_ROWS, few=few, many=block)

    return fuse


class ByRows:
    """One block for steps of up to `most` rows, another one for more."""

    __slots__ = ("few", "many", "most")

    def __init__(self, most: int, *, few: Block, many: Block) -> None:
        self.most = most
        self.few = few
        self.many = many

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        block = self.few if len(delta_TD) <= self.most else self.many
        return block(delta_TD, residual_TD, step, cache)


Norms = tuple[NormWeight, NormWeight]


def _attention(parts: LayerParts, ops: Ops, *, qkv: Callable[[X], Tensor], out: Layer) -> Attention[X]:
    spec = parts.spec.attention
    return Attention(spec, ops=ops, heads=parts.heads, head_dim=parts.head_dim, qkv=qkv, out=out)


def _few_rows(norms: Norms, parts: LayerParts, *, ops: Ops, comm: Comm) -> Block | None:
    match [_weight(method) for method, _ in parts.weights]:
        case [CodedWeight() as qkv, CodedWeight() as out, CodedWeight() as up, CodedWeight() as down]:
            pass
        case _:
            return None
    (_, qkv_bias), (_, out_bias), (_, up_bias), (_, down_bias) = parts.weights
    if comm.shard:  # of the ranks whose sums are added up, one adds a bias
        out_bias = down_bias = None
    attention = _attention(
        parts,
        ops,
        qkv=partial(normed_product, norm=norms[0], weight=qkv, bias_F=qkv_bias),
        out=then(partial(plain_product, weight=out, bias_F=out_bias), comm.all_reduce),
    )
    gate = partial(normed_product, norm=norms[1], weight=up, bias_F=up_bias, activation=parts.spec.mlp.activation)
    settle = partial(plain_product, weight=down, bias_F=down_bias)
    return FewRowsBlock(attention, lambda stream: comm.all_reduce(settle(gate(stream), settled=stream)))


def _weight(method: LinearMethod) -> CodedWeight | None:
    match method:
        case CodedLinear():
            return method.weight
        case DenseLinear():
            return dense_weight(method.weight_FD)
        case _:
            return None


class FewRowsBlock:
    """What a part leaves to be added travels on until the layer's last product adds it to the residual."""

    __slots__ = ("_attention", "_mlp")

    def __init__(self, attention: Attention[Stream], mlp: Callable[[Stream], Tensor]) -> None:
        """Both read a stream; the MLP settles it."""
        self._attention = attention
        self._mlp = mlp

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        attended_TD = self._attention(Stream(residual_TD, (delta_TD,)), step, cache)
        return self._mlp(Stream(residual_TD, (delta_TD, attended_TD)))


def _coded_rows(norms: Norms, parts: LayerParts, *, ops: Ops, comm: Comm, dtype: torch.dtype) -> Block | None:
    weights = parts.weights
    match weights.qkv[0], weights.up[0], weights.down[0]:
        case [
            CodedLinear(rounds_inputs=True) as qkv,
            CodedLinear(rounds_inputs=True) as up,
            CodedLinear(rounds_inputs=True) as down,
        ]:
            pass
        case _:
            return None
    activate = partial(activate_and_quantise, activation=parts.spec.mlp.activation, coding=coding_of(down.weight))
    attention = _attention(
        parts, ops, qkv=_product(qkv.weight, weights.qkv[1], dtype), out=row_linear(*weights.out, comm=comm)
    )
    gate_up = _product(up.weight, weights.up[1], dtype)
    down_product = _product(down.weight, weights.down[1] if comm.shard == 0 else None, dtype)
    return SequentialBlock(
        before_attention=partial(norm_and_quantise, norm=norms[0], coding=coding_of(qkv.weight)),
        attention=attention,
        before_mlp=partial(norm_and_quantise, norm=norms[1], coding=coding_of(up.weight)),
        mlp=lambda rows: comm.all_reduce(down_product(activate(gate_up(rows)))),
    )


def _product(weight: CodedWeight, bias_F: Tensor | None, dtype: torch.dtype) -> Callable[[CodedRows], Tensor]:
    if bias_F is None:
        return lambda rows: eight_bit_matmul(rows, weight, dtype)
    return lambda rows: eight_bit_matmul(rows, weight, dtype).add_(bias_F)
