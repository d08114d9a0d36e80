"""Products of quantised weights and 16-bit activations: each code is read once, and becomes a number in registers.

Codes are exact in 16 bits, so the tensor cores multiply the very codes, and scales touch only sums, in float32. A code
becomes a number when its bits go into the mantissa of a constant which is then subtracted (Kim et al., "Who Says
Elephants Can't Run", arXiv:2211.10017); e4m3's go into the fields of the wider float. Features are the rows of the
tile: so the weight is the operand that tensor cores take from registers, and few tokens waste little of them.

Where a tile's columns are split, parts go through memory, and the last program of the tile adds them in their order:
the result does not depend on who that is. For very many rows making the numbers again in every tile of rows outweighs
writing them down: the weight is unpacked once, slab by slab, for cuBLAS.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coded_weight import CodedWeight
from .quant_tiles import DENSE_FROM, slab_features, weight_only_tile

_BAND = tl.constexpr(8)  # tiles of rows that take turns before the features move on: both operands stay in the L2 cache


@triton.constexpr_function
def _field_asm(shift: int) -> str:
    move = f"shr.b32 moved, $1, {shift};" if shift >= 0 else f"shl.b32 moved, $1, {-shift};"
    return f"{{ .reg .b32 moved; {move} lop3.b32 $0, moved, $2, $3, 0xEA; }}"  # 0xEA: moved & $2 | $3


@triton.jit
def _field(words, SHIFT: tl.constexpr, MASK: tl.constexpr, more, INTERPRETED: tl.constexpr):
    """`(words >> SHIFT) & MASK | more` of int16 words. No bit that MASK keeps crosses a word's end.

    Left to the compiler, each word is taken out of its register; here two are done at once.
    """
    if INTERPRETED:
        moved = words >> SHIFT if SHIFT >= 0 else words << -SHIFT
        bits = (moved & MASK | more).to(tl.int16)
    else:
        mask = tl.cast(MASK, tl.int16)
        more = tl.cast(more, tl.int16)
        bits = tl.inline_asm_elementwise(
            _field_asm(SHIFT), "=r,r,r,r", [words, mask, more], dtype=tl.int16, is_pure=True, pack=2
        )
    return bits


@triton.jit
def _computed(numbers, INTERPRETED: tl.constexpr):
    """The interpreter computes wrongly with bfloat16."""
    return numbers.to(tl.float32) if INTERPRETED else numbers


@triton.jit
def _read(bits, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """int16 bits as numbers of `dtype`, or of one that the interpreter computes with; its cast loses subnormal ones."""
    if INTERPRETED and dtype == tl.bfloat16:
        numbers = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        numbers = _computed(bits.to(dtype, bitcast=True), INTERPRETED)
    return numbers


@triton.jit
def _half(bits):
    """float16 in the lower half of int32, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_of(scales_N, ENCODING: tl.constexpr):
    """float32 [N]."""
    return _half(scales_N >> 16) if ENCODING == "int4" else scales_N


@triton.jit
def numbers_of(
    words_NK, scales_N, place: tl.constexpr, ENCODING: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The codes at one place of the words as numbers of `dtype`, 4-bit ones less their zero points.

    ZEROS: none are taken off; "whole" ones, and the result is exact; or "any".
    """
    UNIT: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400  # 128 or 1024: the mantissa counts ones
    if ENCODING == "int4":
        numbers_NK = _read(_field(words_NK, 4 * place, 15, UNIT, INTERPRETED), dtype, INTERPRETED)
        zero_N = tl.zeros_like(scales_N).to(tl.float32) if ZEROS == "none" else _half(scales_N)
        excess_N = zero_N + (128.0 if dtype == tl.bfloat16 else 1024.0)
        near_N = excess_N.to(dtype)
        numbers_NK -= _computed(near_N, INTERPRETED)[:, None]
        if ZEROS == "any":
            numbers_NK -= _computed((excess_N - near_N.to(tl.float32)).to(dtype), INTERPRETED)[:, None]
    elif ENCODING == "int8":  # the lower bits, less the sign, which counts 128
        lower_NK = _read(_field(words_NK, 8 * place, 0x7F, UNIT, INTERPRETED), dtype, INTERPRETED)
        numbers_NK = lower_NK - _read(_field(words_NK, 8 * place, 0x80, UNIT, INTERPRETED), dtype, INTERPRETED)
    else:  # as the exponent's lowest bits e4m3's make the number too small by a power of two, and subnormal ones too
        UP: tl.constexpr = 4 if dtype == tl.bfloat16 else 7
        sign_NK = _field(words_NK, 8 * place - 8, -0x8000, 0, INTERPRETED)
        small_NK = _read(_field(words_NK, 8 * place - UP, 0x7F << UP, sign_NK, INTERPRETED), dtype, INTERPRETED)
        numbers_NK = small_NK * (2.0**120 if dtype == tl.bfloat16 else 2.0**8)
    return numbers_NK.to(dtype)


@triton.jit
def place_of(program, num_rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile (of rows, of features) of a program, in bands of rows."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    band_size = _BAND * tl.cdiv(features, BLOCK_N)
    first = program // band_size * _BAND
    height = tl.minimum(row_tiles - first, _BAND)
    return first + program % band_size % height, program % band_size // height


@triton.jit
def _sum_blocks(
    x_ptr, words_ptr, scales_ptr, row_M, col_N, first, end, num_rows, features, inner, x_stride_t, row_words,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    RAGGED: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Blocks [first, end) of columns: float32 [N, M]."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK: tl.constexpr = RUN * PLACES
    run_K = tl.arange(0, RUN)
    in_M, in_N = row_M < num_rows, col_N < features
    x_at_MK = x_ptr + row_M.to(tl.int64)[:, None] * x_stride_t + run_K[None, :]
    words_at_NK = words_ptr + col_N.to(tl.int64)[:, None] * row_words + run_K[None, :]
    sum_NM = tl.zeros([col_N.shape[0], row_M.shape[0]], dtype=tl.float32)
    part_NM = tl.zeros([col_N.shape[0], row_M.shape[0]], dtype=tl.float32)
    # Told its stages, the compiler prefetches the scales too, which no product waits for.
    for block in tl.range(first, end, num_stages=STAGES):
        words_NK = tl.load(words_at_NK + block * RUN, mask=in_N[:, None], other=0)
        for place in tl.static_range(PLACES):
            column = block * BLOCK + place * RUN
            if place == 0 or (GROUP and GROUP % BLOCK):  # else the block has one group
                group = tl.minimum(column, inner - 1) // GROUP if GROUP else 0  # of what fills the last block: any
                scales_N = tl.load(scales_ptr + group * features + col_N, mask=in_N, other=0)
            in_MK = in_M[:, None] & (column + run_K < inner)[None, :] if RAGGED else in_M[:, None]
            x_MK = _computed(tl.load(x_at_MK + column, mask=in_MK, other=0.0), INTERPRETED)
            w_NK = numbers_of(words_NK, scales_N, place, ENCODING, ZEROS, dtype, INTERPRETED)
            part_NM = tl.dot(_computed(w_NK, INTERPRETED), tl.trans(x_MK), part_NM)
            if GROUP and (GROUP % BLOCK or place == PLACES - 1):
                sum_NM += part_NM * scale_of(scales_N, ENCODING)[:, None]
                part_NM = tl.zeros_like(part_NM)
    if GROUP == 0:
        scales_N = tl.load(scales_ptr + col_N, mask=in_N, other=0)
        sum_NM = part_NM * scale_of(scales_N, ENCODING)[:, None]
    return sum_NM


# The number of rows must not even choose between compiled variants.
@triton.jit(do_not_specialize=["num_rows"])
def _weight_only_kernel(
    x_ptr, words_ptr, scales_ptr, out_ptr, parts_ptr, tickets_ptr,
    num_rows, features, inner, x_stride_t, row_words, gain,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place_of(tl.program_id(0), num_rows, features, BLOCK_M, BLOCK_N)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    blocks = tl.cdiv(inner, RUN * PLACES)
    share = tl.cdiv(blocks, SPLITS)
    sum_NM = gain * _sum_blocks(
        x_ptr, words_ptr, scales_ptr, row_M, col_N, split * share, tl.minimum(blocks, split * share + share),
        num_rows, features, inner, x_stride_t, row_words,
        ENCODING, PLACES, RUN, GROUP, ZEROS, RAGGED, STAGES, INTERPRETED,
    )  # fmt: skip
    at_NM = row_M.to(tl.int64)[None, :] * features + col_N[:, None]
    mask_NM = (row_M < num_rows)[None, :] & (col_N < features)[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + at_NM, sum_NM.to(out_ptr.dtype.element_ty), mask=mask_NM)
    else:
        size = num_rows.to(tl.int64) * features
        tl.store(parts_ptr + split * size + at_NM, sum_NM, mask=mask_NM)
        tl.debug_barrier()  # a release covers what its own thread knows of: the whole tile, from here
        ticket_ptr = tickets_ptr + tl.program_id(0)
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            sum_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            for part in range(SPLITS):  # past the first-level cache, which others' stores do not reach
                sum_NM += tl.load(parts_ptr + part * size + at_NM, mask=mask_NM, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at_NM, sum_NM.to(out_ptr.dtype.element_ty), mask=mask_NM)
            tl.store(ticket_ptr, 0)


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
            codes_NK -= _half(scales_N)[:, None]
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
        **_constants(weight),
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


def _constants(weight: CodedWeight) -> dict[str, str | int | bool]:
    return {
        "ENCODING": weight.encoding.value,
        "PLACES": weight.encoding.codes_a_word,
        "RUN": weight.run,
        "GROUP": weight.group,
        "ZEROS": "any" if weight.fractional else "whole",
        "INTERPRETED": triton.knobs.runtime.interpret,
    }


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
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(features, tile.features)
    split = tile.splits > 1
    assert not split or programs <= weight.tickets.numel()
    _weight_only_kernel[(programs, tile.splits)](
        x_TD,
        weight.words_FW,
        weight.scales_GF,
        out_TF,
        torch.empty((tile.splits, rows, features), dtype=torch.float32, device=x_TD.device) if split else None,
        weight.tickets if split else None,
        rows,
        features,
        inner,
        x_TD.stride(0),
        weight.words_FW.stride(0),
        weight.gain,
        **_constants(weight),
        RAGGED=inner % weight.block != 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.features,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out_TF
