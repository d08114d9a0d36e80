"""Paged attention on the CPU in which every token is computed alone, in a shape that its own position decides.

The token at position p sees keys [first, stop), both multiples of `BLOCK`, functions of p and the window; what lies in
there but is hidden is masked. So decoded, prefilled in any chunk, or beside any other token, it is the same product of
the same shape. Tokens of equal shape share a call: torch's flash kernel gives each (token, KV head) to one thread from
start to end, as one tile of that head's queries. Shape letters are those of `ops.py`; n counts the tokens of a call.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_attention import Ints, Shape
from .ops import AttentionBatch, KVLayer

# Keys by which a token's shape grows: the padding costs as much as half of these, and shapes that differ cost calls.
BLOCK = 128
# The queries of a group are padded to a multiple of this: then every buffer of every thread starts on a cache line.
# MKL's float32 products round differently where their operands are aligned differently.
_GROUP = 8
# Where one thread does all the work at hand, the products within may be spread over threads: never the case with two.
_FEWEST_TILES = 2

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Call(NamedTuple):
    """Tokens of one shape. Their keys are one gather's: each has its own row of it, or all share the only one."""

    tokens: Tensor | slice  # places among the step's tokens
    keys: slice  # of the gathered ones
    mask_n11L: Tensor


class Gather(NamedTuple):
    """Keys that are read from the cache together, and the calls that use them."""

    rows: Tensor  # [S * K * P] of the cache as a table of N * K rows
    num: int
    beyond: Tensor | None  # rows of the gathered [S * K * L, E] past the ends: whatever a page's last owner left
    calls: list[Call]


def plan_attention(batch: AttentionBatch, shape: Shape) -> list[Gather]:
    """Everything the layers of this shape need in this step. Every sequence has tokens."""
    table_SP = batch.block_table_SP.numpy().astype(np.int64)
    query_lens, kv_lens = np.array(batch.query_lens, np.int64), np.array(batch.kv_lens, np.int64)
    starts = np.cumsum(query_lens) - query_lens
    gathers = [
        _plan_singles(starts[group], table_SP[group], kv_lens[group], shape)
        for group in _by_shape(np.flatnonzero(query_lens == 1), kv_lens, shape)
    ]
    for seq in np.flatnonzero(query_lens > 1):
        gathers.append(_plan_chunk(int(starts[seq]), int(query_lens[seq]), table_SP[seq], int(kv_lens[seq]), shape))
    return gathers


def _key_range(positions: Ints, shape: Shape) -> tuple[Ints, Ints]:
    """First and stop of the keys that tokens at these positions are given."""
    low = np.zeros_like(positions) if shape.window is None else np.maximum(positions + 1 - shape.window, 0)
    return low // BLOCK * BLOCK, (positions // BLOCK + 1) * BLOCK


def _by_shape(seqs: Ints, kv_lens: Ints, shape: Shape) -> Iterator[Ints]:
    """Sequences with one new token, those together whose keys are cut alike out of as many pages."""
    first, stop = _key_range(kv_lens[seqs] - 1, shape)
    kinds = np.stack((stop - first, first % shape.page_size), -1)
    for kind in np.unique(kinds, axis=0):
        yield seqs[(kinds == kind).all(-1)]


def _plan_singles(starts: Ints, table_SP: Ints, kv_lens: Ints, shape: Shape) -> Gather:
    positions = kv_lens - 1
    first, stop = _key_range(positions, shape)
    return Gather(
        *_gather(first, stop, table_SP, kv_lens, shape),
        [_call(torch.from_numpy(starts), positions, int(first[0]) % shape.page_size, shape)],
    )


def _plan_chunk(start: int, num: int, table_P: Ints, kv_len: int, shape: Shape) -> Gather:
    positions = np.arange(kv_len - num, kv_len)
    first, stop = _key_range(positions, shape)
    page = int(first[0]) // shape.page_size * shape.page_size  # where the gathered keys begin
    # Consecutive tokens of one range of keys are one call.
    edges = np.flatnonzero((np.diff(first) != 0) | (np.diff(stop) != 0)) + 1
    bounds = [0, *edges.tolist(), num]
    calls = [
        _call(slice(start + at, start + end), positions[at:end], int(first[at]) - page, shape)
        for at, end in pairwise(bounds)
    ]
    return Gather(*_gather(first[:1], stop[-1:], table_P[None], np.array([kv_len]), shape), calls)


def _gather(first: Ints, stop: Ints, table_SP: Ints, kv_lens: Ints, shape: Shape) -> tuple[Tensor, int, Tensor | None]:
    """Rows of the cache as a table, sequence by sequence, head by head, page by page; and what is past the ends."""
    first_page = first // shape.page_size
    num_pages = int((-(-stop // shape.page_size) - first_page).max())
    pages = first_page[:, None] + np.arange(num_pages)
    # Past its own end a row of the table may hold anything valid or be too short: its last page is as good.
    own_SP = np.take_along_axis(table_SP, np.minimum(pages, table_SP.shape[1] - 1), 1)
    rows_SKP = own_SP[:, None, :] * shape.kv_heads + np.arange(shape.kv_heads)[:, None]
    keys = (first_page * shape.page_size)[:, None] + np.arange(num_pages * shape.page_size)
    past = np.repeat((keys >= kv_lens[:, None])[:, None], shape.kv_heads, axis=1).reshape(-1).nonzero()[0]
    beyond = torch.from_numpy(past) if len(past) else None
    return torch.from_numpy(rows_SKP.reshape(-1)), len(first), beyond


def _call(tokens: Tensor | slice, positions: Ints, begin: int, shape: Shape) -> Call:
    """Tokens of equal shape, whose first key is the one at `begin` of the gathered ones."""
    first, stop = _key_range(positions, shape)
    length = int(stop[0] - first[0])
    keys = first[:, None] + np.arange(length)
    hidden = keys > positions[:, None]
    if shape.window is not None:
        hidden |= keys <= positions[:, None] - shape.window
    mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return Call(tokens, slice(begin, begin + length), mask[:, None, None, :])


def run_attention(q_THE: Tensor, cache: KVLayer, plan: list[Gather], scale: float) -> Tensor:
    """Attention of all tokens of the step: [T, H, E]."""
    heads = q_THE.shape[1]
    kv_heads = cache.k_NKBE.shape[1]
    q_TKGE = q_THE.view(len(q_THE), kv_heads, heads // kv_heads, q_THE.shape[2])
    out_TKGE = torch.empty(q_TKGE.shape, dtype=q_THE.dtype)
    for gather in plan:
        k_SKLE, v_SKLE = (_read(paged_NKBE, gather, q_THE.dtype) for paged_NKBE in cache)
        for call in gather.calls:
            k, v = k_SKLE[:, :, call.keys], v_SKLE[:, :, call.keys]
            out_TKGE[call.tokens] = _attend(q_TKGE[call.tokens], k, v, call.mask_n11L, scale)
    return out_TKGE.flatten(1, 2)


def _read(paged_NKBE: Tensor, gather: Gather, dtype: torch.dtype) -> Tensor:
    """Keys or values [S, K, L, E]."""
    pages, kv_heads, page_size, dim = paged_NKBE.shape
    found = F.embedding(gather.rows, paged_NKBE.view(pages * kv_heads, page_size * dim))
    x_SKLE = found.view(gather.num, kv_heads, -1, dim).to(dtype)
    if gather.beyond is not None:  # a NaN there would get past any mask
        x_SKLE.view(-1, dim).index_fill_(0, gather.beyond, 0)
    return x_SKLE


def _attend(q_nKGE: Tensor, k_SKLE: Tensor, v_SKLE: Tensor, mask_n11L: Tensor, scale: float) -> Tensor:
    """[n, K, G, E]; S is n, or 1 where the tokens share their keys."""
    num, kv_heads, group, dim = q_nKGE.shape
    rows = num if num * kv_heads >= _FEWEST_TILES else _FEWEST_TILES
    padded = q_nKGE.new_zeros(rows, kv_heads, -(-group // _GROUP) * _GROUP, dim)
    padded[:num, :, :group] = q_nKGE
    out: Tensor = _flash(
        padded,
        k_SKLE.expand(rows, -1, -1, -1),
        v_SKLE.expand(rows, -1, -1, -1),
        attn_mask=mask_n11L.expand(rows, -1, padded.shape[2], -1),
        scale=scale,
    )[0]
    return out[:num, :, :group]
