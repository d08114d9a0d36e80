"""Beside station 7: a part of the deployment that sleeps has no replica on purpose, until somebody asks for it.

A request that comes then is held, not refused (resume.py), and while any is held, demand is made for a replica. How is
the caller's to know: `cluster/ingress.py` asks Ray Serve for a replica's address, and Serve, which counts who waits for
that, starts one. It may take minutes, and it may fail: then requests end at their deadlines, with 503.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from .waiters import Waiters

logger = logging.getLogger("shoal.router")

Wake = Callable[[], Awaitable[object]]
"""Makes demand for a replica while it is awaited; returns when there is one. Whatever it raises, it is asked again."""

AGAIN_S = 1.0  # between two attempts, and until a replica that is there has been found
RETRY_S = 30.0  # what a client is told that no replica came for


class Sleep:
    """Whether a part may sleep, and how it is woken. One a model; all belongs to one event loop."""

    def __init__(self, wake: Wake | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """wake: None where the part always has a replica, or should."""
        self.held = Waiters(clock=clock)  # those that wait for a replica
        self._wake = wake
        self._waking: asyncio.Task[None] | None = None

    def allow(self, wake: Wake | None) -> None:
        """It may sleep from now on, or may not (None): the deployment has changed in place."""
        self._wake = wake

    @property
    def is_allowed(self) -> bool:
        """Whether who finds no replica waits for one to be started."""
        return self._wake is not None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Meanwhile somebody waits for a replica."""
        if self._waking is None:
            self._waking = asyncio.get_running_loop().create_task(self._make_demand())
        try:
            with self.held.one_more():
                yield
        finally:
            if not self.held:
                self._waking.cancel()
                self._waking = None

    async def _make_demand(self) -> None:
        if self._wake is not None:
            logger.info("somebody waits for a replica: one is asked for")
        while self._wake is not None:
            try:
                await self._wake()
            except Exception as error:  # noqa: BLE001 - it is asked again, whatever it was
                logger.debug("no replica was woken: %s", type(error).__name__)
            await asyncio.sleep(AGAIN_S)
