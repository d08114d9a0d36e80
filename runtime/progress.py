"""Progress of something slow at start-up: a bar on a terminal, a few plain lines anywhere else."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

BAR_WIDTH = 30
LINES = 4  # plain lines a run, besides the first


class Progress:
    """`with Progress("Loading weights", total=32, unit="layers") as progress: progress.advance()`."""

    def __init__(
        self,
        title: str,
        *,
        total: int,
        unit: str = "",
        show: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = max(total, 1)
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._show = show
        self._on_terminal = self._stream.isatty()
        self._done = 0
        self._began = clock()

    def __enter__(self) -> "Progress":
        self._began = self._clock()
        if not self._on_terminal:
            self._write(f"{self._title}: {self._total} {self._unit}".rstrip() + "\n")
        return self

    def advance(self, by: int = 1) -> None:
        """So much more is done."""
        before, self._done = self._done, self._done + by
        if self._on_terminal:
            self._write("\r" + self._bar())
        elif self._done * LINES // self._total > before * LINES // self._total:
            self._write(self._line() + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_terminal and self._done:
            self._write("\n")

    def _bar(self) -> str:
        filled = BAR_WIDTH * min(self._done, self._total) // self._total
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        return f"{self._title} {bar} {self._counts()}"

    def _line(self) -> str:
        share = 100 * self._done // self._total
        return f"{self._title}: {share} %, {self._counts()}"

    def _counts(self) -> str:
        unit = f" {self._unit}" if self._unit else ""
        return f"{self._done}/{self._total}{unit}, {self._clock() - self._began:.1f} s"

    def _write(self, text: str) -> None:
        if not self._show:
            return
        self._stream.write(text)
        self._stream.flush()
