"""What the engine tells its ranks each step (`StepPlan`: only what changed) and what comes back (`StepResult`).

Ranks keep a table with one row per *slot*: the tokens, the block table and the sampling parameters of the sequence that
holds the slot. A sampled token is written into its own row by the rank that drew it, so a plan never carries
tokens that the ranks know, and a sequence's next row may be planned before the host has seen its last token.
"""

from __future__ import annotations

import msgspec

from .generation import SamplingParams, TokenLogprob


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot: all that ranks must know of it. Sent again, with more tokens, after a preemption."""

    slot: int
    tokens: list[int]  # the prompt and everything produced so far
    prompt_len: int
    params: SamplingParams
    seed: int
    stop_token_ids: list[int]  # may not be drawn before params.min_tokens are there (EOS included unless ignored)


class Slice(msgspec.Struct, frozen=True, array_like=True):
    """Compute tokens [start, start + count) of the sequence in `slot`; draw the next one if `samples`."""

    slot: int
    start: int
    count: int
    samples: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step. Order of effects on a rank: admissions, blocks, slices.

    blocks: (slot, page numbers appended to the slot's block table); an admission empties the table first.
    masks: slot -> allowed-token bitmask of ceil(V / 32) little-endian 32-bit words, for constrained rows that sample.
    """

    step: int
    admissions: list[Admission]
    blocks: list[tuple[int, list[int]]]
    slices: list[Slice]
    masks: dict[int, bytes] = {}

    @property
    def num_tokens(self) -> int:
        return sum(s.count for s in self.slices)


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step drew. Lists are aligned with the plan's sampling slices, in order.

    tokens: -1 where the row's logits were not finite: that sequence fails, no other does.
    logprobs: None, or one entry a row (None for rows that asked for none).
    prompt_logprobs: slot -> one entry for each computed prompt token whose successor is in the prompt.
    device_s: seconds the step took on the rank, for the engine's statistics.
    """

    step: int
    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    device_s: float = 0.0
