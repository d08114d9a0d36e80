"""What the operator sees while something slow goes on: a spinner with seconds on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PERIOD_S = 0.1


class Progress:
    """A running clock and a current phase. Phases and notes may come from any thread.

    On a terminal the phase is one line that is redrawn; elsewhere each new phase is one line with the seconds so far.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._live = self._out.isatty()
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._phase = ""
        self._stop = threading.Event()
        self._painter: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._live:
            self._painter = threading.Thread(target=self._paint, name="progress", daemon=True)
            self._painter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def phase(self, text: str) -> None:
        """What goes on now."""
        with self._lock:
            if text == self._phase:
                return
            self._phase = text
            if not self._live and not self._stop.is_set():
                self._line(f"[{self.elapsed_s:5.1f} s] {text}")

    def note(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._line(text)

    def close(self) -> None:
        """Stop painting and leave the cursor on an empty line. Safe to call twice."""
        self._stop.set()
        if self._painter is not None and self._painter is not threading.current_thread():
            self._painter.join()
            self._painter = None

    def _line(self, text: str) -> None:
        self._out.write(f"\r\033[K{text}\n" if self._live else f"{text}\n")
        self._out.flush()

    def _paint(self) -> None:
        frame = 0
        while not self._stop.wait(PERIOD_S):
            with self._lock:
                text = f"{FRAMES[frame % len(FRAMES)]} {self._phase}  {self.elapsed_s:.0f} s"
                self._out.write(f"\r\033[K{text[:160]}")
                self._out.flush()
            frame += 1
        self._out.write("\r\033[K")
        self._out.flush()
