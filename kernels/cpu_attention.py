"""Paged attention on the CPU with few, large torch calls. Part of `CpuOps`; shape letters are those of `ops.py`.

What depends only on the step (which pages, which masks) is made once, in `plan_attention`, and used by every layer. A
page's slots of one KV head are contiguous, so a cache [N, K, B, E] is also a table of N * K rows of B * E numbers:
gathering is one embedding lookup, straight into the order that the products want.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .ops import AttentionBatch, KVLayer

# Below this many keys times sequences one fused call beats two products and a softmax, and above it loses by 2 to 3.
_FUSED_KEYS = 1024
# Sequences share a gather while the longest has at most twice the pages of the shortest, or few in all.
_SMALL_PAGES = 8

Ints = NDArray[np.int64]


class Shape(NamedTuple):
    """What a plan depends on besides the batch: layers that agree in it share one."""

    kv_heads: int
    page_size: int
    window: int | None
    dtype: torch.dtype


class Decodes(NamedTuple):
    """Sequences with one new token each, whose keys are gathered together."""

    tokens_S: Tensor | None  # their places among the step's tokens; None: the first ones, in order
    rows: Tensor  # [S * K * P] of the cache as a table
    num: int
    num_keys: int  # of each, padding included
    mask_S11L: Tensor | None  # added to the scaled scores; None: all are visible
    beyond: Tensor | None  # rows of the gathered [S * K * L, E] past the ends: whatever a page's last owner left
    fused: bool


class Prefill(NamedTuple):
    """One sequence with several new tokens."""

    start: int
    stop: int
    rows: Tensor  # [K * P]
    num_keys: int
    mask_QL: Tensor | None  # None: plain causal


class AttentionPlan(NamedTuple):
    decodes: list[Decodes]
    prefills: list[Prefill]


def plan_attention(batch: AttentionBatch, shape: Shape) -> AttentionPlan:
    """Everything the layers of this shape need in this step."""
    table_SP = batch.block_table_SP.numpy().astype(np.int64)
    kv_lens = np.array(batch.kv_lens, np.int64)
    decodes = [_plan_decodes(group, batch.num_decodes, table_SP, kv_lens, shape) for group in _groups(batch, shape)]
    return AttentionPlan(decodes, plan_prefills(batch, shape))


def plan_prefills(batch: AttentionBatch, shape: Shape) -> list[Prefill]:
    """The part of the sequences with several new tokens."""
    starts = np.cumsum((0, *batch.query_lens))
    prefilled = range(batch.num_decodes, len(batch.kv_lens))
    pages = {i: batch.block_table_SP[i].numpy().astype(np.int64) for i in prefilled}
    return [_plan_prefill(int(starts[i]), batch.query_lens[i], pages[i], batch.kv_lens[i], shape) for i in prefilled]


def _groups(batch: AttentionBatch, shape: Shape) -> list[Ints]:
    """Decoding sequences by length, so that padding at most doubles what is read."""
    if not batch.num_decodes:
        return []
    pages = -(-np.array(batch.kv_lens[: batch.num_decodes], np.int64) // shape.page_size)
    order = np.argsort(-pages, kind="stable")
    groups, first = [], 0
    for at in range(1, len(order)):
        longest, own = pages[order[first]], pages[order[at]]
        if longest > _SMALL_PAGES and own * 2 < longest:
            groups.append(order[first:at])
            first = at
    groups.append(order[first:])
    # In the batch's own order where it is one group: nothing to pick and put back then.
    return groups if len(groups) > 1 else [np.arange(len(order))]


def _plan_decodes(group: Ints, num_decodes: int, table_SP: Ints, kv_lens: Ints, shape: Shape) -> Decodes:
    lens = kv_lens[group]
    low = np.zeros_like(lens) if shape.window is None else np.maximum(lens - shape.window, 0)
    first_page = low // shape.page_size
    num_pages = int((-(-lens // shape.page_size) - first_page).max())
    pages = first_page[:, None] + np.arange(num_pages)
    # Past its own end a row of the table may hold anything valid or be too short: its last page is as good.
    table = np.take_along_axis(table_SP[group], np.minimum(pages, table_SP.shape[1] - 1), 1)
    num_keys = num_pages * shape.page_size
    fused = len(group) * num_keys < _FUSED_KEYS
    begin, end = low - first_page * shape.page_size, lens - first_page * shape.page_size
    if len(group) == 1 and fused:
        num_keys = int(end[0])  # a view cuts the padding off; a product would be compiled anew for every length
    keys = np.arange(num_keys)
    past = keys >= end[:, None]
    hidden = (keys < begin[:, None]) | past
    beyond = np.repeat(past[:, None], shape.kv_heads, axis=1).reshape(-1).nonzero()[0] if past.any() else None
    mask = None
    if hidden.any():
        mask = torch.zeros(hidden.shape, dtype=shape.dtype if fused else torch.float32)
        mask = mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))[:, None, None, :]
    return Decodes(
        tokens_S=None if len(group) == num_decodes else torch.from_numpy(group),
        rows=_table_rows(table, shape),
        num=len(group),
        num_keys=num_keys,
        mask_S11L=mask,
        beyond=None if beyond is None else torch.from_numpy(beyond),
        fused=fused,
    )


def _plan_prefill(start: int, num: int, pages_P: Ints, kv_len: int, shape: Shape) -> Prefill:
    low = 0 if shape.window is None else max(kv_len - num - shape.window + 1, 0)
    first_page = low // shape.page_size
    skipped = first_page * shape.page_size
    rows = _table_rows(pages_P[None, first_page : -(-kv_len // shape.page_size)], shape)
    mask = None
    if kv_len != num or (shape.window is not None and shape.window < kv_len):
        keys = np.arange(skipped, kv_len)
        queries = np.arange(kv_len - num, kv_len)[:, None]
        hidden = keys > queries
        if shape.window is not None:
            hidden |= keys <= queries - shape.window
        mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return Prefill(start, start + num, rows, kv_len - skipped, mask)


def _table_rows(pages_SP: Ints, shape: Shape) -> Tensor:
    """Rows of the cache as a table, sequence by sequence, head by head, page by page."""
    rows_SKP = pages_SP[:, None, :] * shape.kv_heads + np.arange(shape.kv_heads)[:, None]
    return torch.from_numpy(rows_SKP.reshape(-1))


class _Source(NamedTuple):
    """One layer's cache as a table of pages, and its scale."""

    cache: KVLayer
    scale: float

    def gather(self, rows: Tensor, num_seqs: int, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [S, K, L, E]."""
        k_SKLE, v_SKLE = (self._pages(paged_NKBE, rows, num_seqs).to(dtype) for paged_NKBE in self.cache)
        return k_SKLE[:, :, :num_keys], v_SKLE[:, :, :num_keys]

    @staticmethod
    def _pages(paged_NKBE: Tensor, rows: Tensor, num_seqs: int) -> Tensor:
        pages, kv_heads, page_size, dim = paged_NKBE.shape
        table = paged_NKBE.view(pages * kv_heads, page_size * dim)
        return F.embedding(rows, table).view(num_seqs, kv_heads, -1, dim)


def run_attention(q_THE: Tensor, cache: KVLayer, plan: AttentionPlan, scale: float) -> Tensor:
    """Attention of all tokens of the step: [T, H, E]."""
    source = _Source(cache, scale)
    if len(plan.decodes) == 1 and not plan.prefills:
        return _decode(q_THE, source, plan.decodes[0])
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
    for part in plan.decodes:
        tokens = slice(0, part.num) if part.tokens_S is None else part.tokens_S
        out_THE[tokens] = _decode(q_THE[tokens], source, part)
    run_prefills(out_THE, q_THE, cache, plan.prefills, scale=scale)
    return out_THE


def run_prefills(out_THE: Tensor, q_THE: Tensor, cache: KVLayer, prefills: list[Prefill], *, scale: float) -> None:
    """Attention of the tokens of these sequences, into their places in `out_THE`."""
    source = _Source(cache, scale)
    for part in prefills:
        out_THE[part.start : part.stop] = _prefill(q_THE[part.start : part.stop], source, part)


def _decode(q_SHE: Tensor, source: _Source, part: Decodes) -> Tensor:
    k_SKLE, v_SKLE = source.gather(part.rows, part.num, part.num_keys, q_SHE.dtype)
    if part.beyond is not None:  # a NaN there would get past any mask
        k_SKLE.view(-1, k_SKLE.shape[-1]).index_fill_(0, part.beyond, 0)
        v_SKLE.view(-1, v_SKLE.shape[-1]).index_fill_(0, part.beyond, 0)
    # The query heads of a group are the rows of one small product: keys and values are read once for all of them.
    q_SKGE = q_SHE.reshape(part.num, k_SKLE.shape[1], -1, q_SHE.shape[-1])
    if part.fused:
        mask = part.mask_S11L if part.mask_S11L is None else part.mask_S11L.expand(-1, -1, q_SKGE.shape[2], -1)
        out = F.scaled_dot_product_attention(q_SKGE, k_SKLE, v_SKLE, attn_mask=mask, scale=source.scale)
        return out.reshape(q_SHE.shape)
    scores = q_SKGE @ k_SKLE.transpose(-1, -2)
    hidden = scores.new_zeros((), dtype=torch.float32) if part.mask_S11L is None else part.mask_S11L
    weights = torch.add(hidden, scores, alpha=source.scale).softmax(-1)
    return (weights.to(q_SHE.dtype) @ v_SKLE).view(q_SHE.shape)


def _prefill(q_QHE: Tensor, source: _Source, part: Prefill) -> Tensor:
    k_1KLE, v_1KLE = source.gather(part.rows, 1, part.num_keys, q_QHE.dtype)
    out_1HQE = F.scaled_dot_product_attention(
        q_QHE.transpose(0, 1)[None],
        k_1KLE,
        v_1KLE,
        attn_mask=part.mask_QL,
        is_causal=part.mask_QL is None,
        scale=source.scale,
        enable_gqa=q_QHE.shape[1] != k_1KLE.shape[1],
    )
    return out_1HQE[0].transpose(0, 1)
