"""Paged attention for sequences with several new tokens: the prefill part of a step.

A program serves one KV head and a tile of query rows, a row being one query head of the group at one token, so each
key and value is read once for the whole group. Keys that every row of the tile sees are taken without masks; only the
tiles at the causal edge and at the window's far edge pay for them, and those beyond are skipped (FlashAttention-2,
arXiv:2307.08691). No keys are split among programs, and the tile's shape depends on nothing but shapes and dtype of
the model: a row's result is a function of its own sequence, whatever else is in the step.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOWEST, attend_keys, first_key, join_sinks, scales, tile_constants
from .kv_write import cache_strides
from .ops import AttentionBatch, AttentionSpec, KVLayer


@triton.jit
def _find_tile(query_start_ptr, tile, first_seq, num_seqs, TOKENS: tl.constexpr):
    """(sequence, first token within it) of a tile; the token is beyond the sequence where there is no such tile.

    Sequence s is given the tiles from `start[s] // TOKENS + s` on, which is room enough for each and grows with s: the
    grid needs no list of tiles, and a binary search finds whose one is.
    """
    origin = tl.load(query_start_ptr + first_seq)
    low = first_seq
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_start_ptr + middle) - origin) // TOKENS + (middle - first_seq) <= tile:
            low = middle
        else:
            high = middle
    first_tile = (tl.load(query_start_ptr + low) - origin) // TOKENS + (low - first_seq)
    return low, (tile - first_tile) * TOKENS


@triton.jit
def _key_ranges(first_pos, last_pos, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Of queries at first_pos to last_pos: where some begin to see keys, where all do, and where not all do any more.

    Multiples of BLOCK_N, in order; the second and third are one where the window is narrower than the tile is tall.
    """
    begin = first_key(first_pos, WINDOW) // BLOCK_N * BLOCK_N
    common_end = (first_pos + 1) // BLOCK_N * BLOCK_N
    common_begin = tl.minimum(tl.cdiv(first_key(last_pos, WINDOW), BLOCK_N) * BLOCK_N, common_end)
    return begin, common_begin, common_end


@triton.jit(do_not_specialize=["first_seq", "num_seqs"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, query_start_ptr, block_table_ptr, kv_lens_ptr, out_ptr,
    first_seq, num_seqs, logit_scale, exponent_scale, q_stride_t, q_stride_h, cache_stride_n, cache_stride_k,
    cache_stride_b, scale_stride_n, scale_stride_k, table_stride_s,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # Last tiles first: they see the most keys, and the short ones then fill the gaps at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first_token = _find_tile(query_start_ptr, tile, first_seq, num_seqs, TOKENS)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    if first_token >= query_len:
        return
    kv_len = tl.load(kv_lens_ptr + seq)

    row_M = tl.arange(0, BLOCK_M)
    dim_E = tl.arange(0, DIM_P2)
    token_M = first_token + row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    live_M = (row_M < TOKENS * GROUP) & (token_M < query_len)
    mask_ME = live_M[:, None] & (dim_E < DIM)[None, :]
    at_M = (query_start + token_M).to(tl.int64)
    q_at = q_ptr + at_M[:, None] * q_stride_t + head_M[:, None] * q_stride_h + dim_E[None, :]
    q_ME = tl.load(q_at, mask=mask_ME, other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        q_ME = q_ME.to(tl.float32)
    acc_ME = tl.zeros([BLOCK_M, DIM_P2], dtype=tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)

    first_pos = kv_len - query_len + first_token
    last_pos = tl.minimum(first_pos + TOKENS, kv_len) - 1
    query_pos_M = tl.minimum(first_pos + row_M // GROUP, last_pos)
    begin, common_begin, common_end = _key_ranges(first_pos, last_pos, BLOCK_N, WINDOW)
    end = last_pos + 1
    block_row_ptr = block_table_ptr + seq.to(tl.int64) * table_stride_s
    if WINDOW > 0:
        acc_ME, max_M, sum_M = attend_keys(
            q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, begin,
            common_begin, end, query_pos_M, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n,
            scale_stride_k, logit_scale, exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW, SOFTCAP, MASKED=True,
        )  # fmt: skip
    acc_ME, max_M, sum_M = attend_keys(
        q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, common_begin,
        common_end, end, query_pos_M, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k,
        logit_scale, exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW, SOFTCAP, MASKED=False,
    )  # fmt: skip
    acc_ME, max_M, sum_M = attend_keys(
        q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, common_end,
        end, end, query_pos_M, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k,
        logit_scale, exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW, SOFTCAP, MASKED=True,
    )  # fmt: skip

    sum_M = join_sinks(sum_M, max_M, sinks_ptr, head_M, live_M)
    acc_ME /= tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    heads = tl.num_programs(0) * GROUP
    out_at = out_ptr + (at_M * heads + head_M)[:, None] * DIM + dim_E[None, :]
    tl.store(out_at, acc_ME.to(out_ptr.dtype.element_ty), mask=mask_ME)


def prefill_attention(
    q_THE: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    spec: AttentionSpec,
    *,
    sinks_H: Tensor | None,
    out_THE: Tensor,
    first_seq: int,
) -> None:
    """Attention of the tokens of sequences `first_seq` and later, into the same rows of out_THE (contiguous)."""
    constants = tile_constants(q_THE, cache, spec)
    group = constants["GROUP"]
    kv_heads = q_THE.shape[1] // group
    rows = 32 if q_THE.element_size() > 2 else 128 if q_THE.shape[2] <= 128 else 64
    block_m = max(rows, triton.next_power_of_2(group))
    num_seqs = batch.block_table_SP.shape[0]
    # A bound from shapes alone, so that the grid of a captured graph needs no lengths.
    tiles = q_THE.shape[0] // (block_m // group) + num_seqs - first_seq
    _prefill_kernel[(kv_heads, tiles)](
        q_THE,
        *cache,
        cache.k_scale_NKB,
        cache.v_scale_NKB,
        sinks_H,
        batch.query_start_S1,
        batch.block_table_SP,
        batch.kv_lens_S,
        out_THE,
        first_seq,
        num_seqs,
        *scales(spec),
        *q_THE.stride()[:2],
        *cache_strides(cache),
        batch.block_table_SP.stride(0),
        **constants,
        BLOCK_M=block_m,
        num_warps=8,
        num_stages=1 if q_THE.element_size() > 2 else 3 if q_THE.shape[2] <= 128 else 2,
    )
