"""How a replica's slow start is seen by the operator: what it prints while it builds goes, line by line, to a file.

Replicas live in other processes whose output Ray keeps in logs. The file lies in the service's private folder; a
replica on another node, where that folder is not, writes to its own log as ever.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from ..runtime.errors import StartupError
from .progress import Progress

FOLLOW_S = 0.1

Kind = Literal["phase", "note", "error"]
"""phase: replaces the one before. note: stays. error: the replica will not start; the text is for the operator."""


class _Lines(io.TextIOBase):
    """A text stream that turns each line into an entry of the board."""

    def __init__(self, file: Path, kind: Kind) -> None:
        self._file = file
        self._kind: Kind = kind
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in lines:
            if line.strip():
                _post(self._file, self._kind, line.rstrip())
        return len(text)


@contextmanager
def posting(file: Path | None) -> Iterator[None]:
    """Within: standard error becomes phases, standard output and Shoal's log become notes, what is raised an error."""
    if file is None or not file.parent.is_dir():
        yield
        return
    notes = _Lines(file, "note")
    handler = logging.StreamHandler(notes)
    logger = logging.getLogger("shoal")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with redirect_stderr(_Lines(file, "phase")), redirect_stdout(notes):
            yield
    except Exception as error:
        refused = isinstance(error, StartupError)
        _post(file, "error", str(error) if refused else f"the replica failed to start: {type(error).__name__}: {error}")
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Board:
    """The reading end. Within `follow`, phases and notes go to the operator, and `refusal` is what a replica said."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0
        self.refusal = ""

    @contextmanager
    def follow(self, progress: Progress) -> Iterator[None]:
        """Within: a thread shows what is posted."""
        over = threading.Event()
        follower = threading.Thread(target=self._follow, args=(progress, over), name="board", daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
            self._show(progress)

    def _follow(self, progress: Progress, over: threading.Event) -> None:
        while not over.wait(FOLLOW_S):
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        for kind, text in self.news():
            if kind == "error":
                self.refusal = text
            elif kind == "note":
                progress.note(text)
            else:
                progress.phase(text)

    def news(self) -> list[tuple[Kind, str]]:
        """The entries since the last call."""
        try:
            with self.file.open(encoding="utf-8") as stream:
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = text.rpartition("\n")
        self._offset += len((whole + newline).encode())
        entries: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        return [(entry["kind"], entry["text"]) for entry in entries]


def _post(file: Path, kind: Kind, text: str) -> None:
    """Append one entry; a single write to a file opened for appending is never torn."""
    line = json.dumps({"kind": kind, "text": text}) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
