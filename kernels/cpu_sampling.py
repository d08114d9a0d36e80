"""Sampling on the CPU without sorting the vocabulary, nor hashing more of it than can win. Part of `CpuOps`; exact.

Row by row: a row of 49k numbers and its intermediates stay in the core's cache, a whole batch of them does not.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .ops import SamplingBatch
from .reference import filter_min_p, filter_top_k, filter_top_p, scale_by_temperature

# How many candidates to look at before a row is sorted as a whole: nearly every nucleus is smaller than one of these.
_CANDIDATES = (256, 4096)
# A sum of a row's float32 exponentials is right to far less than this.
_SUM_ERROR = 1e-5


class Filters(NamedTuple):
    """One row's filters as plain numbers; 0, 1 and 0 mean off."""

    top_k: int
    top_p: float
    min_p: float


def draw_rows(logits_RV: Tensor, sampling: SamplingBatch, best_R: Tensor, greedy_R: Tensor) -> Tensor:
    """The token of each row, given its largest logit and where that is: [R] int64. Of unusable rows: anything."""
    vocab = logits_RV.shape[1]
    ids_V = torch.arange(vocab, dtype=torch.int32)
    key_0_R, key_1_R = noise.row_keys(sampling.seed_R, sampling.position_R)
    top_ks, top_ps, min_ps = sampling.top_k_R.tolist(), sampling.top_p_R.tolist(), sampling.min_p_R.tolist()
    tokens_R = greedy_R.clone()
    for row in ((sampling.temperature_R > 0) & best_R.isfinite()).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        scaled_1V = scale_by_temperature(logits_RV[one].float(), sampling.temperature_R[one])
        filters = Filters(
            top_ks[row] if top_ks[row] < vocab else 0,
            min(top_ps[row], 1.0),
            min_ps[row],
        )
        keys = key_0_R[one], key_1_R[one]
        threshold = find_threshold(scaled_1V, filters, sampling, one)
        if threshold is None:
            tokens_R[row] = (scaled_1V + noise.gumbel(*keys, ids_V)).argmax()
            continue
        # In rising order, so that among equal scores the lowest id wins, as argmax has it.
        kept = (scaled_1V[0] >= threshold).nonzero()[:, 0]
        scores = scaled_1V[0, kept] + noise.gumbel(*keys, kept.to(torch.int32))[0]
        tokens_R[row] = kept[scores.argmax()]
    return tokens_R


def find_threshold(scaled_1V: Tensor, filters: Filters, sampling: SamplingBatch, one: slice) -> Tensor | None:
    """The smallest logit that all filters keep (what is kept is always an upper set); None: everything is kept."""
    if filters == Filters(0, 1.0, 0.0):
        return None
    vocab = scaled_1V.shape[1]
    for candidates in _CANDIDATES:
        count = max(candidates, filters.top_k + 1)
        if count * 8 > vocab:
            break  # sorting all costs no more
        threshold = _threshold_from(scaled_1V[0], scaled_1V[0].topk(count).values, filters)
        if threshold is not None:
            return threshold
    kept_1V = _filter(scaled_1V, sampling, one)
    return kept_1V.masked_fill(kept_1V == -math.inf, math.inf).amin()


def _filter(scaled_1V: Tensor, sampling: SamplingBatch, one: slice) -> Tensor:
    """The plain way, by sorting the row."""
    if sampling.any_min_p:
        scaled_1V = filter_min_p(scaled_1V, sampling.min_p_R[one])
    if sampling.any_top_k:
        scaled_1V = filter_top_k(scaled_1V, sampling.top_k_R[one])
    if sampling.any_top_p:
        scaled_1V = filter_top_p(scaled_1V, sampling.top_p_R[one])
    return scaled_1V


def _threshold_from(scaled_V: Tensor, top_C: Tensor, filters: Filters) -> Tensor | None:
    """The same from the row's largest logits, descending; None where they do not settle it.

    Each filter looks at what the former left. Probabilities are those of the reference up to the order in which float64
    exponentials are summed, about 1e-16.
    """
    bound = torch.tensor(-math.inf)
    if filters.min_p > 0:
        bound = top_C[0] + torch.log(torch.tensor(filters.min_p))
    if filters.top_k:
        bound = torch.maximum(bound, top_C[filters.top_k - 1])
    if filters.top_p >= 1:
        return bound
    inside_C = top_C[top_C >= bound]
    weights_C = (inside_C.double() - top_C[0].double()).exp()
    if len(inside_C) < len(top_C):  # all that is left is among the candidates
        count, _ = _nucleus_size(weights_C, weights_C.sum(), filters.top_p)
    else:
        kept_V = scaled_V if bound == -math.inf else scaled_V[scaled_V >= bound]
        count, margin = _nucleus_size(weights_C, (kept_V - top_C[0]).exp_().sum(), filters.top_p)
        if margin < _SUM_ERROR:
            exact = (kept_V.double() - top_C[0].double()).exp_().sum()
            count, _ = _nucleus_size(weights_C, exact, filters.top_p)
        if count == len(top_C):
            return None
    return inside_C[max(count, 1) - 1]


def _nucleus_size(weights_C: Tensor, total: Tensor, top_p: float) -> tuple[int, float]:
    """How many have less than `top_p` of the mass before them, and by how little the nearest one has or has not."""
    probabilities_C = weights_C / total
    before_C = probabilities_C.cumsum(0) - probabilities_C
    return int((before_C < top_p).sum()), float((before_C - top_p).abs().min())
