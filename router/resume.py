"""Station 7: the router owns the stream. Whatever happens to a replica, a log ends in exactly one terminal event.

The station keeps the log as it was emitted (`GenerationRequest.tokens` plus what came since), which is all another
replica needs to go on with it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import cast

from ..runtime.errors import EngineError
from ..runtime.generation import GenerationRequest, TokenEvent
from .backend import Backend, ReplicaLost
from .balance import Balancer
from .config import RouterConfig
from .meters import ResumeMeter


class Resume:
    """Follows logs over the replicas of one model. One an ingress; all belongs to one event loop."""

    def __init__(
        self,
        backend: Backend,
        balancer: Balancer,
        *,
        config: RouterConfig,
        meter: ResumeMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._balancer = balancer
        self._config = config
        self._meter = meter
        self._clock = clock

    async def follow(self, request: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
        """The log's events, from its first new token to its one terminal event.

        Raises:
            ReplicaLost: the replica went away, or fell silent without a terminal event.
            ShoalError: as the engine raised it; the log ends with it.
        """
        replica = self._balancer.choose(request, lost=frozenset())
        length = len(request.tokens)
        # Every backend is an async generator: closing it is what aborts the generation.
        async with aclosing(cast("_Closable", self._backend.generate(request, replica))) as batches:
            async for batch in batches:
                for event in batch:
                    if event.start != length:
                        raise EngineError(
                            f"the replica sent token {event.start} of a log of {length}: it broke its promise"
                        )
                    length += len(event.tokens)
                yield batch
                if batch and batch[-1].finish_reason is not None:
                    return
        raise ReplicaLost(f"the replica ended the stream after {length} tokens without a finish reason")


class _Closable(AsyncIterator[list[TokenEvent]]):
    async def aclose(self) -> None: ...
