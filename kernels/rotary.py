"""Rotary embedding (RoFormer, arXiv:2104.09864) of queries and keys in place: one program a token, all heads."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr,
    stride_h,
    cos,
    sin,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    head = tl.arange(0, HEADS_P2)[:, None]
    pair = tl.arange(0, HALF_P2)[None, :]
    mask = (head < HEADS) & (pair < HALF)
    if INTERLEAVED:
        first_ptr = x_ptr + head * stride_h + 2 * pair
        second_ptr = first_ptr + 1
    else:
        first_ptr = x_ptr + head * stride_h + pair
        second_ptr = first_ptr + HALF
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    Q_HEADS: tl.constexpr,
    Q_HEADS_P2: tl.constexpr,
    K_HEADS: tl.constexpr,
    K_HEADS_P2: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_P2)
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF) + pair
    cos = tl.load(row_ptr, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(row_ptr + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    _rotate(q_ptr + token * q_stride_t, q_stride_h, cos, sin, Q_HEADS, Q_HEADS_P2, HALF, HALF_P2, INTERLEAVED)
    _rotate(k_ptr + token * k_stride_t, k_stride_h, cos, sin, K_HEADS, K_HEADS_P2, HALF, HALF_P2, INTERLEAVED)


def rope(q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor, *, interleaved: bool) -> None:
    """See `Ops.rope`."""
    tokens, q_heads, k_heads = q_THE.shape[0], q_THE.shape[1], k_TKE.shape[1]
    half = cos_sin_MC.shape[1] // 2
    if tokens == 0 or half == 0:
        return
    assert q_THE.stride(2) == k_TKE.stride(2) == 1
    assert cos_sin_MC.is_contiguous()
    half_p2, q_heads_p2 = triton.next_power_of_2(half), triton.next_power_of_2(q_heads)
    _rope_kernel[(tokens,)](
        q_THE,
        k_TKE,
        positions_T,
        cos_sin_MC,
        q_THE.stride(0),
        q_THE.stride(1),
        k_TKE.stride(0),
        k_TKE.stride(1),
        Q_HEADS=q_heads,
        Q_HEADS_P2=q_heads_p2,
        K_HEADS=k_heads,
        K_HEADS_P2=triton.next_power_of_2(k_heads),
        HALF=half,
        HALF_P2=half_p2,
        INTERLEAVED=interleaved,
        num_warps=min(max(q_heads_p2 * half_p2 // 512, 1), 8),
    )
