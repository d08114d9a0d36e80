"""Station 6: which replica takes a log. Pure: what it chooses by, and its dice, are handed in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Protocol

from ..runtime.generation import GenerationRequest
from .backend import ReplicaState


class Balancer(Protocol):
    """Chooses before every attempt, so also before a log goes on elsewhere."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        """A replica's id; None leaves it to the transport. `lost`: replicas that failed this log already."""
        ...


class AnyReplica:
    """The null balancer: whichever the transport prefers."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        return None


class LeastLoaded:
    """The ready replica that owes the fewest tokens; of equals any, so that ingresses do not all choose the same."""

    def __init__(self, replicas: Callable[[], Mapping[str, ReplicaState]], *, rng: random.Random) -> None:
        self._replicas = replicas
        self._rng = rng

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        owed = {
            replica: state.tokens_owed
            for replica, state in self._replicas().items()
            if state.problem is None and replica not in lost
        }
        least = min(owed.values(), default=0)
        return self._rng.choice([replica for replica, tokens in owed.items() if tokens == least]) if owed else None
