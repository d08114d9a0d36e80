"""Products of quantised weights and 16-bit activations: each code is read once, and becomes a number in registers.

For very many rows making the numbers again in every tile of rows outweighs writing them down: the weight is unpacked
once, slab by slab, for cuBLAS.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .code_numbers import half_of, numbers_of, scale_of
from .coded_weight import CodedWeight
from .product import constants_of, product
from .quant_tiles import DENSE_FROM, slab_features, weight_only_tile


@triton.jit
def _unpack_kernel(
    words_ptr, scales_ptr, out_ptr, first, end, features, inner, row_words, gain,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (i, j): block i of columns, tile j of the features from `first` on; out is dense and begins there."""
    block = tl.program_id(0)
    col_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N) + first
    run_K = tl.arange(0, RUN)
    in_N = col_N < end
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    words_at_NK = words_ptr + col_N.to(tl.int64)[:, None] * row_words + block * RUN + run_K[None, :]
    words_NK = tl.load(words_at_NK, mask=in_N[:, None], other=0)
    for place in tl.static_range(PLACES):
        column = (block * PLACES + place) * RUN
        group = tl.minimum(column, inner - 1) // GROUP if GROUP else 0
        scales_N = tl.load(scales_ptr + group * features + col_N, mask=in_N, other=0)
        codes_NK = numbers_of(words_NK, scales_N, place, ENCODING, "none", dtype, INTERPRETED).to(tl.float32)
        if ENCODING == "int4":
            codes_NK -= half_of(scales_N)[:, None]
        w_NK = codes_NK * (scale_of(scales_N, ENCODING) * gain)[:, None]
        at_NK = out_ptr + (col_N - first).to(tl.int64)[:, None] * inner + column + run_K[None, :]
        tl.store(at_NK, w_NK.to(dtype), mask=in_N[:, None] & (column + run_K < inner)[None, :])


def unpack(weight: CodedWeight, dtype: torch.dtype, *, first: int = 0, end: int | None = None) -> Tensor:
    """Features [first, end) of the weight (all) as numbers: [end - first, in_features] in `dtype`, of 16 bits."""
    end = weight.out_features if end is None else end
    inner = weight.in_features
    out_FD = torch.empty((end - first, inner), dtype=dtype, device=weight.words_FW.device)
    if out_FD.numel() == 0:
        return out_FD
    _unpack_kernel[(triton.cdiv(inner, weight.block), triton.cdiv(end - first, 32))](
        weight.words_FW,
        weight.scales_GF,
        out_FD,
        first,
        end,
        weight.out_features,
        inner,
        weight.words_FW.stride(0),
        weight.gain,
        **constants_of(weight),
        BLOCK_N=32,
        num_warps=4,
    )
    return out_FD


def _by_slabs(x_TD: Tensor, weight: CodedWeight, out_TF: Tensor) -> Tensor:
    """The whole weight in 16 bits would be more than a layer's activations take."""
    step = slab_features(weight.out_features, weight.in_features)
    for first in range(0, weight.out_features, step):
        end = min(first + step, weight.out_features)
        torch.mm(x_TD, unpack(weight, x_TD.dtype, first=first, end=end).t(), out=out_TF[:, first:end])
    return out_TF


def weight_only_matmul(x_TD: Tensor, weight: CodedWeight, *, deterministic: bool = False) -> Tensor:
    """`x @ W.T`: [T, D] in bfloat16 or float16 -> [T, F] in x's dtype, sums in float32. The last dim is contiguous.

    deterministic: a row's bits depend on the row and the weight alone, else also on the number of rows.
    """
    rows, inner = x_TD.shape
    features = weight.out_features
    out_TF = torch.empty((rows, features), dtype=x_TD.dtype, device=x_TD.device)
    if out_TF.numel() == 0:
        return out_TF
    assert inner == weight.in_features
    assert x_TD.stride(1) == 1
    if rows >= DENSE_FROM and not deterministic:
        return _by_slabs(x_TD, weight, out_TF)
    tile = weight_only_tile(rows, features, triton.cdiv(inner, weight.block), deterministic=deterministic)
    product(x_TD, weight, out_TF, tile)
    return out_TF
