"""A step in outline: what the scheduler has decided so far, on its way to becoming a `StepPlan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Admission, Slice, StepPlan
from .sequence import Sequence

Row = tuple[Sequence, int]  # whose a slice is, and its epoch when that was planned


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan whose result is not back, and whose its slices are, in their order."""

    plan: StepPlan
    rows: list[Row]


@dataclass(slots=True)
class Outline:
    """Slices of one known token and longer ones are kept apart: the former go first, and attention relies on it."""

    step: int
    budget: int  # tokens that may still be planned
    admissions: list[Admission] = field(default_factory=list)
    blocks: list[tuple[int, list[int]]] = field(default_factory=list)
    masks: dict[int, bytes] = field(default_factory=dict)
    out_of_blocks: bool = False
    singles: list[Slice] = field(default_factory=list)
    single_rows: list[Row] = field(default_factory=list)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    chunks: list[Slice] = field(default_factory=list)
    chunk_rows: list[Row] = field(default_factory=list)

    def admit(self, seq: Sequence) -> None:
        """Tell the ranks all there is to know of a sequence that has just taken a slot."""
        request = seq.request
        tokens, stop_ids = list(seq.tokens), sorted(seq.stop_ids)
        self.admissions.append(Admission(seq.slot, tokens, seq.prompt_len, request.params, request.seed, stop_ids))
        self.blocks.append((seq.slot, list(seq.blocks)))

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """Compute the sequence's next tokens, and draw the one behind them if they are the last."""
        start, end = seq.num_computed, seq.num_computed + num_tokens
        samples = end == len(seq.tokens) + seq.num_pending and end < seq.limit
        part = Slice(seq.slot, start, num_tokens, samples)
        if num_tokens == 1:
            self.singles.append(part)
            self.single_rows.append((seq, seq.epoch))
        else:
            self.chunks.append(part)
            self.chunk_rows.append((seq, seq.epoch))
        self.budget -= num_tokens
        seq.num_computed = end
        if samples:
            seq.num_pending += 1
            seq.last_drawn = self.step
            if seq.mask is not None:
                self.masks[seq.slot] = seq.mask

    def guess(self, index: int, drafts: list[int], masks: list[bytes]) -> None:
        """Have the single row at `index` compute these guesses, too. masks: of a constrained row, one behind each."""
        part, seq = self.singles[index], self.single_rows[index][0]
        seq.num_guesses = len(drafts)
        self.singles[index] = Slice(part.slot, part.start, 1 + len(drafts), True)
        self.drafts[part.slot] = drafts
        self.budget -= len(drafts)
        if masks:
            self.masks[part.slot] = b"".join([self.masks[part.slot], *masks])

    def plan(self) -> StepPlan:
        """The finished step."""
        return StepPlan(self.step, self.admissions, self.blocks, self.singles + self.chunks, self.masks, self.drafts)

    @property
    def rows(self) -> list[Row]:
        """One for each slice of the plan, in its order."""
        return self.single_rows + self.chunk_rows
