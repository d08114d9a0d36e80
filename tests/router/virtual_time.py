"""An asyncio event loop on a virtual clock: when nothing is ready, time jumps to the next timer.

Nobody sleeps, so minutes of a service pass in the time its work takes, and the same in every run. Sockets on loopback
work: what is sent is there at once. Work for threads is done where it is asked for.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Stuck(Exception):
    """Everything waits, and nothing is left that could happen."""


class _Selector(selectors.DefaultSelector):
    """Never waits: lets `now` leap instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise Stuck("everything waits, and nothing is left that could happen")
            self.now += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
            future.set_exception(error)
        return future


def run(scenario: Callable[[], Coroutine[Any, Any, Result]], *, timeout_s: float = 3600.0) -> Result:
    """The scenario's result. Raises TimeoutError after so many virtual seconds, `Stuck` where nothing goes on."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(asyncio.wait_for(scenario(), timeout_s))
