"""Stores a step's keys and values in their pages: one program a token, every head of both."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl
from torch import Tensor

from .ops import KVLayer


@triton.jit
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    cache_stride_n,
    cache_stride_k,
    cache_stride_b,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    PAGE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:  # -1: a padding row of a captured graph
        head = tl.arange(0, HEADS_P2)[:, None]
        dim = tl.arange(0, DIM_P2)[None, :]
        mask = (head < HEADS) & (dim < DIM)
        at = slot // PAGE * cache_stride_n + head * cache_stride_k + slot % PAGE * cache_stride_b + dim
        k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dim, mask=mask)
        v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dim, mask=mask)
        tl.store(k_cache_ptr + at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def write_kv(k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
    """See `Ops.write_kv`."""
    tokens, heads, dim = k_TKE.shape
    if tokens == 0:
        return
    keys, values = cache
    assert keys.stride() == values.stride()
    assert keys.stride(3) == k_TKE.stride(2) == v_TKE.stride(2) == 1
    heads_p2, dim_p2 = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _write_kv_kernel[(tokens,)](
        k_TKE,
        v_TKE,
        keys,
        values,
        slots_T,
        k_TKE.stride(0),
        k_TKE.stride(1),
        v_TKE.stride(0),
        v_TKE.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        HEADS=heads,
        HEADS_P2=heads_p2,
        DIM=dim,
        DIM_P2=dim_p2,
        PAGE=keys.shape[2],
        num_warps=min(max(heads_p2 * dim_p2 // 256, 1), 8),
    )
