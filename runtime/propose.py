"""Guesses at what comes next in a log, so that a step may say several tokens of it (speculative decoding).

A guess decides nothing: the model draws the token of each place with that place's own noise, and a guess that is equal
has spared a step (Leviathan et al., arXiv:2211.17192, without their rejection sampling: draws are pure functions of
logits, seed and position here, so a log says the same with guesses and without).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .grammar import FREE, Constraint
from .plan import StepPlan, StepResult


class Ask(NamedTuple):
    """One sequence whose next tokens are wanted; every token of it is known. Lists and constraint are the scheduler's
    own."""

    slot: int
    tokens: list[int]
    blocks: list[int]  # with room for `most` more tokens
    most: int  # at least 1
    mask: bytes | None = None  # of a constrained sequence: what may come next
    constraint: Constraint = FREE


class Proposer(Protocol):
    """Where guesses come from. What it keeps of a sequence goes with the slot, and is made anew at each admission."""

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        """For each of them up to `most` tokens, maybe none. Every result of the sequence so far has been followed."""
        ...

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        """A step is over. Called in the order of the plans; those that a failure of the ranks has lost never come."""
        ...


class NoProposer:
    """No guesses."""

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        return [[] for _ in asks]

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        pass
