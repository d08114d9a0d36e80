"""Drawing tokens where each rank holds some columns of the logits: small exchanges, the same tokens at every width.

Whatever ranks exchange is a maximum, a sum of integers or a gathering, so nothing depends on how the vocabulary is cut:

    greedy, temperature    one word a row: the best score of any rank, and the lowest id that has it
    and before it, where a row filters:
    min-p                  the row's largest logit
    top-k                  each rank's k largest logits; of a large k as top-p, with one for each token
    top-p                  four histograms of mass over 256 ranges of logits, each inside the one before

Log-probabilities: a maximum, a sum, and each rank's most likely tokens. A rank that holds no column takes part as if it
held one that no row can draw.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.ops import Logprobs, Ops, SamplingBatch
from ..kernels.reference import nucleus_masses, nucleus_need, scale_by_temperature
from .comm import Comm
from .partition import cut_vocab, length

NEG_INF = float("-inf")
_LAST_ID = (1 << 32) - 1
MOST_SHOWN = 256  # logits of a row that ranks show each other; more cost more than counting all


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


class ShardedVocab:
    """`VocabOps` of a rank that shares its vocabulary with others. All call it with the same batch."""

    def __init__(self, ops: Ops, *, vocab_size: int, comm: Comm) -> None:
        self._ops = ops
        self._comm = comm
        self._vocab_size = vocab_size
        self._mine = cut_vocab(vocab_size, shard=comm.shard, size=comm.size)
        self._width = length(cut_vocab(vocab_size, shard=0, size=comm.size))  # the widest shard's

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """See `VocabOps`. Like the operations of `Ops` it does not wait for the device."""
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
        """[R] the smallest scaled logit each row keeps, -inf for all; None where no row filters.

        Every row takes part: which ones filter the device alone knows, and it is not to be waited for.
        """
        if sampling.all_greedy or not (sampling.max_top_k or sampling.any_top_p or sampling.any_min_p):
            return None
        scaled_RV = scale_by_temperature(logits_RV.float(), sampling.temperature_R)
        highest_R = self._comm.all_reduce_max(scaled_RV.amax(dim=-1).nan_to_num_(nan=float("inf"), neginf=NEG_INF))
        highest_R.masked_fill_(~highest_R.isfinite(), 0)  # a row that cannot be drawn, whatever comes out
        kept_R = highest_R + torch.log(sampling.min_p_R)
        if sampling.max_top_k:
            kept_R = torch.maximum(kept_R, self._kth_largest(scaled_RV, sampling))
        if sampling.any_top_p:
            masses_RV = nucleus_masses(scaled_RV, highest_R[:, None])
            masses_RV.masked_fill_(scaled_RV < kept_R[:, None], 0)
            border_R = self._border(scaled_RV, masses_RV, partial(nucleus_need, top_p_R=sampling.top_p_R))
            kept_R = torch.where(sampling.top_p_R < 1, border_R, kept_R)
        return kept_R.masked_fill_(sampling.temperature_R == 0, NEG_INF)

    def _kth_largest(self, scaled_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """[R] the top_k-th largest of the whole row, -inf where there is no such."""
        top_k_R = sampling.top_k_R.long()
        most = sampling.max_top_k
        if most > MOST_SHOWN:
            kth_R = self._border(scaled_RV, torch.ones_like(scaled_RV, dtype=torch.int64), lambda _: top_k_R)
        else:
            shown = min(most, self._width)
            top_Rk = scaled_RV.topk(min(shown, scaled_RV.shape[1]), dim=-1).values
            top_Rk = F.pad(top_Rk, (0, shown - top_Rk.shape[1]), value=NEG_INF)
            gathered_RK = self._comm.all_gather(top_Rk.contiguous()).movedim(0, 1).flatten(1)
            sorted_RK = gathered_RK.sort(dim=-1, descending=True).values
            kth_R = sorted_RK.gather(1, (top_k_R - 1).clamp_(0, sorted_RK.shape[1] - 1)[:, None])[:, 0]
        return kth_R.masked_fill_((top_k_R <= 0) | (top_k_R >= self._vocab_size), NEG_INF)

    def _border(self, scaled_RV: Tensor, weights_RV: Tensor, need: Callable[[Tensor], Tensor]) -> Tensor:
        """[R] the largest value at and above which lies `need` of the row's weight, given all of it.

        A radix search: 256 ranges of order keys at a time, so four histograms end at one key. weights_RV: int64, to be
        overwritten.
        """
        keys_RV = order_keys(scaled_RV)
        prefix_R1 = torch.zeros_like(keys_RV[:, :1])
        need_R1 = above_R1 = torch.zeros_like(weights_RV[:, :1])
        for shift in (24, 16, 8, 0):
            digits_RV = keys_RV >> shift
            if shift == 24:
                digits_RV += 128  # the sign is in the first digit: as unsigned as the others
            else:
                weights_RV.masked_fill_((keys_RV >> (shift + 8)) != prefix_R1, 0)
                digits_RV &= 255
            histogram_RB = weights_RV.new_zeros(len(keys_RV), 256).scatter_add_(1, digits_RV.long(), weights_RV)
            histogram_RB = self._comm.all_reduce(histogram_RB)
            reached_RB = above_R1 + histogram_RB.flip(1).cumsum(1).flip(1)  # at and above each range's start
            if shift == 24:
                need_R1 = need(reached_RB[:, 0])[:, None]
            digit_R1 = ((reached_RB >= need_R1).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
            above_R1 = reached_RB.gather(1, digit_R1) - histogram_RB.gather(1, digit_R1)
            digit_R1 = digit_R1.int()
            prefix_R1 = digit_R1 - 128 if shift == 24 else (prefix_R1 << 8) + digit_R1
        return from_order_keys(prefix_R1[:, 0])

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
