"""What lies between a layer's fused projection and its attention, in one launch: norms per head, rotation, KV write.

A program has a few heads of one token: of queries, or the same heads of keys and values. RMS norm: arXiv:1910.07467;
rotary embedding: arXiv:2104.09864; pages: arXiv:2309.06180.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv_codes import largest_code
from .kv_write import cache_strides, store_heads
from .ops import HeadSpec, KVLayer

# Of a program: 16 bytes a thread of four warps. Fewer would not hide the memory, more leave a decode step's few tokens
# on few processors.
_PROGRAM_ELEMENTS = 1024


@triton.jit
def _prepared(
    head_ptr,
    weight_ptr,
    angles_ptr,
    dim,
    mask,
    eps,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    """Heads [BLOCK_H, DIM_P2] as float32: normalised, then the first 2 * HALF dims rotated.

    Each number's partner in the rotation is loaded, too, from the nearest cache: no thread needs another's.
    """
    x = tl.load(head_ptr + dim, mask=mask, other=0.0).to(tl.float32)
    if NORMALISED:
        by = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / DIM + eps))[:, None]
        x *= by * tl.load(weight_ptr + dim, mask=dim < DIM, other=0.0)
    if HALF > 0:
        turns = dim < 2 * HALF
        if INTERLEAVED:
            partner = dim ^ 1
            angle = dim // 2
            is_first = dim % 2 == 0
        else:
            is_first = dim < HALF
            partner = tl.where(is_first, dim + HALF, dim - HALF)
            angle = tl.where(is_first, dim, dim - HALF)
        y = tl.load(head_ptr + partner, mask=mask & turns, other=0.0).to(tl.float32)
        if NORMALISED:
            y *= by * tl.load(weight_ptr + partner, mask=turns, other=0.0)
        cos = tl.load(angles_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(angles_ptr + HALF + angle, mask=turns, other=0.0)
        x = x * cos + tl.where(is_first, -y, y) * sin
    return x


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, out_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, q_weight_ptr, k_weight_ptr, cos_sin_ptr,
    positions_ptr, slots_ptr, eps, qkv_stride_t, qkv_stride_h, cache_stride_n, cache_stride_k, cache_stride_b,
    scale_stride_n, scale_stride_k,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, HALF: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, NORMALISED: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (QUERIES + BLOCK_H - 1) // BLOCK_H
    dim = tl.arange(0, DIM_P2)[None, :]
    qkv_ptr += token * qkv_stride_t
    angles_ptr = cos_sin_ptr
    if HALF > 0:
        angles_ptr += tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < QUERIES) & (dim < DIM)
        head_ptr = qkv_ptr + head * qkv_stride_h
        q = _prepared(head_ptr, q_weight_ptr, angles_ptr, dim, mask, eps, DIM, HALF, INTERLEAVED, NORMALISED)
        at = (token * QUERIES + head) * DIM + dim
        tl.store(out_ptr + at, q.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:  # -1: a padding row of a captured graph
            head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            mask = (head < KEYS) & (dim < DIM)
            head_ptr = qkv_ptr + (QUERIES + head) * qkv_stride_h
            k = _prepared(head_ptr, k_weight_ptr, angles_ptr, dim, mask, eps, DIM, HALF, INTERLEAVED, NORMALISED)
            k = k.to(qkv_ptr.dtype.element_ty).to(tl.float32)  # codes are of what a model of this dtype has
            v = tl.load(head_ptr + KEYS * qkv_stride_h + dim, mask=mask, other=0.0).to(tl.float32)
            at = slot // PAGE * cache_stride_n + head * cache_stride_k + slot % PAGE * cache_stride_b + dim
            scale_at = slot // PAGE * scale_stride_n + head * scale_stride_k + slot % PAGE
            store_heads(k, k_cache_ptr, k_scale_ptr, at, scale_at, head < KEYS, dim < DIM, LARGEST)
            store_heads(v, v_cache_ptr, v_scale_ptr, at, scale_at, head < KEYS, dim < DIM, LARGEST)


def rotate_and_store(
    qkv_TNE: Tensor, cache: KVLayer, spec: HeadSpec, *, positions_T: Tensor, slots_T: Tensor
) -> Tensor:
    """See `Ops.rotate_and_store`. Leaves qkv_TNE as it is."""
    tokens, heads, dim = qkv_TNE.shape
    q_THE = torch.empty((tokens, spec.num_query, dim), dtype=qkv_TNE.dtype, device=qkv_TNE.device)
    if tokens == 0:
        return q_THE
    cos_sin_MC, interleaved = spec.rotation or (None, False)
    q_weight_E, k_weight_E, eps = spec.norms or (None, None, 0.0)
    assert heads == spec.num_query + 2 * spec.num_kv
    assert qkv_TNE.stride(2) == 1
    assert cos_sin_MC is None or cos_sin_MC.is_contiguous()
    dim_p2 = triton.next_power_of_2(dim)
    block_h = min(max(1, _PROGRAM_ELEMENTS // dim_p2), triton.next_power_of_2(spec.num_query))
    blocks = triton.cdiv(spec.num_query, block_h) + triton.cdiv(spec.num_kv, block_h)
    _rotate_and_store_kernel[(tokens, blocks)](
        qkv_TNE,
        q_THE,
        *cache,
        cache.k_scale_NKB,
        cache.v_scale_NKB,
        q_weight_E,
        k_weight_E,
        cos_sin_MC,
        positions_T,
        slots_T,
        eps,
        *qkv_TNE.stride()[:2],
        *cache_strides(cache),
        QUERIES=spec.num_query,
        KEYS=spec.num_kv,
        DIM=dim,
        DIM_P2=dim_p2,
        HALF=0 if cos_sin_MC is None else cos_sin_MC.shape[1] // 2,
        PAGE=cache.k_NKBE.shape[2],
        BLOCK_H=block_h,
        INTERLEAVED=interleaved,
        NORMALISED=spec.norms is not None,
        LARGEST=largest_code(cache.k_NKBE.dtype),
        num_warps=4,
    )
    return q_THE
