"""Station 5: the response cache. A finished log is replayed, a live one tailed, anything else led."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Protocol

import msgspec

from ..runtime.errors import CacheMiss, LogLost
from ..runtime.generation import GenerationRequest, TokenEvent

Events = AsyncIterator[list[TokenEvent]]
Lead = Callable[[GenerationRequest], Events]


class CacheMode(StrEnum):
    """What a client may ask of the cache (`X-Shoal-Cache`)."""

    AUTO = "auto"  # a hit, a shared flight, or a new one that is stored
    BYPASS = "bypass"  # neither read nor stored
    REFRESH = "refresh"  # made anew, and stored over what is there
    ONLY = "only"  # a finished log or nothing


class CacheStatus(StrEnum):
    """Where an answer came from (`X-Shoal-Cache` of the answer)."""

    HIT = "hit"
    SHARED = "shared"
    MISS = "miss"
    BYPASS = "bypass"


class Caching(msgspec.Struct, frozen=True, kw_only=True):
    """How one log stands to the cache.

    scope: who may share it: a tenant's salt, or one for all. is_reproducible: asked again, the log would be the same
    (temperature 0, or the client's seed). idempotency: the client's `Idempotency-Key` and which of the request's logs
    this is; such a log is kept, whether it is reproducible or not, so that the same request sent again goes on with it.
    resumes: the client has had a part of it (`Last-Event-ID`).
    """

    mode: CacheMode = CacheMode.AUTO
    scope: str = ""
    is_reproducible: bool = False
    idempotency: tuple[str, int] | None = None
    resumes: bool = False


class Reading(Protocol):
    """One reader's way through one log: `async for events in reading`, from its first token to its terminal event.

    status, age_s: where it comes from, and how old a replayed log is; settled before the first events are there.
    """

    status: CacheStatus
    age_s: float

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]: ...

    async def settled(self) -> None:
        """Until `status` and `age_s` are known, or never will be."""
        ...

    async def __anext__(self) -> list[TokenEvent]:
        """All events that are there, at least one.

        Raises:
            CacheMiss: mode ONLY, and there is no finished log. LogLost: the client has had a part of a log that is gone
            and cannot be made again. ShoalError: as whoever makes the log raised it; the log ends with it.
        """
        ...

    def stopped(self, length: int, stop: str) -> None:
        """The log is complete with `length` tokens: there its text came to the stop string `stop`."""
        ...

    async def aclose(self) -> None:
        """This reader leaves. Where nobody else reads, the generation is aborted. Idempotent."""
        ...


class ResponseCache(Protocol):
    """Keyed by all that decides the answer: model, prompt, parameters, seed, tenant."""

    def open(self, request: GenerationRequest, lead: Lead, caching: Caching) -> Reading:
        """The log from wherever it is had; `lead(request)` makes it, or makes it go on behind `request.tokens`.

        Never fails because of the store behind it, and adds at most 60 ms.
        """
        ...

    async def close(self) -> None:
        """Leave what is led or read. Idempotent."""
        ...


class Led:
    """A log that is this reader's alone: nothing is looked up, shared or stored."""

    status = CacheStatus.BYPASS
    age_s = 0.0

    def __init__(self, events: Events) -> None:
        self._events = events

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        return await anext(self._events)

    async def settled(self) -> None:
        return

    def stopped(self, length: int, stop: str) -> None:
        return

    async def aclose(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined]  # every `lead` is an async generator


class Refused:
    """A reading that ends before it begins."""

    status = CacheStatus.MISS
    age_s = 0.0

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __aiter__(self) -> Refused:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        raise self._error

    async def settled(self) -> None:
        return

    def stopped(self, length: int, stop: str) -> None:
        return

    async def aclose(self) -> None:
        return


def uncached(request: GenerationRequest, lead: Lead, caching: Caching) -> Reading:
    """What is not looked up is made anew, unless it is asked for as it was."""
    if caching.mode is CacheMode.ONLY:
        return Refused(CacheMiss("no cached answer: one to this request is not cached at all (cache_mode)"))
    if caching.resumes and not caching.is_reproducible:
        lost = "the log that was to be continued was not kept; send Idempotency-Key with the first request"
        return Refused(LogLost(lost, param="last-event-id"))
    return Led(lead(request))


class NoCache:
    """The null cache: every log is made anew."""

    def open(self, request: GenerationRequest, lead: Lead, caching: Caching) -> Reading:
        return uncached(request, lead, caching)

    async def close(self) -> None:
        return
