"""A block of six launches for steps of few rows, on GPUs: what stands around its products is part of them.

At so few rows a step is as long as reading the weights takes, and every launch less is a gap less in that.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ...kernels.coded_weight import CodedWeight, dense_weight
from ...kernels.fused_product import normed_product, plain_product
from ...kernels.ops import KVLayer, NormWeight, Ops
from ...kernels.product import Stream
from ...kernels.quant_tiles import FEW_ROWS
from ...parallel.comm import Comm
from ...parallel.gpu import CodedLinear
from ...parallel.quant import DenseLinear, LinearMethod
from .decoder import Block, Step
from .fuse import Fuse, LayerParts


def few_rows_fuse(ops: Ops, comm: Comm) -> Fuse:
    """What a rank does with its blocks. ops: Triton's, which do not compute deterministically."""
    return partial(_fuse, ops, comm)


def _fuse(ops: Ops, comm: Comm, block: Block, parts: LayerParts) -> Block:
    match parts.norms, [_coded(method) for method, _ in parts.weights]:
        case [NormWeight() as first, NormWeight() as second], [
            CodedWeight() as qkv,
            CodedWeight() as out,
            CodedWeight() as up,
            CodedWeight() as down,
        ] if parts.spec.mlp.gated:
            pass
        case _:
            return block
    # Of the ranks whose sums are added up, one adds a bias.
    qkv_bias, out_bias, up_bias, down_bias = (bias for _, bias in parts.weights)
    if comm.shard:
        out_bias = down_bias = None
    return FewRowsBlock(
        parts,
        composed=block,
        ops=ops,
        comm=comm,
        qkv=partial(normed_product, norm=first, weight=qkv, bias_F=qkv_bias),
        out=partial(plain_product, weight=out, bias_F=out_bias),
        gated=partial(normed_product, norm=second, weight=up, bias_F=up_bias, activation=parts.spec.mlp.activation),
        down=partial(plain_product, weight=down, bias_F=down_bias),
    )


def _coded(method: LinearMethod) -> CodedWeight | None:
    match method:
        case CodedLinear():
            return method.weight
        case DenseLinear():
            return dense_weight(method.weight_FD)
        case _:
            return None


class FewRowsBlock:
    """`SequentialBlock` for up to FEW_ROWS rows, of bfloat16; `composed` for more."""

    __slots__ = ("_attend", "_comm", "_composed", "_down", "_gated", "_out", "_parts", "_prepare", "_qkv")

    def __init__(
        self,
        parts: LayerParts,
        *,
        composed: Block,
        ops: Ops,
        comm: Comm,
        qkv: Callable[[Stream], Tensor],
        out: Callable[[Tensor], Tensor],
        gated: Callable[[Stream], Tensor],
        down: Callable[..., Tensor],
    ) -> None:
        """qkv, gated: of the norm of the stream. down: settles the stream that it is given as `settled`."""
        self._parts = parts
        self._composed = composed
        self._prepare = ops.rotate_and_store
        self._attend = ops.attention
        self._comm = comm
        self._qkv = qkv
        self._out = out
        self._gated = gated
        self._down = down

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        rows, parts = len(delta_TD), self._parts
        if rows > FEW_ROWS:
            return self._composed(delta_TD, residual_TD, step, cache)
        qkv_TNE = self._qkv(Stream(residual_TD, (delta_TD,))).view(rows, -1, parts.head_dim)
        q_THE = self._prepare(qkv_TNE, cache, parts.heads, positions_T=step.positions_T, slots_T=step.slots_T)
        heads_THE = self._attend(q_THE, cache, step.attention, parts.spec.attention)
        attended_TD = self._comm.all_reduce(self._out(heads_THE.flatten(1)))
        stream = Stream(residual_TD, (delta_TD, attended_TD))
        return self._comm.all_reduce(self._down(self._gated(stream), settled=stream))
