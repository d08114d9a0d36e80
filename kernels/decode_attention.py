"""Paged attention for sequences with one new token: the decode part of a step.

A program serves one KV head of one sequence over one chunk of its keys, for all query heads of the group at once, so
each key and value is read once. Long contexts are cut into chunks that run side by side (Flash-Decoding, Dao et al.
2023) and a second kernel puts the chunks' results together, weighted by their softmax sums.

The number of chunks is the grid's; which keys a chunk holds is worked out on the device from the sequence's length, so
a captured graph replays at any length. It depends on how many sequences share the step: the same row may be rounded
differently in another batch. `TritonOps(deterministic=True)` avoids this kernel altogether.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOWEST, attend_tile, first_key, scales, tile_constants
from .ops import AttentionBatch, AttentionSpec, KVLayer

# Fewer keys than this are not worth a second program.
MIN_CHUNK = 256
_MAX_CHUNKS = 128
_REDUCE_BLOCK = 16


@triton.jit
def _chunk_bounds(kv_len, num_chunks, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr):
    """Where the sequence's first chunk starts, and how long each is; both multiples of BLOCK_N."""
    first = first_key(kv_len - 1, WINDOW) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(kv_len - first, BLOCK_N)
    return first, tl.maximum(tl.cdiv(tiles, num_chunks), MIN_TILES) * BLOCK_N


@triton.jit(do_not_specialize=["num_chunks"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, block_table_ptr, kv_lens_ptr, out_ptr, log_weight_ptr, num_chunks, logit_scale,
    exponent_scale, q_stride_t, q_stride_h, cache_stride_n, cache_stride_k, cache_stride_b, table_stride_s,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    chunk = tl.program_id(2)
    kv_len = tl.load(kv_lens_ptr + seq)
    first, length = _chunk_bounds(kv_len, num_chunks, WINDOW, BLOCK_N, MIN_TILES)
    begin = first + chunk * length
    end = tl.minimum(begin + length, kv_len)
    if (begin >= kv_len) & (chunk > 0):
        return

    row_M = tl.arange(0, BLOCK_M)
    dim_E = tl.arange(0, DIM_P2)
    head_M = kv_head * GROUP + row_M
    mask_ME = (row_M < GROUP)[:, None] & (dim_E < DIM)[None, :]
    q_at = q_ptr + seq * q_stride_t + head_M[:, None] * q_stride_h + dim_E[None, :]
    q_ME = tl.load(q_at, mask=mask_ME, other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        q_ME = q_ME.to(tl.float32)
    acc_ME = tl.zeros([BLOCK_M, DIM_P2], dtype=tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    query_pos_M = row_M * 0 + (kv_len - 1)
    k_ptr += kv_head.to(tl.int64) * cache_stride_k
    v_ptr += kv_head.to(tl.int64) * cache_stride_k
    block_row_ptr = block_table_ptr + seq * table_stride_s
    for start in tl.range(begin, end, BLOCK_N):
        acc_ME, max_M, sum_M = attend_tile(
            q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, block_row_ptr, start, end, query_pos_M, cache_stride_n,
            cache_stride_b, logit_scale, exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW, SOFTCAP, MASKED=True,
        )  # fmt: skip

    sum_M = tl.where(sum_M > 0, sum_M, 1.0)  # no keys at all (a padding row): zeros
    acc_ME /= sum_M[:, None]
    heads = tl.num_programs(1) * GROUP
    at_M = seq * heads + head_M
    if CHUNKED:
        at_M = at_M * num_chunks + chunk
        tl.store(log_weight_ptr + at_M, max_M + tl.log2(sum_M), mask=row_M < GROUP)
    tl.store(out_ptr + at_M[:, None] * DIM + dim_E[None, :], acc_ME.to(out_ptr.dtype.element_ty), mask=mask_ME)


@triton.jit(do_not_specialize=["num_chunks"])
def _reduce_kernel(
    partial_out_ptr,
    log_weight_ptr,
    kv_lens_ptr,
    out_ptr,
    num_chunks,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CHUNKS_P2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """out = sum over chunks of 2^weight * partial, over the sum of 2^weight: one program a query head."""
    seq = tl.program_id(0).to(tl.int64)
    at = seq * tl.num_programs(1) + tl.program_id(1)
    kv_len = tl.load(kv_lens_ptr + seq)
    first, length = _chunk_bounds(kv_len, num_chunks, WINDOW, BLOCK_N, MIN_TILES)
    used = tl.maximum(tl.cdiv(kv_len - first, length), 1)  # chunk 0 always reports, if only zeros
    chunk = tl.arange(0, CHUNKS_P2)
    log_weight_ptr += at * num_chunks
    highest = tl.max(tl.load(log_weight_ptr + chunk, mask=chunk < used, other=float("-inf")), axis=0)
    dim = tl.arange(0, DIM_P2)[None, :]
    acc = tl.zeros([DIM_P2], dtype=tl.float32)
    total = 0.0
    for start in range(0, used, BLOCK_C):
        block = start + tl.arange(0, BLOCK_C)
        weight = tl.exp2(tl.load(log_weight_ptr + block, mask=block < used, other=float("-inf")) - highest)
        part_ptr = partial_out_ptr + (at * num_chunks + block)[:, None] * DIM + dim
        part = tl.load(part_ptr, mask=(block < used)[:, None] & (dim < DIM), other=0.0)
        acc += tl.sum(part * weight[:, None], axis=0)
        total += tl.sum(weight, axis=0)
    acc /= total
    dim = tl.arange(0, DIM_P2)
    tl.store(out_ptr + at * DIM + dim, acc.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def chunks_for(kv_lens: tuple[int, ...], kv_heads: int, programs: int) -> int:
    """How many chunks the longest sequence is cut into, so that the step makes about `programs` equal programs."""
    longest = max(kv_lens, default=0)
    fair_share = sum(kv_lens) * kv_heads // max(programs, 1)
    return max(1, min(_MAX_CHUNKS, -(-longest // max(MIN_CHUNK, fair_share))))


def decode_attention(
    q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec, *, out_THE: Tensor, programs: int
) -> None:
    """Attention of the step's first `num_decodes` tokens, into the same rows of out_THE (contiguous).

    programs: how many the device should be given where there is work for so many.
    """
    seqs, heads, dim = batch.num_decodes, q_THE.shape[1], q_THE.shape[2]
    constants = tile_constants(q_THE, cache, spec)
    group = constants["GROUP"]
    kv_heads = heads // group
    block_m = max(16, triton.next_power_of_2(group))
    seen = tuple(min(kv_len, spec.window or kv_len) for kv_len in batch.kv_lens[:seqs])
    chunks = chunks_for(seen, kv_heads, programs)
    out, log_weight = out_THE, None
    if chunks > 1:  # of each chunk: its normalised output, and log2 of its sum of weights
        out = torch.empty((seqs, heads, chunks, dim), dtype=torch.float32, device=q_THE.device)
        log_weight = torch.empty((seqs, heads, chunks), dtype=torch.float32, device=q_THE.device)
    min_tiles = MIN_CHUNK // constants["BLOCK_N"]
    _decode_kernel[(seqs, kv_heads, chunks)](
        q_THE,
        *cache,
        batch.block_table_SP,
        batch.kv_lens_S,
        out,
        log_weight,
        chunks,
        *scales(spec),
        *q_THE.stride()[:2],
        *cache.k_NKBE.stride()[:3],
        batch.block_table_SP.stride(0),
        **constants,
        BLOCK_M=block_m,
        MIN_TILES=min_tiles,
        CHUNKED=chunks > 1,
        num_warps=4,
        num_stages=1 if q_THE.element_size() > 2 else 3 if dim <= 128 else 2,
    )
    if chunks > 1:
        _reduce_kernel[(seqs, heads)](
            out,
            log_weight,
            batch.kv_lens_S,
            out_THE,
            chunks,
            DIM=dim,
            DIM_P2=constants["DIM_P2"],
            BLOCK_N=constants["BLOCK_N"],
            MIN_TILES=min_tiles,
            CHUNKS_P2=triton.next_power_of_2(chunks),
            BLOCK_C=_REDUCE_BLOCK,
            WINDOW=constants["WINDOW"],
            num_warps=2,
        )
