"""Sampling without a sort: filters by pivot search, the draw by Gumbel noise and argmax; and log-probabilities.

Only where a row filters: `_threshold_kernel` finds each row's smallest kept value. Always: `_draw_kernel` takes the
best noised token of each chunk of the vocabulary, `_pick_kernel` the best of the chunks. No result depends on the
other rows, and nothing waits for the device.

The threshold is found by narrowing a bracket of float bit patterns with several pivots a pass over the row, as in the
sort-free samplers of FlashInfer (arXiv:2501.01005) and RadiK (arXiv:2501.14336), and by pulling the bracket's ends to
values that occur: it is exact, ties at the border included. Noise: `noise.py` in Triton, the same bits.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import SamplingBatch

_DRAW_BLOCK = 4096
_PIVOTS = 8
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
    golden = tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
    seed = golden * 0 + seed.to(tl.uint64, bitcast=True)
    word = _mix64(_mix64(seed + golden) ^ (position.to(tl.uint64, bitcast=True) * golden))
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
    return tl.div_rn(x, x * 0.0 + temperature)
