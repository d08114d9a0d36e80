"""Beside station 7: requests are copied to a variant whose answers nobody gets, to see whether it would say the same.

A copy is one log more at the variant, behind everything else there. Nobody waits for it, and it is the first to go: no
copy begins while requests wait, here or at the variant, and those in the air are dropped then. What is compared are the
tokens, both drawn with one seed; of an answer that was cut off as far as it came.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, cast

import msgspec

from ..runtime.generation import FinishReason, GenerationRequest, TokenEvent
from .meters import VariantMeter
from .model import Model
from .rollout_config import RolloutConfig

logger = logging.getLogger("shoal.router")

LAST = 2**31 - 1  # the priority behind all others
ACCOUNT = "shadow"  # no tenant's


class Original(Protocol):
    """The log that is copied, told of while it is made: `with original: original.came(events)`."""

    def __enter__(self) -> Original: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def came(self, events: Sequence[TokenEvent]) -> None: ...


class Uncopied:
    """The null original."""

    def __enter__(self) -> Original:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def came(self, events: Sequence[TokenEvent]) -> None:
        return


class Copied:
    """tokens: so far. is_whole: it came to its own end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_whole = False
        self.over = asyncio.Event()

    def __enter__(self) -> Original:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()

    def came(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self.tokens += event.tokens
            self.is_whole = event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def has_had_enough(self, num_tokens: int) -> bool:
        """Whether a copy of so many tokens can be compared already."""
        return self.over.is_set() and not self.is_whole and num_tokens >= len(self.tokens)

    def difference(self, tokens: Sequence[int]) -> int | None:
        """The first token in which a copy differs that has ended; None where it does not."""
        if not self.is_whole:
            tokens = tokens[: len(self.tokens)]
        for position, (own, other) in enumerate(zip(self.tokens, tokens, strict=False)):
            if own != other:
                return position
        return None if len(tokens) == len(self.tokens) else min(len(tokens), len(self.tokens))


class Dropped(Exception):
    """There is something better to do, or nothing to compare with."""


class Late(Exception):
    """It took longer than a copy may."""


class Shadows:
    """The copies of one ingress. All belongs to one event loop.

    find: a variant by its name. has_queue: whether requests wait for a place here. logs_text: both answers' where they
    differ.
    """

    def __init__(
        self,
        find: Callable[[str], Model | None],
        *,
        meter: VariantMeter,
        rng: random.Random,
        has_queue: Callable[[], bool],
        logs_text: bool = False,
    ) -> None:
        self._config = RolloutConfig()
        self._find = find
        self._meter = meter
        self._rng = rng
        self._has_queue = has_queue
        self._logs_text = logs_text
        self._running: set[asyncio.Task[list[int]]] = set()
        self._comparing: set[asyncio.Task[None]] = set()

    def roll_out(self, config: RolloutConfig) -> None:
        """From the next request on."""
        self._config = config

    def copy(self, request: GenerationRequest, *, of: str) -> Original:
        """Begin the copies that fall to a log which the variant `of` makes. Never fails, and waits for nothing."""
        names = [name for name, share in self._config.shadow.items() if self._rng.random() < share and name != of]
        if not names or request.tokens:  # what goes on with a log was copied where it began
            return Uncopied()
        original = Copied()
        for name in names:
            self._start(name, request, original)
        return original

    def shed(self) -> None:
        """Drop what is in the air: requests wait."""
        for copy in self._running:
            copy.cancel()

    async def close(self) -> None:
        """Leave all of them."""
        tasks = [*self._running, *self._comparing]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(self, name: str, request: GenerationRequest, original: Copied) -> None:
        model = self._find(name)
        if model is None or len(self._running) >= self._config.max_shadows or self._is_busy(model):
            self._count(name, "dropped")
            return
        loop = asyncio.get_running_loop()
        making = loop.create_task(self._make(model, request, original))
        self._running.add(making)
        making.add_done_callback(self._running.discard)
        comparing = loop.create_task(self._compare(model, making, request, original))
        self._comparing.add(comparing)
        comparing.add_done_callback(self._comparing.discard)

    def _is_busy(self, model: Model) -> bool:
        if self._has_queue() or model.dropped or not model.is_open:
            return True
        states = model.backend.replicas().values()
        return not any(state.problem is None and not state.stats.num_waiting for state in states)

    async def _make(self, model: Model, request: GenerationRequest, original: Copied) -> list[int]:
        """The copy's tokens. Raises Dropped, Late, or whatever else goes wrong with it."""
        with model.in_use():
            limit = self._config.shadow_timeout_s
            copy = msgspec.structs.replace(
                request,
                id=f"{request.id}-{model.name}",
                account=ACCOUNT,
                priority=LAST,
                timeout_s=limit,
                digest=model.info.digest,
            )
            try:
                async with asyncio.timeout(limit):
                    return await self._tokens(model, copy, original)
            except TimeoutError:
                raise Late from None

    async def _tokens(self, model: Model, copy: GenerationRequest, original: Copied) -> list[int]:
        tokens: list[int] = []
        reason: FinishReason | None = None
        replica = model.balancer.choose(copy, lost=frozenset())
        # Every backend is an async generator: closing it is what aborts the generation.
        async with aclosing(cast("_Closable", model.backend.generate(copy, replica))) as batches:
            async for batch in batches:
                for event in batch:
                    tokens += event.tokens
                    reason = event.finish_reason
                if reason is not None or original.has_had_enough(len(tokens)):
                    break
                if self._is_busy(model):
                    raise Dropped
        if reason is FinishReason.TIMEOUT:
            raise Late
        if reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise RuntimeError("the copy did not come to its end")
        return tokens

    async def _compare(
        self, model: Model, making: asyncio.Task[list[int]], request: GenerationRequest, original: Copied
    ) -> None:
        await asyncio.wait([making])
        if making.cancelled() or isinstance(making.exception(), Dropped):
            self._count(model.name, "dropped")
            return
        if (error := making.exception()) is not None:
            self._count(model.name, "late" if isinstance(error, Late) else "failed")
            return
        await original.over.wait()
        if not original.tokens:
            self._count(model.name, "dropped")
            return
        self._compared(model, making.result(), request.id, original)

    def _compared(self, model: Model, tokens: list[int], id: str, original: Copied) -> None:
        position = original.difference(tokens)
        self._count(model.name, "same" if position is None else "differs")
        if position is None:
            return
        self._meter.shadow_position.labels(model.name).observe(position)
        logger.info("the copy of %s at the variant %r differs from token %d on", id, model.name, position)
        if self._logs_text:
            own, other = model.text.decode(original.tokens), model.text.decode(tokens)
            logger.info("the answer was %r, the copy %r", own, other)

    def _count(self, name: str, outcome: str) -> None:
        self._meter.shadows.labels(name, outcome).inc()


class _Closable(AsyncIterator[list[TokenEvent]]):
    async def aclose(self) -> None: ...
