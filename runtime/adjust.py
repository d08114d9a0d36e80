"""What a log wants of its logits before a token is drawn from them.

The order is vLLM's: mask, logit bias, min_tokens, penalties. Kept while a sequence holds its slot, and rebuilt from the
log.
"""

from collections.abc import Iterable, KeysView
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .plan import Admission

NEG_INF = float("-inf")


@dataclass(slots=True)
class _Adjustment:
    """One sequence's, mask aside. Ids count from the first of this rank's."""

    bias_ids: Tensor | None = None
    bias: Tensor | None = None
    stop_ids: Tensor | None = None
    stop_allowed_from: int = 0  # position of the first token that may be a stop token
    seen_V: Tensor | None = None  # bool: in the prompt or in the output
    output_counts_V: Tensor | None = None  # float32
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def copy(self) -> "_Adjustment":
        """One that can count on its own."""
        assert self.seen_V is not None
        assert self.output_counts_V is not None
        return replace(self, seen_V=self.seen_V.clone(), output_counts_V=self.output_counts_V.clone())

    def penalise(self, logits_V: Tensor) -> None:
        """Repetition (Keskar et al., arXiv:1909.05858), frequency and presence penalties, in place."""
        if self.seen_V is not None and self.repetition != 1.0:
            scaled = torch.where(logits_V > 0, logits_V / self.repetition, logits_V * self.repetition)
            torch.where(self.seen_V, scaled, logits_V, out=logits_V)
        if self.output_counts_V is not None:
            logits_V.sub_(self.output_counts_V, alpha=self.frequency)
            logits_V.sub_((self.output_counts_V > 0).to(logits_V.dtype), alpha=self.presence)


class Adjustments:
    """Those of all slots, for a part of the vocabulary (V is its size)."""

    def __init__(self, columns: slice, device: torch.device) -> None:
        self._columns_V = columns
        self._device = device
        self._by_slot: dict[int, _Adjustment] = {}

    @property
    def slots(self) -> KeysView[int]:
        """Whose logits are adjusted."""
        return self._by_slot.keys()

    def admit(self, admission: Admission) -> None:
        """Set up a slot from its log, forgetting whoever held it before."""
        slot, params = admission.slot, admission.params
        self._by_slot.pop(slot, None)
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty != 0 or params.frequency_penalty != 0
        if not (params.logit_bias or penalised or (params.min_tokens and admission.stop_token_ids)):
            return
        adjustment = _Adjustment(
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
        if params.logit_bias:
            mine = self._columns(params.logit_bias)
            adjustment.bias_ids = self._tensor(mine, torch.int64)
            biases = [params.logit_bias[self._columns_V.start + column] for column in mine]
            adjustment.bias = self._tensor(biases, torch.float32)
        if params.min_tokens and admission.stop_token_ids:
            adjustment.stop_ids = self._tensor(self._columns(admission.stop_token_ids), torch.int64)
            adjustment.stop_allowed_from = admission.prompt_len + params.min_tokens
        if penalised:
            self._count(adjustment, admission)
        self._by_slot[slot] = adjustment

    def _count(self, adjustment: _Adjustment, admission: Admission) -> None:
        width = self._columns_V.stop - self._columns_V.start
        adjustment.seen_V = torch.zeros(width, dtype=torch.bool, device=self._device)
        adjustment.seen_V[self._tensor(self._columns(admission.tokens), torch.int64)] = True
        output = self._tensor(self._columns(admission.tokens[admission.prompt_len :]), torch.int64)
        adjustment.output_counts_V = torch.zeros(width, dtype=torch.float32, device=self._device)
        adjustment.output_counts_V.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))

    def apply(self, logits_QV: Tensor, slot: int, *, position: int, mask: bytes | None, guesses: list[int]) -> None:
        """Adjust, in place, the rows from which the slot's next tokens are drawn.

        logits_QV: row i is for the token at `position + i`, and for the log with the first guesses said that stand
        before it: all i of them, or, of the last row, all there are. mask: of as many rows, one behind the other.
        """
        if mask is not None:
            logits_QV.masked_fill_(~self._unpack(mask, len(logits_QV)), NEG_INF)
        if slot not in self._by_slot:
            return
        adjustment = self._by_slot[slot]
        if guesses and adjustment.seen_V is not None:
            adjustment = adjustment.copy()
        said = len(guesses) + 1 - len(logits_QV)  # before the first row
        for guess in guesses[:said]:
            self._count_token(adjustment, guess)
        for ahead, logits_V in enumerate(logits_QV):
            if ahead:
                self._count_token(adjustment, guesses[said + ahead - 1])
            if adjustment.bias_ids is not None and adjustment.bias is not None:
                logits_V.index_add_(0, adjustment.bias_ids, adjustment.bias)
            if adjustment.stop_ids is not None and position + ahead < adjustment.stop_allowed_from:
                logits_V[adjustment.stop_ids] = NEG_INF
            adjustment.penalise(logits_V)

    def say(self, slot: int, tokens: Iterable[int]) -> None:
        """Count tokens that the log has got, where tokens are counted; -1 is none."""
        if slot in self._by_slot:
            for token in tokens:
                self._count_token(self._by_slot[slot], token)

    def _count_token(self, adjustment: _Adjustment, token: int) -> None:
        if adjustment.seen_V is not None and token >= 0:
            assert adjustment.output_counts_V is not None
            for column in self._columns([token]):
                adjustment.seen_V[column] = True
                adjustment.output_counts_V[column] += 1

    def _columns(self, ids: Iterable[int]) -> list[int]:
        """Where those of these ids that are this rank's stand in its logits."""
        first, stop = self._columns_V.start, self._columns_V.stop
        return [token - first for token in ids if first <= token < stop]

    def _unpack(self, masks: bytes, num: int) -> Tensor:
        """[num, V] bool."""
        first, stop = self._columns_V.start, self._columns_V.stop
        packed = np.frombuffer(masks, np.uint8).reshape(num, -1)[:, first // 8 : -(-stop // 8)]
        bits = np.unpackbits(packed, axis=1, bitorder="little")[:, first % 8 :][:, : stop - first]
        return torch.from_numpy(bits).to(self._device, torch.bool)

    def _tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
