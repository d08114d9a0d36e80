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

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every logit; finite, so that a row that has seen nothing yet is rescaled by exp2(0) and not by NaN.
LOWEST = tl.constexpr(-1.0e30)
# The largest weight is 2^6, not 1: in float16, weights times a small scale of values then stay normal numbers.
HEADROOM = tl.constexpr(6.0)


@triton.jit
def first_key(query_pos, WINDOW: tl.constexpr):
    """Position of the first key that a query at this position sees."""
    first = query_pos * 0
    if WINDOW > 0:
        first = tl.maximum(query_pos - WINDOW + 1, 0)
    return first


@triton.jit
def _tile_pages(block_row_ptr, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of the tile that begins at `start`, if it lies in one; else of each of its keys. 0 past the end."""
    if PAGE >= BLOCK_N:
        key_N = start
    else:
        key_N = start + tl.arange(0, BLOCK_N)
    return tl.load(block_row_ptr + key_N // PAGE, mask=key_N < end, other=0).to(tl.int64)


@triton.jit
def _load_tile(ptr, at_NE, key_N, dim_E, end, DIM: tl.constexpr, DIM_P2: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values of a tile; zeros from `end` on where MASKED, and beyond the head dim."""
    if MASKED:
        return tl.load(ptr + at_NE, mask=(key_N < end)[:, None] & (dim_E < DIM)[None, :], other=0.0)
    if DIM == DIM_P2:
        return tl.load(ptr + at_NE)
    return tl.load(ptr + at_NE, mask=(dim_E < DIM)[None, :], other=0.0)


@triton.jit
def _attend_tile(
    q_ME, acc_ME, max_M, sum_M, page_N, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, start, end, query_pos_M, stride_n,
    stride_b, scale_stride_n, logit_scale, exponent_scale,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the BLOCK_N keys from `start` on, in pages `page_N`; the rest is `attend_keys`'."""
    key_N = start + tl.arange(0, BLOCK_N)
    dim_E = tl.arange(0, DIM_P2)
    at_NE = (page_N * stride_n + (key_N % PAGE) * stride_b)[:, None] + dim_E[None, :]
    k_NE = _load_tile(k_ptr, at_NE, key_N, dim_E, end, DIM, DIM_P2, MASKED)
    # "ieee": without it, float32 would be multiplied as tf32.
    logits_MN = tl.dot(q_ME, tl.trans(k_NE.to(q_ME.dtype)), input_precision="ieee")
    if k_scale_ptr is not None:  # a factor of the key's whole column, so codes are multiplied as they are
        scale_at_N = page_N * scale_stride_n + key_N % PAGE
        logits_MN *= tl.load(k_scale_ptr + scale_at_N, mask=key_N < end, other=0.0)[None, :]
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), which saturates without overflow
        logits_MN = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * logit_scale * logits_MN))
    if MASKED:
        seen_MN = (key_N[None, :] <= query_pos_M[:, None]) & (key_N < end)[None, :]
        if WINDOW > 0:
            seen_MN &= key_N[None, :] >= first_key(query_pos_M, WINDOW)[:, None]
        logits_MN = tl.where(seen_MN, logits_MN, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.fma(tl.max(logits_MN, axis=1), exponent_scale, -HEADROOM))
    # Fused by hand: were it left to the compiler, the masked and the unmasked form could round differently, and a
    # row's result would depend on where the tile's edges fell.
    weights_MN = tl.exp2(tl.fma(logits_MN, exponent_scale, -new_max_M[:, None]))
    shrink_M = tl.exp2(max_M - new_max_M)
    sum_M = tl.fma(sum_M, shrink_M, tl.sum(weights_MN, axis=1))
    if v_scale_ptr is not None:
        weights_MN *= tl.load(v_scale_ptr + scale_at_N, mask=key_N < end, other=0.0)[None, :]
    v_NE = _load_tile(v_ptr, at_NE, key_N, dim_E, end, DIM, DIM_P2, MASKED)
    acc_ME = acc_ME * shrink_M[:, None]
    acc_ME = tl.dot(weights_MN.to(q_ME.dtype), v_NE.to(q_ME.dtype), acc_ME, input_precision="ieee")
    return acc_ME, new_max_M, sum_M


@triton.jit
def attend_keys(
    q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, begin, stop, end,
    query_pos_M, stride_n, stride_k, stride_b, scale_stride_n, scale_stride_k, logit_scale, exponent_scale,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the tiles that begin in [begin, stop), begin a multiple of BLOCK_N; no key exists from `end` on.

    Pointers to scales are None where the cache has none. Not MASKED: every row sees all of these keys, and they end
    before `end`. Weights are exp2(exponent_scale * f(q.k)), where f is tanh(logit_scale * .) with
    SOFTCAP and identity without. Returns the new (accumulator, maximum, sum); the maximum is in the exponent's scale.
    """
    k_ptr += kv_head.to(tl.int64) * stride_k
    v_ptr += kv_head.to(tl.int64) * stride_k
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head.to(tl.int64) * scale_stride_k
        v_scale_ptr += kv_head.to(tl.int64) * scale_stride_k
    # Pages are looked up a tile ahead: were it done where they are read, the compiler would divide the loop's stages
    # between the two, and keys and values would have one buffer each.
    page_N = _tile_pages(block_row_ptr, begin, end, PAGE, BLOCK_N)
    for start in tl.range(begin, stop, BLOCK_N):
        acc_ME, max_M, sum_M = _attend_tile(
            q_ME, acc_ME, max_M, sum_M, page_N, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, start, end, query_pos_M,
            stride_n, stride_b, scale_stride_n, logit_scale, exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW,
            SOFTCAP, MASKED,
        )  # fmt: skip
        page_N = _tile_pages(block_row_ptr, start + BLOCK_N, end, PAGE, BLOCK_N)
    return acc_ME, max_M, sum_M


@triton.jit
def join_sinks(sum_M, max_M, sinks_ptr, head_M, live_M):
    """The softmax's sum with each head's sink in it, if there are sinks: a key that has no value."""
    if sinks_ptr is not None:
        sum_M += tl.exp2(tl.load(sinks_ptr + head_M, mask=live_M, other=0.0) * LOG2_E - max_M)
    return sum_M


def scales(spec: AttentionSpec) -> tuple[float, float]:
    """(logit_scale, exponent_scale) of `attend_keys`."""
    if spec.softcap is None:
        return 1.0, spec.scale * LOG2_E.value
    return spec.scale / spec.softcap, spec.softcap * LOG2_E.value


def tile_constants(q_THE: Tensor, cache: KVLayer, spec: AttentionSpec) -> dict[str, int | bool]:
    """The compile-time constants that decode and prefill share."""
    heads, dim = q_THE.shape[1:]
    kv_heads, page_size = cache.k_NKBE.shape[1:3]
    assert heads % kv_heads == 0
    assert dim <= 256, "head dims beyond 256 do not fit a tile"
    assert page_size >= 16
    assert page_size & (page_size - 1) == 0, "page sizes are powers of two"
    assert q_THE.stride(2) == 1
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
