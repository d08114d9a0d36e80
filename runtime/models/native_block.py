"""A block whose halves are one C++ call each, on CPUs that have the kernels: chosen by the loader, layer by layer.

A layer is nine calls of some microseconds, which at one token a step is as long as its arithmetic takes.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.native import DecodeShape, Native, decode_shape, reads_cache
from ...kernels.native_layer import (
    MOST_PARTS,
    DecodeRows,
    NativeAttend,
    NativeMlp,
    PackedWeight,
    fits_heads,
    fits_mlp,
)
from ...kernels.ops import Activation, AttentionSpec, KVLayer, NormWeight
from ...parallel.comm import Comm
from ...parallel.native import NativeDenseLinear, NativeInt4Linear, NativeInt8Linear
from ...parallel.quant import StackedLinear
from .decoder import Block, Step
from .fuse import Fuse, LayerParts, Weights


def native_fuse(native: Native, comm: Comm) -> Fuse:
    """What a rank does with its blocks."""
    return partial(_fuse, native, comm, DecodeSteps())


def _fuse(native: Native, comm: Comm, steps: "DecodeSteps", block: Block, parts: LayerParts) -> Block:
    qkv = _packed_parts(parts.weights.qkv)
    packed = [_packed(weights) for weights in parts.weights[1:]]
    match parts.norms, packed:
        case [NormWeight() as first, NormWeight() as second], [
            PackedWeight() as out,
            PackedWeight() as up,
            PackedWeight() as down,
        ] if qkv:
            pass
        case _:
            return block
    mlp = parts.spec.mlp
    swiglu = mlp.gated and mlp.activation is Activation.SILU
    if not (swiglu and fits_mlp(up, down) and fits_heads(parts.heads, parts.head_dim)):
        return block
    return NativeBlock(
        parts.spec.attention,
        composed=block,
        attend=NativeAttend(native, first, qkv=qkv, out=out, heads=parts.heads),
        mlp=NativeMlp(native, second, up=up, down=down),
        comm=comm,
        steps=steps,
        heads=parts.heads.num_query,
    )


def _packed_parts(weights: Weights) -> list[PackedWeight]:
    """One weight, or those of a fused layer that are stored differently; none where there is no kernel for one."""
    method, bias = weights
    methods = method.parts if isinstance(method, StackedLinear) else (method,)
    packed = [part for each in methods if (part := _packed((each, bias))) is not None]
    return packed if len(packed) == len(methods) <= MOST_PARTS else []


def _packed(weights: Weights) -> PackedWeight | None:
    method, bias = weights
    if bias is not None or not isinstance(method, NativeInt4Linear | NativeInt8Linear | NativeDenseLinear):
        return None
    return PackedWeight(method.packed, method.bits, method.out_features, method.in_features)


class _Planned(NamedTuple):
    """What layers that are alike share in a step."""

    rows: DecodeRows
    shape: DecodeShape


class DecodeSteps:
    """Makes that once a step. One for a rank's layers."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._by_layer: dict[tuple[object, ...], _Planned] = {}

    def at(self, step: Step, cache: KVLayer, spec: AttentionSpec, *, heads: int) -> _Planned | None:
        """None for steps in which a sequence has more than one new token, or none."""
        batch = step.attention
        if batch.max_query_len != 1 or 0 in batch.query_lens:
            return None
        if step is not self._step:  # held, so that no later step can be taken for it, nor its tensors be freed
            self._step, self._by_layer = step, {}
        key = (spec, heads, cache.k_NKBE.shape[1:])
        planned = self._by_layer.get(key)
        if planned is None:
            _, kv_heads, _, dim = cache.k_NKBE.shape
            shape = decode_shape(cache, batch, spec, heads=heads, query_stride=(heads + 2 * kv_heads) * dim)
            rows = DecodeRows(step.positions_T.data_ptr(), step.slots_T.data_ptr())
            planned = self._by_layer[key] = _Planned(rows, shape)
        return planned


class NativeBlock:
    """`SequentialBlock` in two calls where every sequence has one new token; `composed` where not."""

    __slots__ = ("_attend", "_comm", "_composed", "_heads", "_mlp", "_spec", "_steps")

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        composed: Block,
        attend: NativeAttend,
        mlp: NativeMlp,
        comm: Comm,
        steps: DecodeSteps,
        heads: int,
    ) -> None:
        """heads: the rank's query heads."""
        self._spec = spec
        self._composed = composed
        self._attend = attend
        self._mlp = mlp
        self._comm = comm
        self._steps = steps
        self._heads = heads

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        fits = reads_cache(cache, torch.bfloat16)
        planned = self._steps.at(step, cache, self._spec, heads=self._heads) if fits else None
        if planned is None:
            return self._composed(delta_TD, residual_TD, step, cache)
        attended_TD = self._attend(delta_TD, residual_TD, cache, rows=planned.rows, shape=planned.shape)
        self._comm.all_reduce(attended_TD)
        return self._comm.all_reduce(self._mlp(attended_TD, residual_TD))
