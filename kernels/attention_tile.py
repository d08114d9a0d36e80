"""One step of online softmax over a tile of paged keys: what the decode and the prefill kernel have in common.

Online softmax as in FlashAttention-2 (arXiv:2307.08691): the accumulator stays unnormalised until the end, and the
softmax scale is folded into the exponent, which is taken to base 2. Pages as in PagedAttention (arXiv:2309.06180); the
tile is independent of the page size: a tile gathers from several pages, or several tiles share one.

A tile that a row does not see at all leaves the row's state bit for bit as it was (its maximum starts at a finite
number, its weights are exact zeros): what a row gets never depends on which rows share its tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl
from torch import Tensor

from .ops import AttentionSpec, KVLayer

LOG2_E = 1.4426950408889634
# Below every logit; finite, so that a row that has seen nothing yet is rescaled by exp2(0) and not by NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def first_key(query_pos, WINDOW: tl.constexpr):
    """Position of the first key that a query at this position sees."""
    first = query_pos * 0
    if WINDOW > 0:
        first = tl.maximum(query_pos - WINDOW + 1, 0)
    return first


@triton.jit
def attend_tile(
    q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, block_row_ptr, start, end, query_pos_M, stride_n, stride_b,
    logit_scale, exponent_scale,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in keys [start, start + BLOCK_N), start a multiple of BLOCK_N; none from `end` on exists.

    k_ptr and v_ptr are at the head. Not MASKED: every row sees the whole tile, and it ends before `end`.
    Weights are exp2(exponent_scale * f(q.k)), where f is tanh(logit_scale * .) with SOFTCAP and identity without.
    Returns the new (accumulator, maximum, sum); the maximum is in the exponent's scale.
    """
    key_N = start + tl.arange(0, BLOCK_N)
    dim_E = tl.arange(0, DIM_P2)
    if PAGE >= BLOCK_N:  # the tile lies in one page
        row_N = tl.load(block_row_ptr + start // PAGE).to(tl.int64) * stride_n + (key_N % PAGE) * stride_b
    else:
        page_N = tl.load(block_row_ptr + key_N // PAGE, mask=key_N < end, other=0)
        row_N = page_N.to(tl.int64) * stride_n + (key_N % PAGE) * stride_b
    at_NE = row_N[:, None] + dim_E[None, :]
    if MASKED:
        load_mask = (key_N < end)[:, None] & (dim_E < DIM)[None, :]
        k_NE = tl.load(k_ptr + at_NE, mask=load_mask, other=0.0)
    elif DIM == DIM_P2:
        k_NE = tl.load(k_ptr + at_NE)
    else:
        k_NE = tl.load(k_ptr + at_NE, mask=(dim_E < DIM)[None, :], other=0.0)
    # "ieee": without it, float32 would be multiplied as tf32.
    logits_MN = tl.dot(q_ME, tl.trans(k_NE.to(q_ME.dtype)), input_precision="ieee")
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), which saturates without overflow
        logits_MN = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * logit_scale * logits_MN))
    if MASKED:
        seen_MN = (key_N[None, :] <= query_pos_M[:, None]) & (key_N < end)[None, :]
        if WINDOW > 0:
            seen_MN &= key_N[None, :] >= first_key(query_pos_M, WINDOW)[:, None]
        logits_MN = tl.where(seen_MN, logits_MN, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(logits_MN, axis=1) * exponent_scale)
    # Fused by hand: were it left to the compiler, the masked and the unmasked form could round differently, and a
    # row's result would depend on where the tile's edges fell.
    weights_MN = tl.exp2(tl.fma(logits_MN, exponent_scale, -new_max_M[:, None]))
    shrink_M = tl.exp2(max_M - new_max_M)
    if MASKED:
        v_NE = tl.load(v_ptr + at_NE, mask=load_mask, other=0.0)
    elif DIM == DIM_P2:
        v_NE = tl.load(v_ptr + at_NE)
    else:
        v_NE = tl.load(v_ptr + at_NE, mask=(dim_E < DIM)[None, :], other=0.0)
    acc_ME = acc_ME * shrink_M[:, None]
    acc_ME = tl.dot(weights_MN.to(q_ME.dtype), v_NE.to(q_ME.dtype), acc_ME, input_precision="ieee")
    return acc_ME, new_max_M, tl.fma(sum_M, shrink_M, tl.sum(weights_MN, axis=1))


def scales(spec: AttentionSpec) -> tuple[float, float]:
    """(logit_scale, exponent_scale) of `attend_tile`."""
    if spec.softcap is None:
        return 1.0, spec.scale * LOG2_E
    return spec.scale / spec.softcap, spec.softcap * LOG2_E


def tile_constants(q_THE: Tensor, cache: KVLayer, spec: AttentionSpec) -> dict[str, int | bool]:
    """The compile-time constants that decode and prefill share."""
    heads, dim = q_THE.shape[1:]
    kv_heads, page_size = cache.k_NKBE.shape[1:3]
    assert heads % kv_heads == 0
    assert dim <= 256, "head dims beyond 256 do not fit a tile"
    assert page_size >= 16
    assert page_size & (page_size - 1) == 0, "page sizes are powers of two"
    assert cache.k_NKBE.stride() == cache.v_NKBE.stride()
    assert cache.k_NKBE.stride(3) == q_THE.stride(2) == 1
    return {
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "DIM_P2": max(16, triton.next_power_of_2(dim)),
        "PAGE": page_size,
        "BLOCK_N": 64 if q_THE.element_size() <= 2 else 32,  # float32 has no tensor cores: its dots unroll
        "WINDOW": spec.window or 0,
        "SOFTCAP": spec.softcap is not None,
        "UPCAST": triton.knobs.runtime.interpret,
    }
