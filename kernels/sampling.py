"""Sampling without a sort: filters by pivot search, the draw by Gumbel noise and argmax; and log-probabilities.

Only where a row filters: `_threshold_kernel` finds each row's smallest kept value. Always: `_draw_kernel` takes the
best noised token of each chunk of the vocabulary, `_pick_kernel` the best of the chunks. No result depends on the
other rows, and nothing waits for the device.

The threshold is found by narrowing a bracket of float bit patterns with several pivots a pass over the row, as in the
sort-free samplers of FlashInfer (arXiv:2501.01005) and RadiK (arXiv:2501.14336), and by pulling the bracket's ends to
values that occur: it is exact, ties at the border included. Noise: `noise.py` in Triton, the same bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import Draw, SamplingBatch

_DRAW_BLOCK = 4096
_SEARCH_BLOCK = 2048
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def gumbel(seed, position, ids):
    """`noise.gumbel` of int32 ids under `noise.row_keys(seed, position)`, both int64; shifts here are unsigned."""
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    word = _mix64(_mix64(seed + 0x9E3779B97F4A7C15) ^ (position * 0x9E3779B97F4A7C15))
    x = ids.to(tl.uint32, bitcast=True) ^ word.to(tl.uint32)
    x = _mix32(_mix32(x) + (word >> 32).to(tl.uint32))
    uniform = ((x >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
    return -tl.log(-tl.log(uniform))


@triton.jit
def _order_key(x):
    """int32 that orders as the float does; both zeros are one. The map of bits undoes itself."""
    return _flip(tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True))


@triton.jit
def _flip(bits):
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled(row_ptr, index, vocab, temperature):
    """Logits over temperature, rounded as the reference rounds; -inf beyond the vocabulary."""
    x = tl.load(row_ptr + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _search(row_ptr, vocab, temperature, highest, low, share, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t such that what lies at or above t weighs enough, among tokens with keys from `low` on.

    Weights are 1 each, and `share` tokens are enough; or exp(x - highest), and `share` of all of it is. Never above the
    largest key, so at least one token is kept; `low` itself where not even all is enough.
    """
    PIVOTS: tl.constexpr = 8
    step_P = tl.arange(0, PIVOTS)
    # Invariant: at and above `low` is enough (or all there is); at and above `high` is not.
    high = _order_key(highest) + 1
    enough = -1.0 if BY_MASS else share
    gap = high.to(tl.int64) - low
    while gap > 1:
        pivot_P = (low + gap * step_P // PIVOTS).to(tl.int32)
        above_PN = tl.zeros([PIVOTS, BLOCK], dtype=tl.float32)
        smallest_N = tl.zeros([BLOCK], dtype=tl.int32) + (high - 1)
        largest_N = tl.zeros([BLOCK], dtype=tl.int32) + low
        for start in range(0, vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x = _scaled(row_ptr, index, vocab, temperature)
            key = _order_key(x)
            if BY_MASS:
                weight = tl.exp(x - highest)
            else:
                weight = tl.where(index < vocab, 1.0, 0.0)
            above_PN += tl.where(key[None, :] >= pivot_P[:, None], weight[None, :], 0.0)
            smallest_N = tl.where(key >= low, tl.minimum(smallest_N, key), smallest_N)
            largest_N = tl.where(key < high, tl.maximum(largest_N, key), largest_N)
        above_P = tl.sum(above_PN, axis=1)
        if BY_MASS:  # the first pivot is `low`: the first pass finds what all weighs
            enough = tl.where(enough < 0, share * tl.max(above_P, axis=0), enough)
        # One pivot lies above `low` and either is enough or is not, even if a NaN made all sums NaN: the gap shrinks.
        reached_P = above_P >= enough
        new_low = tl.max(tl.where(reached_P, pivot_P, low), axis=0)
        new_high = tl.min(tl.where(reached_P, high, pivot_P), axis=0)
        # Pull both ends to values that occur; when only one is left between them, it is the one.
        smallest = tl.min(smallest_N, axis=0)
        largest = tl.max(largest_N, axis=0)
        low = tl.maximum(new_low, smallest)
        high = tl.minimum(new_high, largest + 1)
        gap = high.to(tl.int64) - low
    return low


@triton.jit
def _threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    threshold_ptr,
    vocab,
    stride_r,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each row, the smallest scaled logit that the filters keep; -inf where all are."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_r
    temperature = tl.load(temperature_ptr + row)
    top_k = vocab
    top_p = 1.0
    min_p = 0.0
    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row)
        top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + row)
    threshold = tl.full([], float("-inf"), tl.float32)
    if (temperature > 0) & ((top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)):
        highest_N = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            highest_N = tl.maximum(highest_N, _scaled(row_ptr, start + tl.arange(0, BLOCK), vocab, temperature))
        highest = tl.max(highest_N, axis=0)
        if (highest > float("-inf")) & (highest < float("inf")):  # else the row cannot be sampled
            if min_p > 0.0:
                threshold = highest + tl.log(min_p)
            low = _order_key(threshold)
            if top_k < vocab:
                low = _search(row_ptr, vocab, temperature, highest, low, top_k.to(tl.float32), False, BLOCK)
            if top_p < 1.0:
                low = _search(row_ptr, vocab, temperature, highest, low, top_p, True, BLOCK)
            threshold = _flip(low).to(tl.float32, bitcast=True)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    threshold_ptr,
    value_ptr,
    token_ptr,
    first_id,
    vocab,
    stride_r,
    HAS_NOISE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best value and its id in one chunk of one row; value +inf where the chunk makes the row unusable."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride_r + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    unusable = tl.max(tl.where(x < float("inf"), 0, 1), axis=0)  # a NaN is not less
    value = x
    if HAS_NOISE:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            value = tl.div_rn(x, temperature)
            kept = x > float("-inf")
            if HAS_THRESHOLD:
                kept &= value >= tl.load(threshold_ptr + row)
            value += gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), first_id + index)
            value = tl.where(kept, value, float("-inf"))
    value = tl.minimum(value, _LARGEST)  # overflow of a tiny temperature is not +inf in the logits
    best, at = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(value_ptr + out, tl.where(unusable > 0, float("inf"), best))
    tl.store(token_ptr + out, first_id + chunk * BLOCK + at)


@triton.jit
def _pick_kernel(value_ptr, token_ptr, out_ptr, chunks, CHUNKS_P2: tl.constexpr):
    """The best of a row's chunks, the lowest id among equals; -1 where it is not finite.

    The best value is left where the first chunk's was.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_P2)
    value = tl.load(value_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    best, at = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(token_ptr + row * chunks + at)
    usable = (best > float("-inf")) & (best < float("inf"))
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))
    tl.store(value_ptr + row * chunks, best)


@triton.jit
def _logprobs_kernel(logits_ptr, tokens_ptr, log_total_ptr, chosen_ptr, rank_ptr, vocab, stride_r, BLOCK: tl.constexpr):
    """Log of the row's sum of exponentials, log-probability and rank of its token: one pass of online softmax."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_r
    token = tl.maximum(tl.load(tokens_ptr + row), 0)  # -1: a row that could not be sampled, for which nothing is meant
    chosen = tl.load(row_ptr + token).to(tl.float32)
    highest = tl.full([], -3.0e38, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    better_N = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        better_N += (x > chosen).to(tl.int32)
        new_highest = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), axis=0)
        highest = new_highest
    log_total = highest + tl.log(total)
    tl.store(log_total_ptr + row, log_total)
    tl.store(chosen_ptr + row, chosen - log_total)
    tl.store(rank_ptr + row, 1 + tl.sum(better_N, axis=0).to(tl.int64))


def sample(logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
    """See `Ops.sample`."""
    return draw(logits_RV, sampling, first_id=0, threshold_R=_thresholds(logits_RV, sampling)).token_R


def draw(logits_RV: Tensor, sampling: SamplingBatch, *, first_id: int, threshold_R: Tensor | None) -> Draw:
    """See `Ops.draw`. The token is -1 where the score is not finite."""
    rows, vocab = logits_RV.shape
    on = logits_RV.device
    tokens_R = torch.empty(rows, dtype=torch.int64, device=on)
    if rows == 0:
        return Draw(torch.empty(0, device=on), tokens_R)
    assert logits_RV.stride(1) == 1
    block = min(_DRAW_BLOCK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, block)
    best_RC = torch.empty((rows, chunks), dtype=torch.float32, device=on)
    best_tokens_RC = torch.empty((rows, chunks), dtype=torch.int32, device=on)
    _draw_kernel[(rows, chunks)](
        logits_RV,
        sampling.temperature_R,
        sampling.seed_R,
        sampling.position_R,
        threshold_R,
        best_RC,
        best_tokens_RC,
        first_id,
        vocab,
        logits_RV.stride(0),
        HAS_NOISE=not sampling.all_greedy,
        HAS_THRESHOLD=threshold_R is not None,
        BLOCK=block,
        num_warps=8,
    )
    _pick_kernel[(rows,)](
        best_RC, best_tokens_RC, tokens_R, chunks, CHUNKS_P2=triton.next_power_of_2(chunks), num_warps=1
    )
    return Draw(best_RC[:, 0], tokens_R)


def _thresholds(logits_RV: Tensor, sampling: SamplingBatch) -> Tensor | None:
    """[R] float32, the smallest scaled logit that each row keeps; None where no row filters."""
    rows, vocab = logits_RV.shape
    filters = sampling.max_top_k > 0 or sampling.any_top_p or sampling.any_min_p
    if sampling.all_greedy or not filters or not rows:
        return None
    assert logits_RV.stride(1) == 1
    threshold_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    _threshold_kernel[(rows,)](
        logits_RV,
        sampling.temperature_R,
        sampling.top_k_R,
        sampling.top_p_R,
        sampling.min_p_R,
        threshold_R,
        vocab,
        logits_RV.stride(0),
        HAS_TOP_K=sampling.max_top_k > 0,
        HAS_TOP_P=sampling.any_top_p,
        HAS_MIN_P=sampling.any_min_p,
        BLOCK=min(_SEARCH_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return threshold_R


def chosen_logprobs(logits_RV: Tensor, tokens_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([R] log of each row's sum of exponentials, [R] log-probability of its token, [R] that token's rank from 1)."""
    rows, vocab = logits_RV.shape
    log_total_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    chosen_R = torch.empty_like(log_total_R)
    rank_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    if rows:
        assert logits_RV.stride(1) == 1
        _logprobs_kernel[(rows,)](
            logits_RV,
            tokens_R,
            log_total_R,
            chosen_R,
            rank_R,
            vocab,
            logits_RV.stride(0),
            BLOCK=_DRAW_BLOCK,
            num_warps=16,
        )
    return log_total_R, chosen_R, rank_R
