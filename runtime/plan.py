"""What the engine tells its ranks each step (`StepPlan`: only what changed) and what comes back (`StepResult`).

Ranks keep a table with one row per *slot*: the tokens, the block table and the sampling parameters of the sequence that
holds the slot. A sampled token is written into its own row by the rank that drew it, so a plan never carries
tokens that the ranks know, and a sequence's next row may be planned before the host has seen its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    """Compute tokens [start, start + count) of the sequence in `slot`; draw the next one if `samples`.

    If the plan has drafts for the slot, the last of these tokens are guesses, and a token is drawn behind the last
    known one and behind each guess.
    """

    slot: int
    start: int
    count: int
    samples: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step. Order of effects on a rank: admissions, blocks, slices.

    blocks: (slot, page numbers appended to the slot's block table); an admission empties the table first.
    drafts: slot -> guesses, at least one, that stand behind the sequence's known tokens for this step alone.
    masks: slot -> allowed-token bitmask of ceil(V / 32) little-endian 32-bit words, for constrained rows that sample;
    one behind the other where several tokens are drawn.
    """

    step: int
    admissions: list[Admission]
    blocks: list[tuple[int, list[int]]]
    slices: list[Slice]
    masks: dict[int, bytes] = {}
    drafts: dict[int, list[int]] = {}

    @property
    def num_tokens(self) -> int:
        return sum(s.count for s in self.slices)


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step drew. Lists are aligned with the plan's sampling slices, in order: one entry each, or one and as many
    more as the slice has drafts.

    tokens: -1 where the row's logits were not finite: that sequence fails, no other does. What is drawn behind a guess
    means something only if the guess is right, see `num_accepted`.
    logprobs: None, or one entry a row (None for rows that asked for none).
    prompt_logprobs: slot -> one entry for each computed prompt token whose successor is in the prompt.
    device_s: seconds the step took on the rank, for the engine's statistics.
    """

    step: int
    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    device_s: float = 0.0


Drawn = tuple[list[int], list[TokenLogprob] | None]
"""What one slice has added to its log: no token where it does not sample, none behind a wrong guess."""


def drawn_by(plan: StepPlan, result: StepResult) -> Iterator[Drawn]:
    """For each slice of the plan."""
    tokens, logprobs, drafts, at = result.tokens, result.logprobs, plan.drafts, 0
    for part in plan.slices:
        end = kept = at + part.samples
        if drafts and part.slot in drafts:
            kept += num_accepted(drafts[part.slot], tokens[at:])
            end += len(drafts[part.slot])
        entries = None if logprobs is None else [entry for entry in logprobs[at:kept] if entry is not None]
        yield tokens[at:kept], entries or None
        at = end


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many guesses are right: as long as each is the token that was drawn in its place.

    drawn[i] stands where drafts[i] does, and one more behind the last. So a guess never decides what is said; it only
    lets more of it be said in one step.
    """
    for place, (guess, token) in enumerate(zip(drafts, drawn, strict=False)):
        if guess != token:
            return place
    return len(drafts)
