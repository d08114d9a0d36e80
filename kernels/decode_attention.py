"""Paged attention for sequences with one new token: the decode part of a step, in one launch.

A tile is BLOCK_N keys and values of one KV head of one sequence, read once for all query heads of the group. All tiles
of the step stand in one line, sequence by sequence, head by head, and each program takes an equal stretch of it
(Stream-K, arXiv:2301.03598; for decoding, arXiv:2405.10480): whatever the batch, the processors have equal work. What a
program finds of a head in its stretch is a part; a head that lies in several stretches is put together by the program
that hands in its last part, weighted by the parts' softmax sums (Flash-Decoding, Dao et al. 2023).

The grid is the device's; what a program has to do is worked out from the sequences' lengths on the device, so a
captured graph replays at any length. Where a head is cut depends on the step: the same row may be rounded differently
in another batch. `TritonOps(deterministic=True)` avoids this kernel altogether.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOWEST, attend_keys, first_key, join_sinks, scales, tile_constants
from .kv_write import cache_strides
from .ops import AttentionBatch, AttentionSpec, KVLayer

# Fewer keys than this are not worth a second program.
MIN_STRETCH = 256
# A head's parts are put together by one program: more of them would take longer than they save.
_MAX_PARTS = 64
_MERGED_ELEMENTS = 8192  # at once: 64 registers a thread
_SEQS = 256  # fewer make no difference, so that batches up to here share a kernel


class DecodeWorkspace:
    """Where programs leave their parts; one a device and stream. Kept, since captured graphs hold its addresses."""

    def __init__(self, on: torch.device, programs: int) -> None:
        self.programs = programs
        # How many parts of a head have arrived, by the program that has its first; whoever takes the last resets it.
        self.arrived = torch.zeros(programs, dtype=torch.int32, device=on)
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def parts(self, group: int, dim: int) -> tuple[Tensor, Tensor]:
        """Of each program two parts of a group's heads: their normalised outputs, and log2 of their sums of weights."""
        if (group, dim) not in self._parts:
            shape, on = (self.programs, 2, group), self.arrived.device
            outputs = torch.empty((*shape, dim), dtype=torch.float32, device=on)
            self._parts[group, dim] = outputs, torch.empty(shape, dtype=torch.float32, device=on)
        return self._parts[group, dim]


@triton.jit
def _first_tile(kv_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of the first tile that the sequence's newest token sees."""
    return first_key(kv_len - 1, WINDOW) // BLOCK_N * BLOCK_N


@triton.jit
def _line_up(
    kv_lens_ptr, seqs, KV_HEADS: tl.constexpr, SEQS_P2: tl.constexpr, MIN_TILES: tl.constexpr,
    MAX_PARTS: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(where each sequence's tiles end in the line, length of a program's stretch), in tiles."""
    seq_S = tl.arange(0, SEQS_P2)
    kv_len_S = tl.load(kv_lens_ptr + seq_S, mask=seq_S < seqs, other=0)
    tiles_S = tl.cdiv(kv_len_S - _first_tile(kv_len_S, WINDOW, BLOCK_N), BLOCK_N)
    tiles_S = tl.where(seq_S < seqs, tl.maximum(tiles_S, 1), 0)  # a padding row has one, which gives zeros
    ends_S = tl.cumsum(tiles_S, axis=0) * KV_HEADS
    fair = tl.cdiv(tl.max(ends_S, axis=0), tl.num_programs(0))
    return ends_S, tl.maximum(tl.maximum(fair, MIN_TILES), tl.cdiv(tl.max(tiles_S, axis=0), MAX_PARTS - 1))


@triton.jit
def _attend_stretch(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, begin, end, kv_len, q_stride_h,
    cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k, logit_scale, exponent_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The group's heads over keys [begin, end): what `attend_keys` returns."""
    row_M = tl.arange(0, BLOCK_M)
    dim_E = tl.arange(0, DIM_P2)
    q_at = q_ptr + (kv_head * GROUP + row_M)[:, None] * q_stride_h + dim_E[None, :]
    q_ME = tl.load(q_at, mask=(row_M < GROUP)[:, None] & (dim_E < DIM)[None, :], other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        q_ME = q_ME.to(tl.float32)
    acc_ME = tl.zeros([BLOCK_M, DIM_P2], dtype=tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    query_pos_M = row_M * 0 + (kv_len - 1)
    return attend_keys(
        q_ME, acc_ME, max_M, sum_M, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_row_ptr, kv_head, begin, end, end,
        query_pos_M, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k, logit_scale,
        exponent_scale, DIM, DIM_P2, PAGE, BLOCK_N, WINDOW, SOFTCAP, MASKED=True,
    )  # fmt: skip


@triton.jit
def _part_sums(part_sums_ptr, first_program, part_P, parts, row_G, GROUP: tl.constexpr):
    """(places of a head's parts, which there are, log2 of their sums of weights), all [P, G].

    Only the first part lies at the end of its program's stretch, the others at the beginning. Loaded past the first
    cache, which knows nothing of other processors' stores.
    """
    slot_P = (first_program + part_P) * 2 + (part_P == 0)
    at_PG = slot_P[:, None] * GROUP + row_G[None, :]
    there_PG = (part_P < parts)[:, None] & (row_G < GROUP)[None, :]
    return at_PG, there_PG, tl.load(part_sums_ptr + at_PG, mask=there_PG, other=LOWEST, cache_modifier=".cg")


@triton.jit
def _merge(
    parts_ptr, part_sums_ptr, first_program, parts, sinks_ptr, head, out_ptr, GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = sum over parts of 2^sum * part, over the sum of 2^sum."""
    row_G = tl.arange(0, GROUP_P2)
    dim_E = tl.arange(0, DIM_P2)
    _, _, all_sums_PG = _part_sums(part_sums_ptr, first_program, tl.arange(0, MAX_PARTS), parts, row_G, GROUP)
    max_G = tl.max(all_sums_PG, axis=0)
    total_G = tl.sum(tl.exp2(all_sums_PG - max_G[None, :]), axis=0)
    total_G = join_sinks(total_G, max_G, sinks_ptr, head + row_G, row_G < GROUP)
    acc_GE = tl.zeros([GROUP_P2, DIM_P2], dtype=tl.float32)
    for start in tl.range(0, parts, BLOCK_P):
        part_P = start + tl.arange(0, BLOCK_P)
        at_PG, there_PG, sum_PG = _part_sums(part_sums_ptr, first_program, part_P, parts, row_G, GROUP)
        part_at_PGE = parts_ptr + at_PG[:, :, None] * DIM + dim_E[None, None, :]
        there_PGE = there_PG[:, :, None] & (dim_E < DIM)[None, None, :]
        part_PGE = tl.load(part_at_PGE, mask=there_PGE, other=0.0, cache_modifier=".cg")
        acc_GE += tl.sum(part_PGE * tl.exp2(sum_PG - max_G[None, :])[:, :, None], axis=0)
    acc_GE /= total_G[:, None]
    out_at = out_ptr + (head + row_G)[:, None] * DIM + dim_E[None, :]
    mask_GE = (row_G < GROUP)[:, None] & (dim_E < DIM)[None, :]
    tl.store(out_at, acc_GE.to(out_ptr.dtype.element_ty), mask=mask_GE)


@triton.jit(do_not_specialize=["seqs"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, block_table_ptr, kv_lens_ptr, out_ptr, parts_ptr,
    part_sums_ptr, arrived_ptr, seqs, logit_scale, exponent_scale, q_stride_t, q_stride_h, cache_stride_n,
    cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k, table_stride_s,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, SEQS_P2: tl.constexpr, MIN_TILES: tl.constexpr, MAX_PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    ends_S, stretch = _line_up(kv_lens_ptr, seqs, KV_HEADS, SEQS_P2, MIN_TILES, MAX_PARTS, BLOCK_N, WINDOW)
    at = program * stretch
    stop = tl.minimum(at + stretch, tl.max(ends_S, axis=0))
    while at < stop:
        seq = tl.sum((ends_S <= at).to(tl.int32), axis=0).to(tl.int64)
        seq_begin = tl.max(tl.where(ends_S <= at, ends_S, 0), axis=0)
        kv_len = tl.load(kv_lens_ptr + seq)
        first = _first_tile(kv_len, WINDOW, BLOCK_N)
        tiles = tl.maximum(tl.cdiv(kv_len - first, BLOCK_N), 1)
        kv_head = (at - seq_begin) // tiles
        head_begin = seq_begin + kv_head * tiles
        head_end = head_begin + tiles
        upto = tl.minimum(head_end, stop)
        acc_ME, max_M, sum_M = _attend_stretch(
            q_ptr + seq * q_stride_t, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_table_ptr + seq * table_stride_s,
            kv_head, first + (at - head_begin) * BLOCK_N, tl.minimum(first + (upto - head_begin) * BLOCK_N, kv_len),
            kv_len, q_stride_h, cache_stride_n, cache_stride_k, cache_stride_b, scale_stride_n, scale_stride_k,
            logit_scale, exponent_scale, GROUP, DIM, DIM_P2, PAGE, BLOCK_M, BLOCK_N, WINDOW, SOFTCAP, UPCAST,
        )  # fmt: skip
        row_M = tl.arange(0, BLOCK_M)
        dim_E = tl.arange(0, DIM_P2)
        live_M = row_M < GROUP
        mask_ME = live_M[:, None] & (dim_E < DIM)[None, :]
        head = kv_head * GROUP
        seq_out_ptr = out_ptr + seq * (KV_HEADS * GROUP * DIM)
        first_program = head_begin // stretch
        parts = (head_end - 1) // stretch - first_program + 1
        if parts == 1:
            sum_M = join_sinks(sum_M, max_M, sinks_ptr, head + row_M, live_M)
            acc_ME /= tl.where(sum_M > 0, sum_M, 1.0)[:, None]  # no keys at all (a padding row): zeros
            out_at = seq_out_ptr + (head + row_M)[:, None] * DIM + dim_E[None, :]
            tl.store(out_at, acc_ME.to(out_ptr.dtype.element_ty), mask=mask_ME)
        else:
            at_M = (program * 2 + (at == head_begin)) * GROUP + row_M
            tl.store(parts_ptr + at_M[:, None] * DIM + dim_E[None, :], acc_ME / sum_M[:, None], mask=mask_ME)
            tl.store(part_sums_ptr + at_M, max_M + tl.log2(sum_M), mask=live_M)
            # The barrier: of all threads' stores, and then one thread releases them with its count.
            tl.debug_barrier()
            if tl.atomic_add(arrived_ptr + first_program, 1, sem="acq_rel") == parts - 1:
                tl.store(arrived_ptr + first_program, 0)
                _merge(
                    parts_ptr, part_sums_ptr, first_program, parts, sinks_ptr, head, seq_out_ptr, GROUP, GROUP_P2, DIM,
                    DIM_P2, MAX_PARTS, BLOCK_P,
                )  # fmt: skip
        at = upto


def decode_attention(
    q_THE: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    spec: AttentionSpec,
    *,
    sinks_H: Tensor | None,
    out_THE: Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Attention of the step's first `num_decodes` tokens, into the same rows of out_THE (contiguous)."""
    constants = tile_constants(q_THE, cache, spec)
    group, dim = constants["GROUP"], constants["DIM"]
    group_p2 = triton.next_power_of_2(group)
    if dim > 128:  # two programs a processor, each with three tiles on their way, fill its shared memory
        constants["BLOCK_N"] = 32
    _decode_kernel[(workspace.programs,)](
        q_THE,
        *cache,
        cache.k_scale_NKB,
        cache.v_scale_NKB,
        sinks_H,
        batch.block_table_SP,
        batch.kv_lens_S,
        out_THE,
        *workspace.parts(group, dim),
        workspace.arrived,
        batch.num_decodes,
        *scales(spec),
        *q_THE.stride()[:2],
        *cache_strides(cache),
        batch.block_table_SP.stride(0),
        **constants,
        KV_HEADS=q_THE.shape[1] // group,
        GROUP_P2=group_p2,
        BLOCK_M=max(16, group_p2),
        SEQS_P2=max(_SEQS, triton.next_power_of_2(batch.num_decodes)),
        MIN_TILES=MIN_STRETCH // constants["BLOCK_N"],
        MAX_PARTS=_MAX_PARTS,
        BLOCK_P=max(1, min(16, _MERGED_ELEMENTS // (group_p2 * constants["DIM_P2"]))),
        num_warps=4,
        num_stages=1 if q_THE.element_size() > 2 else 4,
    )
