"""Rows of activations as codes of 8 bits with a scale each, made as they come: the left operand of `eight_bit_matmul`.

The norm or the activation that they come from may be part of the launch, so that no 16-bit row is written and read. A
row's largest magnitude becomes the largest code (LLM.int8(), arXiv:2208.07339, section 2.1, without its outliers).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activated
from .coded_weight import RUN, Encoding
from .ops import Activation, NormWeight

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


@triton.jit
def _load_vector(ptr, columns, BLOCKS: tl.constexpr):
    """As a row of `load_pairs`: [1, BLOCKS * 64, 2]."""
    return load_pairs(ptr, tl.zeros([1], dtype=tl.int32), 1, columns, 0, BLOCKS)


@triton.jit
def _store_pairs(ptr, x_MP2, row_M, num_rows, columns, stride_t, BLOCKS: tl.constexpr):
    """Where `load_pairs` reads them."""
    pair = tl.arange(0, BLOCKS * _RUN)
    column_P = pair // _RUN * _BLOCK + pair % _RUN
    at_MP = ptr + row_M.to(tl.int64)[:, None] * stride_t + column_P[None, :]
    in_M = (row_M < num_rows)[:, None]
    low_MP, high_MP = tl.split(x_MP2)
    tl.store(at_MP, low_MP, mask=in_M & (column_P < columns)[None, :])
    tl.store(at_MP + _RUN, high_MP, mask=in_M & (column_P + _RUN < columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr, residual_ptr, norm_ptr, codes_ptr, scales_ptr,
    num_rows, columns, x_stride_t, residual_stride_t, row_codes, eps,
    NORMED: tl.constexpr, ACTIVATION: tl.constexpr, BY_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Whole rows, of BLOCKS blocks at most."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_MP2 = load_pairs(x_ptr, row_M, num_rows, columns, x_stride_t, BLOCKS)
    if NORMED:
        x_MP2 += load_pairs(residual_ptr, row_M, num_rows, columns, residual_stride_t, BLOCKS)
        _store_pairs(residual_ptr, x_MP2, row_M, num_rows, columns, residual_stride_t, BLOCKS)
        mean_M = tl.sum(tl.sum(x_MP2 * x_MP2, axis=2), axis=1) / columns
        x_MP2 *= (1.0 / tl.sqrt(mean_M + eps))[:, None, None] * _load_vector(norm_ptr, columns, BLOCKS)
    if ACTIVATION != "none":
        x_MP2 = activated(x_MP2, ACTIVATION)
        x_MP2 *= load_pairs(x_ptr + columns, row_M, num_rows, columns, x_stride_t, BLOCKS)
    code_dtype: tl.constexpr = codes_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCKS if BY_BLOCK else 1
    x_MGC = tl.reshape(x_MP2, [BLOCK_M, GROUPS, BLOCKS * _BLOCK // GROUPS])
    scale_MG = row_scale(tl.max(tl.abs(x_MGC), axis=2), tl.sum(x_MGC * 0.0, axis=2), code_dtype)
    codes_MD = tl.reshape(codes_of(x_MGC, scale_MG[:, :, None], code_dtype), [BLOCK_M, BLOCKS * _BLOCK])
    byte_D = tl.arange(0, BLOCKS * _BLOCK)
    at_MD = codes_ptr + row_M.to(tl.int64)[:, None] * row_codes + byte_D[None, :]
    tl.store(at_MD, codes_MD, mask=(row_M < num_rows)[:, None] & (byte_D < row_codes)[None, :])
    group_G = tl.arange(0, GROUPS)
    at_MG = scales_ptr + group_G.to(tl.int64)[None, :] * num_rows + row_M[:, None]
    tl.store(at_MG, scale_MG, mask=(row_M < num_rows)[:, None] & (group_G * _BLOCK < row_codes)[None, :])


class Coding(NamedTuple):
    """How rows become codes: those of the weight that they meet. by_block: a scale for each 128 columns of a row."""

    encoding: Encoding
    by_block: bool = False


def quantise_rows(x_TD: Tensor, coding: Coding) -> CodedRows:
    """INT8 or E4M3 codes of x [T, D], the last dim contiguous.

    A row with a NaN or an infinity gets a scale of NaN. E4M3 needs compute capability 8.9.
    """
    return _quantise(x_TD, coding, columns=x_TD.shape[1])


def norm_and_quantise(x_TD: Tensor, residual_TD: Tensor, norm: NormWeight, coding: Coding) -> CodedRows:
    """`Ops.add_rms_norm` and `quantise_rows` of what it gives, in one launch, rounded once."""
    return _quantise(x_TD, coding, columns=x_TD.shape[1], residual_TD=residual_TD, norm=norm)


def activate_and_quantise(gate_up_T2F: Tensor, activation: Activation, coding: Coding) -> CodedRows:
    """`Ops.gated_activation` and `quantise_rows` of what it gives, in one launch, rounded once."""
    return _quantise(gate_up_T2F, coding, columns=gate_up_T2F.shape[1] // 2, activation=activation)


def _quantise(
    x: Tensor,
    coding: Coding,
    *,
    columns: int,
    residual_TD: Tensor | None = None,
    norm: NormWeight | None = None,
    activation: Activation | None = None,
) -> CodedRows:
    rows, blocks = len(x), triton.cdiv(columns, 2 * RUN)
    dtype = torch.int8 if coding.encoding is Encoding.INT8 else torch.float8_e4m3fn
    codes_TD = torch.empty((rows, blocks * 2 * RUN), dtype=dtype, device=x.device)
    scales_GT = torch.empty((blocks if coding.by_block else 1, rows), dtype=torch.float32, device=x.device)
    if rows == 0:
        return CodedRows(codes_TD, scales_GT)
    assert x.stride(1) == 1
    assert residual_TD is None or residual_TD.stride(1) == 1
    held = triton.next_power_of_2(blocks)
    block_m = min(max(1, _PROGRAM_ELEMENTS // (held * 2 * RUN)), 16)
    _quantise_kernel[(triton.cdiv(rows, block_m),)](
        x,
        residual_TD,
        None if norm is None else norm.weight_D,
        codes_TD,
        scales_GT,
        rows,
        columns,
        x.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        codes_TD.stride(0),
        0.0 if norm is None else norm.eps,
        NORMED=norm is not None,
        ACTIVATION="none" if activation is None else activation.value,
        BY_BLOCK=coding.by_block,
        BLOCKS=held,
        BLOCK_M=block_m,
        num_warps=4 if held <= 32 else 8 if held <= 64 else 16,
    )
    return CodedRows(codes_TD, scales_GT)
