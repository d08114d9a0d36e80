"""Rows of activations as codes of 8 bits with a scale each, made as they come: the left operand of `eight_bit_matmul`.

A row's largest magnitude becomes the largest code (LLM.int8(), arXiv:2208.07339, section 2.1, without its outliers).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coded_weight import RUN, Encoding

# Elements a program should hold: narrow rows share one.
_PROGRAM_ELEMENTS = 4096
_BLOCK = tl.constexpr(2 * RUN)
_RUN = tl.constexpr(RUN)


class CodedRows(NamedTuple):
    """codes_TD: int8 or float8_e4m3fn, columns in the order of a `CodedWeight`'s bytes, to a whole block of 128.

    scales_GT: float32 [1, T], or one for each block.
    """

    codes_TD: Tensor
    scales_GT: Tensor


@triton.jit
def load_pairs(x_ptr, row_M, num_rows, columns, stride_t, BLOCKS: tl.constexpr):
    """Rows as float32 [M, BLOCKS * 64, 2], each column beside the one a run further on, as a word has them."""
    pair = tl.arange(0, BLOCKS * _RUN)
    column_P = pair // _RUN * _BLOCK + pair % _RUN
    at_MP = x_ptr + row_M.to(tl.int64)[:, None] * stride_t + column_P[None, :]
    in_M = (row_M < num_rows)[:, None]
    low_MP = tl.load(at_MP, mask=in_M & (column_P < columns)[None, :], other=0.0).to(tl.float32)
    high_MP = tl.load(at_MP + _RUN, mask=in_M & (column_P + _RUN < columns)[None, :], other=0.0).to(tl.float32)
    return tl.join(low_MP, high_MP)


@triton.jit
def codes_of(x, scale, code_dtype: tl.constexpr):
    """`x / scale`, as large as a code may be, rounded to the nearest, ties to even.

    Rounded by hand, so that the cast is exact: there is none to int8 that rounds, and the interpreter's to e4m3 drops
    carries. A number that is added and taken away drives what is beyond its last bit out of the mantissa.
    """
    largest: tl.constexpr = 127.0 if code_dtype == tl.int8 else 448.0
    x = tl.minimum(tl.maximum(x / scale, -largest), largest)
    if code_dtype == tl.int8:
        driver = 1.5 * 2.0**23
    else:  # three bits below the first, which is 2^-6 at least
        first = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
        driver = 1.5 * (first + ((23 - 3) << 23)).to(tl.float32, bitcast=True)
    return ((x + driver) - driver).to(code_dtype)


@triton.jit
def row_scale(largest, unusable, code_dtype: tl.constexpr):
    """The scale of numbers up to `largest`. unusable: 0, or a NaN, lest it vanish in a code."""
    scale = largest / (127.0 if code_dtype == tl.int8 else 448.0)
    return tl.where(largest > 0.0, scale, 1.0) + unusable


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr, codes_ptr, scales_ptr, num_rows, columns, x_stride_t, row_codes,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i, blocks [j * BLOCKS, ...) which have one scale."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCKS * _BLOCK
    x_MP2 = load_pairs(x_ptr + first, row_M, num_rows, columns - first, x_stride_t, BLOCKS)
    x_MD = tl.reshape(x_MP2, [BLOCK_M, BLOCKS * _BLOCK])
    code_dtype: tl.constexpr = codes_ptr.dtype.element_ty
    scale_M = row_scale(tl.max(tl.abs(x_MD), axis=1), tl.sum(x_MD * 0.0, axis=1), code_dtype)
    byte_D = first + tl.arange(0, BLOCKS * _BLOCK)
    at_MD = codes_ptr + row_M.to(tl.int64)[:, None] * row_codes + byte_D[None, :]
    mask_MD = (row_M < num_rows)[:, None] & (byte_D < row_codes)[None, :]
    tl.store(at_MD, codes_of(x_MD, scale_M[:, None], code_dtype), mask=mask_MD)
    tl.store(scales_ptr + tl.program_id(1).to(tl.int64) * num_rows + row_M, scale_M, mask=row_M < num_rows)


def quantise_rows(x_TD: Tensor, encoding: Encoding, *, by_block: bool = False) -> CodedRows:
    """INT8 or E4M3 codes of x [T, D], the last dim contiguous. by_block: a scale for each 128 columns of a row.

    A row with a NaN or an infinity gets a scale of NaN. E4M3 needs compute capability 8.9.
    """
    rows, columns = x_TD.shape
    blocks = triton.cdiv(columns, 2 * RUN)
    dtype = torch.int8 if encoding is Encoding.INT8 else torch.float8_e4m3fn
    codes_TD = torch.empty((rows, blocks * 2 * RUN), dtype=dtype, device=x_TD.device)
    scales_GT = torch.empty((blocks if by_block else 1, rows), dtype=torch.float32, device=x_TD.device)
    if rows == 0:
        return CodedRows(codes_TD, scales_GT)
    assert x_TD.stride(1) == 1
    held = 1 if by_block else triton.next_power_of_2(blocks)
    block_m = min(max(1, _PROGRAM_ELEMENTS // (held * 2 * RUN)), 16)
    _quantise_kernel[(triton.cdiv(rows, block_m), len(scales_GT))](
        x_TD,
        codes_TD,
        scales_GT,
        rows,
        columns,
        x_TD.stride(0),
        codes_TD.stride(0),
        BLOCKS=held,
        BLOCK_M=block_m,
        num_warps=4 if held <= 32 else 8,
    )
    return CodedRows(codes_TD, scales_GT)
