"""Products that read each weight once: of few rows, and of quantised weights with any number of rows.

Features are the rows of the tile: so the weight is the operand that tensor cores take from registers, and few tokens
waste little of them. Where a tile's columns are split, parts go through memory, and the last program of the tile adds
them in their order: the result does not depend on who that is.

What stands around a layer's products can be part of them, for then a layer is six launches and not nine
(`fused_product.py`): the RMS norm of what goes in, the activation of what comes out, sums that are due. The norm's
factor of a row is known only at the end of the row, and multiplies the sum there.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activated
from .code_numbers import computed, numbers_of, scale_of
from .coded_weight import CodedWeight
from .ops import Activation, NormWeight
from .quant_tiles import Tile

_BAND = tl.constexpr(8)  # tiles of rows that take turns before the features move on: both operands stay in the L2 cache


class Stream(NamedTuple):
    """The residual stream and what parts of layers put out that it does not hold yet, the last dims contiguous."""

    residual_TD: Tensor  # float32
    deltas: tuple[Tensor, ...]  # one or two, [T, D] in 16 bits


class Around(NamedTuple):
    """What a product does besides. stream: of which it multiplies the norm; without a norm, it settles the stream."""

    stream: Stream | None = None
    norm: NormWeight | None = None
    bias_F: Tensor | None = None
    activation: Activation | None = None  # of the first half of the features, which then multiplies the other


_NOTHING = Around()


@triton.jit
def place_of(program, num_rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile (of rows, of features) of a program, in bands of rows."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    band_size = _BAND * tl.cdiv(features, BLOCK_N)
    first = program // band_size * _BAND
    height = tl.minimum(row_tiles - first, _BAND)
    return first + program % band_size % height, program % band_size // height


@triton.jit
def _load_stream(residual_ptr, first_ptr, second_ptr, at, mask, DELTAS: tl.constexpr):
    """Residual and deltas, added in float32, in the order in which the layers come."""
    x = tl.load(residual_ptr + at, mask=mask, other=0.0) + tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DELTAS == 2:
        x += tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _sum_blocks(
    x_ptr, residual_ptr, first_ptr, second_ptr, norm_ptr, words_ptr, scales_ptr,
    row_M, col_N, in_N, first, end, num_rows, features, inner, x_stride_t, row_words,
    DELTAS: tl.constexpr, NORMED: tl.constexpr,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    RAGGED: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Blocks [first, end) of columns: float32 [N, M], and the squares of what was normalised, [M, RUN]."""
    BLOCK: tl.constexpr = RUN * PLACES
    run_K = tl.arange(0, RUN)
    in_M = row_M < num_rows
    x_at_MK = row_M.to(tl.int64)[:, None] * x_stride_t + run_K[None, :]
    words_at_NK = words_ptr + col_N.to(tl.int64)[:, None] * row_words + run_K[None, :]
    sum_NM = tl.zeros([col_N.shape[0], row_M.shape[0]], dtype=tl.float32)
    part_NM = tl.zeros([col_N.shape[0], row_M.shape[0]], dtype=tl.float32)
    square_MK = tl.zeros([row_M.shape[0], RUN], dtype=tl.float32)
    # Told its stages, the compiler prefetches the scales too, which no product waits for.
    for block in tl.range(first, end, num_stages=STAGES):
        in_NK = in_N[:, None]
        if RAGGED and ENCODING == "dense":  # codes fill their last block
            in_NK = in_NK & (block * BLOCK + run_K < inner)[None, :]
        words_NK = tl.load(words_at_NK + block * RUN, mask=in_NK, other=0)
        for place in tl.static_range(PLACES):
            column = block * BLOCK + place * RUN
            if ENCODING == "dense":
                scales_N = col_N
            elif place == 0 or (GROUP and GROUP % BLOCK):  # else the block has one group
                group = tl.minimum(column, inner - 1) // GROUP if GROUP else 0  # of what fills the last block: any
                scales_N = tl.load(scales_ptr + group * features + col_N, mask=in_N, other=0)
            in_K = column + run_K < inner
            in_MK = in_M[:, None] & in_K[None, :] if RAGGED else in_M[:, None]
            if NORMED:
                x_MK = _load_stream(residual_ptr, first_ptr, second_ptr, x_at_MK + column, in_MK, DELTAS)
                square_MK += x_MK * x_MK
                norm_K = tl.load(norm_ptr + column + run_K, mask=in_K, other=0.0)
                x_MK = (x_MK * norm_K[None, :]).to(dtype)
            else:
                x_MK = tl.load(x_ptr + x_at_MK + column, mask=in_MK, other=0.0)
            w_NK = numbers_of(words_NK, scales_N, place, ENCODING, ZEROS, dtype, INTERPRETED)
            part_NM = tl.dot(computed(w_NK, INTERPRETED), tl.trans(computed(x_MK, INTERPRETED)), part_NM)
            if GROUP and (GROUP % BLOCK or place == PLACES - 1):
                sum_NM += part_NM * scale_of(scales_N, ENCODING)[:, None]
                part_NM = tl.zeros_like(part_NM)
    if ENCODING == "dense":
        sum_NM = part_NM
    elif GROUP == 0:
        scales_N = tl.load(scales_ptr + col_N, mask=in_N, other=0)
        sum_NM = part_NM * scale_of(scales_N, ENCODING)[:, None]
    return sum_NM, square_MK


@triton.jit
def _finish(
    sum_NM, square_M, bias_ptr, out_ptr, row_M, col_N, in_N, num_rows, features, inner, eps,
    NORMED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What follows the whole sum, and its store."""
    if NORMED:
        sum_NM *= (1.0 / tl.sqrt(square_M / inner + eps))[None, :]
    if bias_ptr is not None:
        sum_NM += tl.load(bias_ptr + col_N, mask=in_N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != "none":
        # The tile's upper half are gates, its lower half what they multiply.
        HALF: tl.constexpr = sum_NM.shape[0] // 2
        halves = tl.permute(tl.reshape(sum_NM, [2, HALF, sum_NM.shape[1]]), [1, 2, 0])
        gate_NM, up_NM = tl.split(halves)
        sum_NM = activated(gate_NM, ACTIVATION) * up_NM
        features = features // 2
        col_N, _ = tl.split(tl.permute(tl.reshape(col_N, [2, HALF]), [1, 0]))
        in_N = col_N < features
    at_NM = row_M.to(tl.int64)[None, :] * features + col_N[:, None]
    tl.store(out_ptr + at_NM, sum_NM.to(out_ptr.dtype.element_ty), mask=(row_M < num_rows)[None, :] & in_N[:, None])


# The number of rows must not even choose between compiled variants.
@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr, words_ptr, scales_ptr, out_ptr, residual_ptr, first_ptr, second_ptr, norm_ptr, bias_ptr,
    parts_ptr, squares_ptr, tickets_ptr, num_rows, features, inner, x_stride_t, row_words, gain, eps,
    DELTAS: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place_of(tl.program_id(0), num_rows, features, BLOCK_M, BLOCK_N)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    if ACTIVATION == "none":
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_N = col_N < features
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        pair_N = tile_n * HALF + tl.arange(0, BLOCK_N) % HALF
        in_N = pair_N < features // 2
        col_N = pair_N + tl.arange(0, BLOCK_N) // HALF * (features // 2)
    mask_NM = (row_M < num_rows)[None, :] & in_N[:, None]
    at_NM = row_M.to(tl.int64)[None, :] * features + col_N[:, None]
    if DELTAS and not NORMED:  # noqa: SIM102 (the one is known when it is compiled)
        if split == 0:  # nobody reads the stream here, and each of its numbers belongs to one program
            total_NM = _load_stream(residual_ptr, first_ptr, second_ptr, at_NM, mask_NM, DELTAS)
            tl.store(residual_ptr + at_NM, total_NM, mask=mask_NM)
    blocks = tl.cdiv(inner, RUN * PLACES)
    share = tl.cdiv(blocks, SPLITS)
    sum_NM, square_MK = _sum_blocks(
        x_ptr, residual_ptr, first_ptr, second_ptr, norm_ptr, words_ptr, scales_ptr,
        row_M, col_N, in_N, split * share, tl.minimum(blocks, split * share + share),
        num_rows, features, inner, x_stride_t, row_words,
        DELTAS, NORMED, ENCODING, PLACES, RUN, GROUP, ZEROS, RAGGED, STAGES, INTERPRETED, out_ptr.dtype.element_ty,
    )  # fmt: skip
    sum_NM *= gain
    square_M = tl.sum(square_MK, axis=1)
    if SPLITS == 1:
        _finish(
            sum_NM, square_M, bias_ptr, out_ptr, row_M, col_N, in_N, num_rows, features, inner, eps, NORMED, ACTIVATION
        )  # fmt: skip
    else:
        size = num_rows.to(tl.int64) * features
        program, programs = tl.program_id(0), tl.num_programs(0)
        square_at_M = program * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts_ptr + split * size + at_NM, sum_NM, mask=mask_NM)
        if NORMED:
            tl.store(squares_ptr + split * programs * BLOCK_M + square_at_M, square_M)
        tl.debug_barrier()  # a release covers what its own thread knows of: the whole tile, from here
        if tl.atomic_add(tickets_ptr + program, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            sum_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            square_M = tl.zeros([BLOCK_M], dtype=tl.float32)
            for part in range(SPLITS):  # past the first-level cache, which others' stores do not reach
                sum_NM += tl.load(parts_ptr + part * size + at_NM, mask=mask_NM, other=0.0, cache_modifier=".cg")
                if NORMED:
                    square_M += tl.load(squares_ptr + part * programs * BLOCK_M + square_at_M, cache_modifier=".cg")
            _finish(
                sum_NM, square_M, bias_ptr, out_ptr, row_M, col_N, in_N, num_rows, features, inner, eps,
                NORMED, ACTIVATION,
            )  # fmt: skip
            tl.store(tickets_ptr + program, 0)


def constants_of(weight: CodedWeight) -> dict[str, str | int | bool]:
    """What kernels that read the weight are compiled for."""
    return {
        "ENCODING": weight.encoding.value,
        "PLACES": weight.encoding.codes_a_word,
        "RUN": weight.run,
        "GROUP": weight.group,
        "ZEROS": "any" if weight.fractional else "whole",
        "INTERPRETED": triton.knobs.runtime.interpret,
    }


def product(x_TD: Tensor | None, weight: CodedWeight, out_TF: Tensor, tile: Tile, around: Around = _NOTHING) -> None:
    """`x @ W.T` into out, in its dtype, which is that of x, sums in float32. x None: the norm of the stream.

    All last dims are contiguous, and out and the stream are so as a whole.
    """
    rows, features, inner = len(out_TF), weight.out_features, weight.in_features
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(features, tile.features)
    split = tile.splits > 1
    assert not split or programs <= weight.tickets.numel()
    residual_TD, deltas = around.stream or (None, ())
    assert all(part.is_contiguous() for part in (residual_TD, *deltas) if part is not None)
    on = out_TF.device
    squares = tile.splits * programs * tile.rows if split and around.norm is not None else 0
    _product_kernel[(programs, tile.splits)](
        x_TD,
        weight.words_FW,
        weight.scales_GF,
        out_TF,
        residual_TD,
        deltas[0] if deltas else None,
        deltas[1] if len(deltas) > 1 else None,
        None if around.norm is None else around.norm.weight_D,
        around.bias_F,
        torch.empty((tile.splits, rows, features), dtype=torch.float32, device=on) if split else None,
        torch.empty(squares, dtype=torch.float32, device=on) if squares else None,
        weight.tickets if split else None,
        rows,
        features,
        inner,
        inner if x_TD is None else x_TD.stride(0),
        weight.words_FW.stride(0),
        weight.gain,
        0.0 if around.norm is None else around.norm.eps,
        DELTAS=len(deltas),
        NORMED=around.norm is not None,
        ACTIVATION="none" if around.activation is None else around.activation.value,
        **constants_of(weight),
        RAGGED=inner % weight.block != 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.features,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
