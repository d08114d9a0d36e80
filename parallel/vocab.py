"""Drawing tokens where each rank holds some columns of the logits: small exchanges, the same tokens at every width.

Whatever ranks exchange is a maximum, a sum of integers or a gathering, so nothing depends on how the vocabulary is cut:

    greedy, temperature    one word a row: the best score of any rank, and the lowest id that has it
    and for rows that filter, before it:
    min-p                  the row's largest logit
    top-k                  each rank's k largest logits
    top-p                  four histograms of mass over 256 ranges of logits, each inside the one before

Log-probabilities: a maximum, a sum, and each rank's most likely tokens. A rank that holds no column takes part as if it
held one that no row can draw.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.ops import Logprobs, Ops, SamplingBatch
from ..kernels.reference import nucleus_masses, nucleus_need, scale_by_temperature
from .comm import Comm
from .partition import cut_vocab, length

NEG_INF = float("-inf")
_LAST_ID = (1 << 32) - 1


class VocabOps(Protocol):
    """What is done with logits of which a rank holds its own columns: [R, V of this shard], from `cut_vocab`.

    `Ops` is one, for a rank that holds them all.
    """

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """As `Ops.sample`; the same on every rank."""
        ...

    def logprobs(self, logits_RV: Tensor, tokens_R: Tensor, num: int) -> Logprobs:
        """As `Ops.logprobs`; the same on every rank."""
        ...


def vocab_ops(ops: Ops, *, vocab_size: int, comm: Comm) -> VocabOps:
    """What draws tokens for a rank of this group."""
    return ops if comm.size == 1 else ShardedVocab(ops, vocab_size=vocab_size, comm=comm)


class _Filters(NamedTuple):
    """Of the rows that filter. top_k 0, top_p 1 and min_p 0 mean off."""

    top_k_Q: Tensor
    top_p_Q: Tensor
    min_p_Q: Tensor


class ShardedVocab:
    """`VocabOps` of a rank that shares its vocabulary with others. All call it with the same batch."""

    def __init__(self, ops: Ops, *, vocab_size: int, comm: Comm) -> None:
        self._ops = ops
        self._comm = comm
        self._vocab_size = vocab_size
        self._mine = cut_vocab(vocab_size, shard=comm.shard, size=comm.size)
        self._width = length(cut_vocab(vocab_size, shard=0, size=comm.size))  # the widest shard's

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """See `VocabOps`. Waits for the device where a row filters: which rows do is asked first."""
        logits_RV = self._columns(logits_RV)
        threshold_R = self._thresholds(logits_RV, sampling)
        draw = self._ops.draw(logits_RV, sampling, first_id=self._mine.start, threshold_R=threshold_R)
        # One integer that orders by score, then by falling id. Of a score that is not finite the id does not matter.
        words_R = (order_keys(draw.score_R).long() << 32) + (_LAST_ID - draw.token_R.clamp(min=0))
        words_R = self._comm.all_reduce_max(words_R)
        finite_R = from_order_keys((words_R >> 32).int()).isfinite()
        return (_LAST_ID - (words_R & _LAST_ID)).masked_fill_(~finite_R, -1)

    def _columns(self, logits_RV: Tensor) -> Tensor:
        return logits_RV if length(self._mine) else logits_RV.new_full((len(logits_RV), 1), NEG_INF)

    # Filters

    def _thresholds(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor | None:
        """[R] the smallest scaled logit each row keeps; None where no row filters."""
        if sampling.all_greedy or not (sampling.any_top_k or sampling.any_top_p or sampling.any_min_p):
            return None
        top_k_R = torch.where(sampling.top_k_R < self._vocab_size, sampling.top_k_R, 0)
        filters_R = (top_k_R > 0) | (sampling.top_p_R < 1) | (sampling.min_p_R > 0)
        rows_Q = ((sampling.temperature_R > 0) & filters_R).nonzero()[:, 0]
        if not len(rows_Q):
            return None
        scaled_QV = scale_by_temperature(logits_RV[rows_Q].float(), sampling.temperature_R[rows_Q])
        threshold_R = torch.full_like(sampling.temperature_R, NEG_INF)
        filters = _Filters(top_k_R[rows_Q], sampling.top_p_R[rows_Q], sampling.min_p_R[rows_Q])
        threshold_R[rows_Q] = self._kept_from(scaled_QV, filters, any_top_p=sampling.any_top_p)
        return threshold_R

    def _kept_from(self, scaled_QV: Tensor, filters: _Filters, *, any_top_p: bool) -> Tensor:
        """[Q] the smallest that all filters keep; each looks at what the former left."""
        highest_Q = self._comm.all_reduce_max(scaled_QV.amax(dim=-1).nan_to_num_(nan=float("inf"), neginf=NEG_INF))
        highest_Q.masked_fill_(~highest_Q.isfinite(), 0)  # a row that cannot be drawn, whatever comes out
        kept_Q = highest_Q + torch.log(filters.min_p_Q)
        most = min(int(filters.top_k_Q.max()), self._width)
        if most:
            kept_Q = torch.maximum(kept_Q, self._kth_largest(scaled_QV, filters.top_k_Q, most))
        if any_top_p:
            masses_QV = nucleus_masses(scaled_QV, highest_Q[:, None])
            masses_QV.masked_fill_(scaled_QV < kept_Q[:, None], 0)
            border_Q = self._nucleus_border(scaled_QV, masses_QV, filters.top_p_Q)
            kept_Q = torch.where(filters.top_p_Q < 1, border_Q, kept_Q)
        return kept_Q

    def _kth_largest(self, scaled_QV: Tensor, top_k_Q: Tensor, most: int) -> Tensor:
        """[Q] the k-th largest of the whole row, -inf where k is 0. most: how many a rank must show at most."""
        top_Qk = scaled_QV.topk(min(most, scaled_QV.shape[1]), dim=-1).values
        top_Qk = F.pad(top_Qk, (0, most - top_Qk.shape[1]), value=NEG_INF)
        gathered_QK = self._comm.all_gather(top_Qk.contiguous()).movedim(0, 1).flatten(1)
        sorted_QK = gathered_QK.sort(dim=-1, descending=True).values
        kth_Q = sorted_QK.gather(1, (top_k_Q.long() - 1).clamp_(min=0)[:, None])[:, 0]
        return kth_Q.masked_fill_(top_k_Q <= 0, NEG_INF)

    def _nucleus_border(self, scaled_QV: Tensor, masses_QV: Tensor, top_p_Q: Tensor) -> Tensor:
        """[Q] the largest value at and above which lies `top_p` of the row's mass. Overwrites the masses.

        A radix search: 256 ranges of order keys at a time, so four histograms end at one key.
        """
        keys_QV = order_keys(scaled_QV)
        prefix_Q1 = torch.zeros_like(keys_QV[:, :1])
        need_Q1 = above_Q1 = torch.zeros_like(masses_QV[:, :1])
        for shift in (24, 16, 8, 0):
            digits_QV = keys_QV >> shift
            if shift == 24:
                digits_QV += 128  # the sign is in the first digit: as unsigned as the others
            else:
                masses_QV.masked_fill_((keys_QV >> (shift + 8)) != prefix_Q1, 0)
                digits_QV &= 255
            histogram_QB = masses_QV.new_zeros(len(keys_QV), 256).scatter_add_(1, digits_QV.long(), masses_QV)
            histogram_QB = self._comm.all_reduce(histogram_QB)
            reached_QB = above_Q1 + histogram_QB.flip(1).cumsum(1).flip(1)  # at and above each range's start
            if shift == 24:
                need_Q1 = nucleus_need(reached_QB[:, 0], top_p_Q)[:, None]
            digit_Q1 = ((reached_QB >= need_Q1).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
            above_Q1 = reached_QB.gather(1, digit_Q1) - histogram_QB.gather(1, digit_Q1)
            digit_Q1 = digit_Q1.int()
            prefix_Q1 = digit_Q1 - 128 if shift == 24 else (prefix_Q1 << 8) + digit_Q1
        return from_order_keys(prefix_Q1[:, 0])

    # Log-probabilities

    def logprobs(self, logits_RV: Tensor, tokens_R: Tensor, num: int) -> Logprobs:
        """See `VocabOps`."""
        logits_RV = self._columns(logits_RV).float()
        # A row that could not be sampled has token -1; what it gets here means nothing, but must not fault.
        column_R = tokens_R.long().clamp(min=0) - self._mine.start
        here_R = (column_R >= 0) & (column_R < length(self._mine))
        chosen_R = logits_RV.gather(1, column_R.clamp(0, logits_RV.shape[1] - 1)[:, None])[:, 0]
        peaks_R2 = torch.stack([logits_RV.amax(dim=-1), chosen_R.masked_fill(~here_R, NEG_INF)], dim=1)
        highest_R1, chosen_R1 = self._comm.all_reduce_max(peaks_R2).chunk(2, dim=1)
        mass_R = (logits_RV - highest_R1).exp_().sum(dim=-1, dtype=torch.float64)
        better_R = (logits_RV > chosen_R1).sum(dim=-1)
        mass_R1, better_R1 = self._comm.all_reduce(torch.stack([mass_R, better_R.double()], dim=1)).chunk(2, dim=1)
        log_total_R1 = highest_R1 + mass_R1.log()  # float64, as the mass
        values_RL, ids_RL = self._most_likely(logits_RV, min(num, self._vocab_size))
        return Logprobs(
            (chosen_R1 - log_total_R1).float()[:, 0],
            1 + better_R1.long()[:, 0],
            ids_RL,
            (values_RL - log_total_R1).float(),
        )

    def _most_likely(self, logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The `num` largest logits of whole rows and their ids, [R, num] each."""
        top = logits_RV.topk(min(num, logits_RV.shape[1]), dim=-1)
        padding = (0, num - top.values.shape[1])
        values_RL = F.pad(top.values.double(), padding, value=NEG_INF)
        ids_RL = F.pad((top.indices + self._mine.start).double(), padding, value=float(self._vocab_size))
        gathered = self._comm.all_gather(torch.stack([values_RL, ids_RL]))  # [size, 2, R, num]
        values_RG, ids_RG = gathered.permute(1, 2, 0, 3).flatten(2)
        ids_RG, by_id_RG = ids_RG.sort(dim=-1)  # so that padding comes last among equals
        values_RG = values_RG.gather(1, by_id_RG)
        order_RL = values_RG.sort(dim=-1, descending=True, stable=True).indices[:, :num]
        return values_RG.gather(1, order_RL), ids_RG.gather(1, order_RL).long()


def order_keys(x: Tensor) -> Tensor:
    """int32 that order as the floats do; both zeros are one. Not for NaN."""
    return _flip((x + 0.0).view(torch.int32))


def from_order_keys(keys: Tensor) -> Tensor:
    """The floats, float32."""
    return _flip(keys).view(torch.float32)


def _flip(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
