"""Who is next, and who gives way: the scheduler's order, as one key."""

from __future__ import annotations

from typing import Literal, Protocol

from .generation import GenerationRequest

Key = tuple[int, int]  # (class, place in it), lower goes first


class Policy(Protocol):
    """One order for everything: the lowest key is admitted first, the highest is preempted first.

    So nobody is ever preempted for somebody behind him, the first of all always goes on, and a preempted
    generation stands in front of all that came after it.
    """

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        """(class, place). Fixed for the generation's life and unique: `arrival` counts the requests.

        While there is no room for both, a waiting generation of a lower class takes the place of a running one
        of a higher class; inside a class nobody is displaced by who waits.
        """
        ...


class FirstCome:
    """By arrival."""

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        return (0, arrival)


class Priority:
    """By the request's priority, by arrival where it is equal."""

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        return (request.priority, arrival)


def select_policy(name: Literal["fcfs", "priority"]) -> Policy:
    """The policy that `--scheduling-policy` names."""
    return Priority() if name == "priority" else FirstCome()
