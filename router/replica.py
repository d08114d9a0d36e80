"""Station 8: the Serve deployment around one `AsyncEngine`, and the ingress's side of the line to it.

Frames on the line are msgpack: an array is events, a map is a failure. Whatever goes wrong in here is sent as a
failure, so an exception that arrives at the other end speaks of the line or of the process, never of the request. Ray
is imported only where it is called: the router's tests run without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..runtime.errors import EngineDead, EngineError, QueueFull, ShoalError, Unavailable
from ..runtime.generation import FinishReason, GenerationRequest, StructuredOutputs, TokenEvent
from ..runtime.grammar import FREE, Constraint
from ..runtime.stats import Stats
from .backend import Failure, Frame, ModelInfo, ReplicaLost, error_of, failure_of

logger = logging.getLogger("shoal.router")

_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(GenerationRequest).decode
_decode_frame = msgspec.msgpack.Decoder(Frame).decode
_decode_stats = msgspec.msgpack.Decoder(Stats).decode


class Engine(Protocol):
    """What a replica needs of `runtime.async_engine.AsyncEngine`."""

    @property
    def healthy(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def generate(
        self, request: GenerationRequest, constraint: Constraint = ...
    ) -> AsyncGenerator[list[TokenEvent], None]: ...

    def stats(self) -> Stats: ...

    async def drain(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Grammars(Protocol):
    """What a replica needs of `runtime.grammar.GrammarCompiler`."""

    async def acheck(self, spec: StructuredOutputs) -> None: ...

    def constraint(self, spec: StructuredOutputs, tokens: list[int] | None = None) -> Constraint: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a replica is made of; built in its own process by a factory that `cluster/app.py` binds."""

    engine: Engine
    grammars: Grammars
    info: ModelInfo
    drain_timeout_s: float = 10.0


class Replica:
    """One engine behind a Serve handle."""

    def __init__(self, build: Callable[[], Parts]) -> None:
        self._parts = build()

    async def generate(self, payload: bytes) -> AsyncIterator[bytes]:
        """One log's frames. Closing or cancelling aborts the generation within a step."""
        try:
            async with aclosing(self._frames(_decode_request(payload))) as frames:
                async for frame in frames:
                    yield _encode(frame)
        except ShoalError as error:
            yield _encode(failure_of(error))
        except Exception as error:
            logger.exception("unexpected %s in a replica", type(error).__name__)
            yield _encode(Failure(kind=EngineError.__name__, message="internal error in the replica; its log has it"))

    async def info(self) -> bytes:
        return _encode(self._parts.info)

    async def ready(self) -> str | None:
        """None: work is taken. Else why not."""
        if self._parts.engine.ready:
            return None
        return "the engine is draining" if self._parts.engine.healthy else "the engine has stopped making steps"

    async def stats(self) -> tuple[str, bytes]:
        """(replica id, `Stats`)."""
        return _replica_id(), _encode(self._parts.engine.stats())

    async def check_health(self) -> None:
        """Serve calls this and replaces the replica when it raises. A process that makes no step is dead."""
        if not self._parts.engine.healthy:
            raise EngineDead("the engine has stopped making steps")

    async def shutdown(self) -> None:
        """Drain to the deadline, then end the rest with a terminal event each."""
        await self._parts.engine.drain(self._parts.drain_timeout_s)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the engine and the grammar processes. Idempotent."""
        self._parts.engine.close()
        self._parts.grammars.close()

    def __del__(self) -> None:  # Serve calls it last, after its own draining
        if hasattr(self, "_parts"):  # not so where building it failed
            self.close()

    async def _frames(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        constraint = await self._constraint(request)
        async with aclosing(self._parts.engine.generate(request, constraint)) as batches:
            async for batch in batches:
                if batch[-1].finish_reason is FinishReason.ERROR and not self._parts.engine.healthy:
                    # Not this log's fault: the engine died under it, so another one may go on.
                    if rest := [event for event in batch if event.finish_reason is None]:
                        yield rest
                    raise EngineDead(batch[-1].error or "the engine died")
                yield batch

    async def _constraint(self, request: GenerationRequest) -> Constraint:
        """Behind the log's tokens. Checked in a process that may be killed, made in a thread: nobody waits for it."""
        spec = request.params.structured_outputs
        if spec is None:
            return FREE
        grammars = self._parts.grammars
        await grammars.acheck(spec)
        return await asyncio.to_thread(grammars.constraint, spec, request.tokens)


class HandleBackend:
    """A `Backend` over a Ray Serve DeploymentHandle to `Replica`s."""

    def __init__(self, handle: Any, *, timeout_s: float = 1.0) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._timeout_s = timeout_s

    async def generate(
        self, request: GenerationRequest, replica: str | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        response = self._streams.generate.remote(_encode(request))
        ended = False
        try:
            async for payload in response:
                frame = _decode_frame(payload)
                if isinstance(frame, Failure):
                    ended = True
                    raise error_of(frame)
                ended = bool(frame) and frame[-1].finish_reason is not None
                yield frame
            ended = True
        except ShoalError:
            raise
        except Exception as error:
            raise _lost(error) from error
        finally:
            if not ended:
                with suppress(Exception):  # of a response that failed already
                    response.cancel()

    async def info(self) -> ModelInfo:
        return msgspec.msgpack.decode(await self._ask("info"), type=ModelInfo)

    async def ready(self) -> None:
        reason = await self._ask("ready")
        if reason is not None:
            raise Unavailable(f"not ready: {reason}")

    async def stats(self) -> Mapping[str, Stats]:
        try:
            answers = await self._handle.broadcast("stats").results_async(
                timeout_s=self._timeout_s, return_exceptions=True
            )
        except Exception as error:  # noqa: BLE001 - metrics never fail a scrape
            logger.warning("no statistics from the replicas: %s", type(error).__name__)
            return {}
        return {answer[0]: _decode_stats(answer[1]) for answer in answers if not isinstance(answer, BaseException)}

    async def _ask(self, method: str) -> Any:
        """Raises Unavailable where no replica answers in time."""
        response = getattr(self._handle, method).remote()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except TimeoutError:
            response.cancel()
            raise Unavailable(f"not ready: no replica answered within {self._timeout_s:g} s") from None
        except Exception as error:
            raise Unavailable(f"not ready: the replica failed with {type(error).__name__}") from error


def _lost(error: Exception) -> ShoalError:
    """What an exception of the line means to a request."""
    from ray.serve.exceptions import BackPressureError

    if isinstance(error, BackPressureError):
        return QueueFull("all replicas have full queues (max_queued)", retry_after=error.retry_after_s or 1.0)
    logger.warning("lost a replica in mid-stream: %s", type(error).__name__)
    return ReplicaLost("the replica was lost before the answer's end")


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
