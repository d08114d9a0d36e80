"""Station 6: which replica takes a log. One answer so far: whichever the transport prefers."""

from __future__ import annotations

from typing import Protocol

from ..runtime.generation import GenerationRequest


class Balancer(Protocol):
    """Chooses before every attempt, so also before a log goes on elsewhere."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        """A replica's id; None leaves it to the transport. `lost`: replicas that failed this log already."""
        ...


class AnyReplica:
    """The null balancer: Ray Serve's own power-of-two choice by queue length."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        return None
