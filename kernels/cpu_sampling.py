"""Sampling on the CPU without sorting the vocabulary, nor taking more logarithms than can win. Part of `CpuOps`; exact.

Row by row: a row of 49k numbers and its intermediates stay in the core's cache, a whole batch of them does not.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import noise
from .ops import SamplingBatch
from .reference import filter_min_p, filter_top_k, filter_top_p, nucleus_masses, nucleus_need, scale_by_temperature

Words = NDArray[np.uint32]
Places = NDArray[np.int64]

# How many candidates to look at before a row is sorted as a whole: nearly every nucleus is smaller than one of these.
_CANDIDATES = (256, 4096)
# A sum of a row's float32 exponentials is right to far less than this.
_SUM_ERROR = 1e-5
# Fewer tokens get their noise outright. Of more, this many do, and then those that may beat the best of these.
_PROBES = 2048
_LARGEST = torch.finfo(torch.float32).max
_MIX_1, _MIX_2 = np.uint32(noise.MIX_1), np.uint32(noise.MIX_2 & 0xFFFFFFFF)


class Filters(NamedTuple):
    """One row's filters as plain numbers; 0, 1 and 0 mean off."""

    top_k: int
    top_p: float
    min_p: float


class Keys(NamedTuple):
    """The words that stand for (seed, position) in a row's noise."""

    first: np.uint32
    second: np.uint32


def draw_rows(
    logits_RV: Tensor,
    sampling: SamplingBatch,
    best_R: Tensor,
    columns_R: Tensor,
    *,
    first_id: int = 0,
    threshold_R: Tensor | None = None,
) -> tuple[list[float], list[int]]:
    """The score and the column of each row's token, given its largest logit and where that is.

    threshold_R: the smallest scaled logit that each row keeps; None: what the row's own filters say. A score of -inf:
    nothing is left. Rows whose largest logit is not finite stay as they are.
    """
    ids_V = np.arange(first_id, first_id + logits_RV.shape[1], dtype=np.uint32)
    keys = row_keys(sampling.seed_R.numpy(), sampling.position_R.numpy())
    scores, columns = best_R.tolist(), columns_R.tolist()
    filters = _row_filters(sampling, logits_RV.shape[1]) if threshold_R is None else None
    for row in ((sampling.temperature_R > 0) & best_R.isfinite()).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        logits_V, temperature = logits_RV[row].float(), sampling.temperature_R[one]
        threshold = None if threshold_R is None or threshold_R[row] == -math.inf else threshold_R[row]
        if filters is not None and filters[row] != Filters(0, 1.0, 0.0):
            scaled_1V = scale_by_temperature(logits_V[None], temperature)
            threshold = find_threshold(scaled_1V, filters[row], sampling, one)
        draw = _Draw(logits_V, temperature, ids_V, keys[row])
        scores[row], columns[row] = draw.best(columns[row], threshold)
    return scores, columns


def _row_filters(sampling: SamplingBatch, vocab: int) -> list[Filters]:
    columns = sampling.top_k_R.tolist(), sampling.top_p_R.clamp(max=1.0).tolist(), sampling.min_p_R.tolist()
    return [Filters(k if k < vocab else 0, p, min_p) for k, p, min_p in zip(*columns, strict=True)]


class _Draw(NamedTuple):
    """One row: `argmax(logits / temperature + noise)` among the tokens that a threshold keeps."""

    logits_V: Tensor
    temperature: Tensor  # [1]
    ids_V: Words
    keys: Keys

    def best(self, likeliest: int, threshold: Tensor | None) -> tuple[float, int]:
        """The best score and its column, the lowest among equals. likeliest: the column of the largest logit."""
        if threshold is None:
            words_V = noise_words(self.ids_V, self.keys)
            return self._pick(self._contenders(words_V, likeliest), words_V)
        # The few that a filter keeps get their noise outright.
        kept = np.flatnonzero((self._scaled(self.logits_V) >= threshold).numpy())
        if not len(kept):
            return -math.inf, likeliest
        scores = self._scaled(self.logits_V[kept]) + gumbel(noise_words(self.ids_V[kept], self.keys))
        at = int(scores.argmax())
        return float(scores[at]), int(kept[at])

    def _pick(self, columns: Places | None, words_V: Words) -> tuple[float, int]:
        if columns is None:
            scores = self._scaled(self.logits_V) + gumbel(words_V)
            at = int(scores.argmax())
            return float(scores[at]), at
        scores = self._scores(columns, words_V)
        at = int(scores.argmax())
        return float(scores[at]), int(columns[at])

    def _contenders(self, words_V: Words, likeliest: int) -> Places | None:
        """Columns, in rising order, among which the winner is; None: all of them.

        A token's noise is -log(-log u), which is at most -log(1 - u): it cannot beat a score s unless
        log(1 - u) <= logit / temperature - s. No logarithm is taken: the bits of a positive float, read as an integer,
        are 2^23 (127 + its binary logarithm), or less by up to 0.09 of 2^23, never more. The margin is a hundred times
        what the float32 numbers may be off.
        """
        size = len(words_V)
        if size <= _PROBES:
            return None
        probes = np.append(np.arange(0, size, size // _PROBES), likeliest)
        score, temperature = float(self._scores(probes, words_V).max()), float(self.temperature)
        if not (abs(score) < 1e4 and temperature > 1e-6):
            return None
        unit = 1 << 23  # of the words, 1 - u = gap / unit; and of a float's exponent
        slope = unit / math.log(2)
        offset = slope * (1e-3 + 1e-6 * abs(score) - score) + unit * (23 + 127)
        gap_V = (unit - 0.5) - torch.from_numpy(words_V.view(np.int32))
        reach_V = torch.mul(self.logits_V, slope / temperature).add_(offset)
        return np.flatnonzero((gap_V.view(torch.int32) <= reach_V).numpy())

    def _scores(self, columns: Places, words_V: Words) -> Tensor:
        return self._scaled(self.logits_V[columns]) + gumbel(words_V[columns])

    def _scaled(self, logits: Tensor) -> Tensor:
        """As `scale_by_temperature`, in two calls."""
        return (logits / self.temperature).clamp_(max=_LARGEST)


def row_keys(seed_R: NDArray[np.int64], position_R: NDArray[np.int64]) -> list[Keys]:
    """`noise.row_keys` in numpy, where one row's costs a fifth."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    word_R = _mix64(_mix64(seed_R.view(np.uint64) + golden) ^ (position_R.view(np.uint64) * golden))
    return [Keys(np.uint32(word & 0xFFFFFFFF), np.uint32(word >> 32)) for word in word_R.tolist()]


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise_words(ids: Words, keys: Keys) -> Words:
    """The 23-bit words out of which `noise.gumbel` makes its uniforms. In numpy, which shifts unsigned words."""
    x = ids ^ keys.first
    scratch = np.empty_like(x)
    _mix(x, scratch)
    x += keys.second
    _mix(x, scratch)
    x >>= np.uint32(9)
    return x


def _mix(x: Words, scratch: Words) -> None:
    for shift, factor in ((16, _MIX_1), (15, _MIX_2)):
        np.right_shift(x, np.uint32(shift), out=scratch)
        x ^= scratch
        x *= factor
    np.right_shift(x, np.uint32(16), out=scratch)
    x ^= scratch


def gumbel(words: Words) -> Tensor:
    """`noise.gumbel` of its words, bit for bit."""
    uniform = (torch.from_numpy(words.view(np.int32)).float() + 0.5) * (1.0 / (1 << 23))
    return -torch.log(-torch.log(uniform))


def find_threshold(scaled_1V: Tensor, filters: Filters, sampling: SamplingBatch, one: slice) -> Tensor:
    """The smallest logit that all filters keep (what is kept is always an upper set)."""
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
    if sampling.max_top_k:
        scaled_1V = filter_top_k(scaled_1V, sampling.top_k_R[one])
    if sampling.any_top_p:
        scaled_1V = filter_top_p(scaled_1V, sampling.top_p_R[one])
    return scaled_1V


def _threshold_from(scaled_V: Tensor, top_C: Tensor, filters: Filters) -> Tensor | None:
    """The same from the row's largest logits, descending; None where they do not settle it.

    Each filter looks at what the former left.
    """
    bound = torch.tensor(-math.inf)
    if filters.min_p > 0:
        bound = top_C[0] + torch.log(torch.tensor(filters.min_p))
    if filters.top_k:
        bound = torch.maximum(bound, top_C[filters.top_k - 1])
    if filters.top_p >= 1:
        return bound
    inside_C = top_C[top_C >= bound]
    masses_C = nucleus_masses(inside_C, top_C[0])
    if len(inside_C) < len(top_C):  # all that is left is among the candidates
        count = _nucleus_size(masses_C, masses_C.sum(), filters.top_p)
    else:
        kept_V = scaled_V if bound == -math.inf else scaled_V[scaled_V >= bound]
        total = (kept_V - top_C[0]).exp_().sum() * float(masses_C[0])
        if _near_a_border(masses_C, total, filters.top_p):
            total = nucleus_masses(kept_V, top_C[0]).sum()
        count = _nucleus_size(masses_C, total, filters.top_p)
        if count == len(top_C):
            return None
    return inside_C[max(count, 1) - 1]


def _nucleus_size(masses_C: Tensor, total: Tensor, top_p: float) -> int:
    """How many have less than `top_p` of the total before them."""
    before_C = masses_C.cumsum(0) - masses_C
    return int((before_C < nucleus_need(total, torch.tensor(top_p))).sum())


def _near_a_border(masses_C: Tensor, total: Tensor, top_p: float) -> bool:
    """Whether a total that is off by `_SUM_ERROR` could give another size."""
    before_C = (masses_C.cumsum(0) - masses_C) / total.double()
    return float((before_C - top_p).abs().min()) < _SUM_ERROR
