"""Station 5: the response cache. A finished log is replayed, a live one tailed, anything else led."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from ..runtime.generation import GenerationRequest, TokenEvent

Events = AsyncIterator[list[TokenEvent]]
Lead = Callable[[GenerationRequest], Events]


class ResponseCache(Protocol):
    """Keyed by all that decides the answer: prompt, parameters, seed, tenant, model."""

    def open(self, request: GenerationRequest, lead: Lead) -> Events:
        """The log's events from wherever they are had; `lead(request)` makes them anew.

        Never fails because of the cache, and adds at most 60 ms.
        """
        ...


class NoCache:
    """The null cache: every log is made anew."""

    def open(self, request: GenerationRequest, lead: Lead) -> Events:
        return lead(request)
