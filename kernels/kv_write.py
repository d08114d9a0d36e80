"""Stores a step's keys and values in their pages: one program a token, every head of both."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl
from torch import Tensor

from .kv_codes import SMALLEST, largest_code
from .ops import KVLayer
from .quantise import codes_of

_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _encode(x_HE, LARGEST: tl.constexpr, code_dtype: tl.constexpr):
    """`kv_codes.encode`: (codes, scale of each head)."""
    highest_H = tl.max(tl.where(tl.abs(x_HE) >= 0.0, tl.abs(x_HE), float("inf")), axis=1)  # a NaN must not get lost
    highest_H = tl.maximum(highest_H, _SMALLEST)
    codes_HE = codes_of(x_HE * tl.div_rn(LARGEST, highest_H)[:, None], 1.0, code_dtype)
    return codes_HE, tl.div_rn(highest_H, LARGEST)


@triton.jit
def store_heads(x_HE, paged_ptr, scale_ptr, at_HE, scale_at_H1, head_mask_H1, dim_mask_1E, LARGEST: tl.constexpr):
    """Put heads of one token, float32 and zero where masked, at these places; LARGEST: `largest_code` of the cache."""
    if LARGEST > 0:
        x_HE, scale_H = _encode(x_HE, LARGEST, paged_ptr.dtype.element_ty)
        tl.store(scale_ptr + scale_at_H1, scale_H[:, None], mask=head_mask_H1)
    tl.store(paged_ptr + at_HE, x_HE.to(paged_ptr.dtype.element_ty), mask=head_mask_H1 & dim_mask_1E)


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, k_stride_t, k_stride_h, v_stride_t,
    v_stride_h, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:  # -1: a padding row of a captured graph
        head = tl.arange(0, HEADS_P2)[:, None]
        dim = tl.arange(0, DIM_P2)[None, :]
        mask = (head < HEADS) & (dim < DIM)
        at = slot // PAGE * cache_stride_n + head * cache_stride_k + slot % PAGE * cache_stride_b + dim
        scale_at = slot // PAGE * scale_stride_n + head * scale_stride_k + slot % PAGE
        k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dim, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dim, mask=mask, other=0.0).to(tl.float32)
        store_heads(k, k_cache_ptr, k_scale_ptr, at, scale_at, head < HEADS, dim < DIM, LARGEST)
        store_heads(v, v_cache_ptr, v_scale_ptr, at, scale_at, head < HEADS, dim < DIM, LARGEST)


def cache_strides(cache: KVLayer) -> tuple[int, ...]:
    """Of a page, a head and a slot of keys, and of values; of a page and a head of their scales, 0 without."""
    keys, values = cache
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    k_scale, v_scale = cache.k_scale_NKB, cache.v_scale_NKB
    if k_scale is None or v_scale is None:
        return *keys.stride()[:3], 0, 0
    assert k_scale.stride() == v_scale.stride()
    assert k_scale.stride(2) == 1
    return *keys.stride()[:3], *k_scale.stride()[:2]


def write_kv(k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
    """See `Ops.write_kv`."""
    tokens, heads, dim = k_TKE.shape
    if tokens == 0:
        return
    assert k_TKE.stride(2) == v_TKE.stride(2) == 1
    heads_p2, dim_p2 = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _write_kv_kernel[(tokens,)](
        k_TKE,
        v_TKE,
        *cache,
        cache.k_scale_NKB,
        cache.v_scale_NKB,
        slots_T,
        *k_TKE.stride()[:2],
        *v_TKE.stride()[:2],
        *cache_strides(cache),
        HEADS=heads,
        HEADS_P2=heads_p2,
        DIM=dim,
        DIM_P2=dim_p2,
        PAGE=cache.k_NKBE.shape[2],
        LARGEST=largest_code(cache.k_NKBE.dtype),
        num_warps=min(max(heads_p2 * dim_p2 // 256, 1), 8),
    )
