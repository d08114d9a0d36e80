"""Between stations 6 and 7: a variant's logs go on at another variant where that changes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.stats import Stats
from .backend import Backend, ModelInfo, ReplicaState
from .balance import Balancer


class Twin(Protocol):
    """What computes the same tokens."""

    @property
    def backend(self) -> Backend: ...

    @property
    def balancer(self) -> Balancer: ...


def is_ready(backend: Backend) -> bool:
    """Whether one of its replicas takes work."""
    return any(state.problem is None for state in backend.replicas().values())


class Twinned:
    """A variant's `Backend` and `Balancer`, and while none of its replicas is ready those of its twin.

    twin: one whose digest is equal and that is ready; asked whenever it matters.
    """

    def __init__(self, backend: Backend, balancer: Balancer, twin: Callable[[], Twin | None]) -> None:
        self._backend = backend
        self._balancer = balancer
        self._twin = twin

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        """As `Balancer.choose`."""
        twin = self._needed()
        return (self._balancer if twin is None else twin.balancer).choose(request, lost=lost)

    def generate(self, request: GenerationRequest, replica: str | None = None) -> AsyncIterator[list[TokenEvent]]:
        """As `Backend.generate`."""
        twin = self._needed()
        return (self._backend if twin is None else twin.backend).generate(request, replica)

    async def info(self) -> ModelInfo:
        return await self._backend.info()

    async def ready(self) -> None:
        await self._backend.ready()

    async def stats(self) -> Mapping[str, Stats]:
        return await self._backend.stats()

    def replicas(self) -> Mapping[str, ReplicaState]:
        """Those that a log may go to."""
        twin = self._needed()
        return (self._backend if twin is None else twin.backend).replicas()

    def _needed(self) -> Twin | None:
        twin = self._twin()  # first: mostly there is none, and then nothing costs anything
        return None if twin is None or is_ready(self._backend) else twin
