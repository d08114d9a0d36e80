"""From a plan to tensors: the rank's table of sequences, and the step's batch read off it.

The table lives in numpy arrays that are updated in place, one row a slot; a step's batch is gathered from it with a
handful of vectorised operations, whatever the number of sequences. Shape letters are those of `kernels/ops.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.ops import AttentionBatch, SamplingBatch
from .ahead import UNKNOWN
from .plan import Admission, Slice, StepPlan

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tensors. `rows_R` are the tokens (of T) whose logits draw the next token of `slots[i]`.

    A slot with guesses has several rows, side by side: one for its last known token and one for each guess.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    kv_slots_T: Tensor  # int64
    seq_slots_T: Tensor  # int64, the slot of the sequence that a token belongs to
    attention: AttentionBatch
    rows_R: Tensor  # int64
    slots: list[int]
    next_positions: Ints  # [R] where the drawn token will stand
    sampling: SamplingBatch


class Drawing(NamedTuple):
    """Tokens that are being drawn and not in the table yet: whose, where, and of which holder of the slot."""

    slots: list[int]
    positions: Ints
    epochs: Ints


class SequenceTable:
    """What a rank knows of each slot's sequence: tokens, pages and how it samples."""

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        # One more column: the last token a sequence may draw stands at max_model_len.
        self.tokens: Ints = np.zeros((num_slots, max_model_len + 1), np.int32)
        self._pages: Ints = np.zeros((num_slots, -(-max_model_len // block_size)), np.int32)
        self._num_pages = [0] * num_slots
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int32)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._seed = np.zeros(num_slots, np.int64)
        self._epochs: Ints = np.zeros(num_slots, np.int32)  # holders that a slot has had

    def apply(self, plan: StepPlan) -> None:
        """Take in what changed since the last step."""
        for admission in plan.admissions:
            self._admit(admission)
        for slot, pages in plan.blocks:
            have = self._num_pages[slot]
            self._pages[slot, have : have + len(pages)] = pages
            self._num_pages[slot] = have + len(pages)

    def _admit(self, admission: Admission) -> None:
        slot, params = admission.slot, admission.params
        self.tokens[slot, : len(admission.tokens)] = admission.tokens
        self._num_pages[slot] = 0
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = admission.seed
        self._epochs[slot] += 1

    def foresee(self, slot: int, pages: list[int]) -> None:
        """Write the whole block table of a slot, with pages that a plan is yet to append."""
        self._pages[slot, : len(pages)] = pages

    def append(self, slots: list[int], positions: Ints, tokens: NDArray[np.int64]) -> None:
        """Store drawn tokens in their own rows, where the next step reads them."""
        self.tokens[slots, positions] = tokens

    def expect(self, batch: "StepBatch") -> Drawing:
        """The step draws these tokens: UNKNOWN until they are settled."""
        self.tokens[batch.slots, batch.next_positions] = UNKNOWN
        return Drawing(batch.slots, batch.next_positions, self._epochs[batch.slots])

    def current(self, drawing: Drawing) -> NDArray[np.intp]:
        """Its rows whose slots still have the holder that they are drawn for."""
        return np.flatnonzero(self._epochs[drawing.slots] == drawing.epochs)

    def settle(self, drawing: Drawing, tokens: NDArray[np.int64]) -> None:
        """What was drawn. That of rows which are not current is dropped."""
        rows = self.current(drawing)
        self.append([drawing.slots[row] for row in rows], drawing.positions[rows], tokens[rows])

    def batch(self, slices: list[Slice], drafts: Mapping[int, list[int]] | None = None) -> StepBatch:
        """The tensors of one step. drafts: guesses by slot, see `StepPlan`."""
        if drafts:
            slices = self._spread(slices, drafts)
        slot_S = np.array([s.slot for s in slices], np.int64)
        start_S = np.array([s.start for s in slices], np.int32)
        count_S = np.array([s.count for s in slices], np.int32)
        samples_S = np.array([s.samples for s in slices], np.bool_)
        query_start_S1 = np.zeros(len(slices) + 1, np.int32)
        np.cumsum(count_S, out=query_start_S1[1:])
        kv_lens_S = start_S + count_S

        row_T = np.repeat(np.arange(len(slices)), count_S)
        positions_T = np.arange(query_start_S1[-1], dtype=np.int64) - (query_start_S1[:-1] - start_S)[row_T]
        slot_T = slot_S[row_T]
        page_T = self._pages[slot_T, positions_T // self._block_size].astype(np.int64)
        kv_slots_T = page_T * self._block_size + positions_T % self._block_size
        num_pages = -(-int(kv_lens_S.max()) // self._block_size)

        sampling_slots = slot_S[samples_S]
        next_positions = kv_lens_S[samples_S]
        return StepBatch(
            token_ids_T=self._tensor(self.tokens[slot_T, positions_T].astype(np.int64)),
            positions_T=self._tensor(positions_T),
            kv_slots_T=self._tensor(kv_slots_T),
            seq_slots_T=self._tensor(slot_T),
            attention=AttentionBatch(
                query_start_S1=self._tensor(query_start_S1),
                kv_lens_S=self._tensor(kv_lens_S),
                block_table_SP=self._tensor(self._pages[slot_S, :num_pages]),
                num_decodes=int((count_S == 1).sum()),
                max_query_len=int(count_S.max()),
                max_kv_len=int(kv_lens_S.max()),
                query_lens=tuple(count_S.tolist()),
                kv_lens=tuple(kv_lens_S.tolist()),
            ),
            rows_R=self._tensor((query_start_S1[1:][samples_S] - 1).astype(np.int64)),
            slots=sampling_slots.tolist(),
            next_positions=next_positions,
            sampling=self._sampling(sampling_slots, next_positions),
        )

    def _spread(self, slices: list[Slice], drafts: Mapping[int, list[int]]) -> list[Slice]:
        """Write the guesses behind the known tokens, and give each token of such a slice a slice of its own.

        To attention they are sequences that share pages, each a token longer: all keys are stored before any is read.
        So a guess is computed as a decoded token is, by the same kernels and with the same numbers.
        """
        spread: list[Slice] = []
        for part in slices:
            guesses = drafts.get(part.slot)
            if guesses is None:
                spread.append(part)
                continue
            end = part.start + part.count
            self.tokens[part.slot, end - len(guesses) : end] = guesses
            spread += [Slice(part.slot, start, 1, True) for start in range(part.start, end)]
        return spread

    def _sampling(self, slots: NDArray[np.int64], positions: Ints) -> SamplingBatch:
        temperature, top_k = self._temperature[slots], self._top_k[slots]
        top_p, min_p = self._top_p[slots], self._min_p[slots]
        draws = temperature > 0
        return SamplingBatch(
            temperature_R=self._tensor(temperature),
            top_k_R=self._tensor(top_k),
            top_p_R=self._tensor(top_p),
            min_p_R=self._tensor(min_p),
            seed_R=self._tensor(self._seed[slots]),
            position_R=self._tensor(positions.astype(np.int64)),
            all_greedy=not draws.any(),
            max_top_k=int(top_k[draws].max(initial=0)),
            any_top_p=bool((top_p[draws] < 1).any()),
            any_min_p=bool(min_p[draws].any()),
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array)
