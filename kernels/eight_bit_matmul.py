"""Products of 8-bit codes with 8-bit codes, for many rows: twice the tensor cores' rate in 16 bits.

Few rows are better off with activations in 16 bits (`quant_matmul.py`): the time goes into reading the weight, which is
the same, and nothing is rounded.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coded_weight import CodedWeight, Encoding
from .product import place_of
from .quant_matmul import weight_only_matmul
from .quant_tiles import DECODE_ROWS, eight_bit_tile
from .quantise import CodedRows, Coding, quantise_rows


@triton.jit(do_not_specialize=["num_rows"])
def _eight_bit_kernel(
    x_ptr, w_ptr, x_scales_ptr, w_scales_ptr, out_ptr, num_rows, features, row_codes,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Codes lie in whole blocks of BLOCK_K. GROUPED: each block has scales of its own, else rows and features have."""
    tile_m, tile_n = place_of(tl.program_id(0), num_rows, features, BLOCK_M, BLOCK_N)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    code_K = tl.arange(0, BLOCK_K)
    in_M, in_N = row_M < num_rows, col_N < features
    x_at_MK = x_ptr + row_M.to(tl.int64)[:, None] * row_codes + code_K[None, :]
    w_at_NK = w_ptr + col_N.to(tl.int64)[:, None] * row_codes + code_K[None, :]
    sum_dtype: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    part_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=sum_dtype)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for block in tl.range(0, row_codes // BLOCK_K, num_stages=STAGES):
        x_MK = tl.load(x_at_MK + block * BLOCK_K, mask=in_M[:, None], other=0.0)
        w_NK = tl.load(w_at_NK + block * BLOCK_K, mask=in_N[:, None], other=0.0)
        if GROUPED:
            x_scale_M = tl.load(x_scales_ptr + block * num_rows + row_M, mask=in_M, other=0.0)
            w_scale_N = tl.load(w_scales_ptr + block * features + col_N, mask=in_N, other=0.0)
            part_MN = tl.dot(x_MK, tl.trans(w_NK), out_dtype=sum_dtype)
            sum_MN += part_MN.to(tl.float32) * (x_scale_M[:, None] * w_scale_N[None, :])
        else:
            part_MN = tl.dot(x_MK, tl.trans(w_NK), part_MN, out_dtype=sum_dtype)
    if not GROUPED:
        x_scale_M = tl.load(x_scales_ptr + row_M, mask=in_M, other=0.0)
        w_scale_N = tl.load(w_scales_ptr + col_N, mask=in_N, other=0.0)
        sum_MN = part_MN.to(tl.float32) * x_scale_M[:, None] * w_scale_N[None, :]
    at_MN = out_ptr + row_M.to(tl.int64)[:, None] * features + col_N[None, :]
    tl.store(at_MN, sum_MN.to(out_ptr.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])


def eight_bit_matmul(rows: CodedRows, weight: CodedWeight, dtype: torch.dtype) -> Tensor:
    """[T, F] in `dtype`: codes times codes, summed in int32 or float32, then times both scales.

    The encodings are the same, and so are the groups: one scale a row, or (E4M3) one for each block of 128 columns.
    """
    codes_TD, scales_GT = rows
    num_rows, features = len(codes_TD), weight.out_features
    out_TF = torch.empty((num_rows, features), dtype=dtype, device=codes_TD.device)
    if out_TF.numel() == 0:
        return out_TF
    weight_codes_FD = weight.words_FW.view(codes_TD.dtype)
    assert weight_codes_FD.shape[1] == codes_TD.shape[1]
    assert len(scales_GT) == len(weight.scales_GF)
    grouped = weight.group != 0
    tile = eight_bit_tile(num_rows, features, grouped=grouped)
    _eight_bit_kernel[(triton.cdiv(num_rows, tile.rows) * triton.cdiv(features, tile.features),)](
        codes_TD,
        weight_codes_FD,
        scales_GT,
        weight.scales_GF,
        out_TF,
        num_rows,
        features,
        codes_TD.shape[1],
        GROUPED=grouped,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.features,
        BLOCK_K=weight.block,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out_TF


def takes_eight_bit_rows(weight: CodedWeight, capability: tuple[int, int]) -> bool:
    """Whether `dynamic_matmul` multiplies this weight on a GPU of this compute capability."""
    if weight.encoding is Encoding.INT8:
        return weight.group == 0
    return weight.encoding is Encoding.E4M3 and capability >= (8, 9)


def dynamic_matmul(x_TD: Tensor, weight: CodedWeight) -> Tensor:
    """`x @ W.T` in x's dtype; from 65 rows on x is quantised to the weight's encoding, row by row, as it comes.

    For weights that `takes_eight_bit_rows`. Fewer rows are multiplied as `weight_only_matmul` does.
    """
    if len(x_TD) <= DECODE_ROWS:
        return weight_only_matmul(x_TD, weight)
    return eight_bit_matmul(quantise_rows(x_TD, coding_of(weight)), weight, x_TD.dtype)


def coding_of(weight: CodedWeight) -> Coding:
    """Of the rows that meet this weight."""
    return Coding(weight.encoding, by_block=weight.group != 0)
