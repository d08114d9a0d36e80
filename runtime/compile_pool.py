"""Grammars are compiled for the first time in a process that can be killed (under station 4).

A grammar is a program of the client's, run by a compiler that was not written for enemies. What takes too long, eats
the memory or crashes there costs this request and no other: the process is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from .errors import EngineError, QueueFull

COMPILE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
MAX_WAITING = 64


class CompilePool:
    """One worker process, started at the first grammar. `recipe`: `grammar.Vocabulary`'s, a line of JSON."""

    def __init__(self, recipe: str, *, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._recipe = recipe
        self._timeout_s = timeout_s
        self._worker: _Worker | None = None
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-compile")

    def submit(self, source: str) -> Future[str | None]:
        """Compile a grammar in the worker: None if it can be used, else why not, for the client.

        The future raises EngineError where no worker can be started.

        Raises:
            QueueFull: too many grammars wait already.
        """
        if not self._waiting.acquire(blocking=False):
            raise QueueFull(f"{MAX_WAITING} grammars wait to be compiled", retry_after=self._timeout_s)
        future = self._thread.submit(self._compile, source)
        future.add_done_callback(lambda _: self._waiting.release())
        return future

    def close(self) -> None:
        """Kill the worker and end the thread; what waits is cancelled."""
        if self._worker is not None:
            self._worker.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._worker is not None:
            self._worker.kill()

    def _compile(self, source: str) -> str | None:
        if self._worker is None:
            self._worker = _Worker(self._recipe)
        try:
            return self._worker.ask(source, self._timeout_s)
        except TimeoutError:
            problem = f"the output's grammar takes more than {self._timeout_s:g} s to compile"
        except (OSError, EOFError):
            problem = "the output's grammar takes too much memory to compile, or breaks the compiler"
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
        return problem


class _Worker:
    """A process of `compile_worker.py`, spoken to in lines of JSON. Ends by itself when its stdin does."""

    def __init__(self, recipe: str) -> None:
        module = f"{__package__}.compile_worker"
        # -P: the working directory stays off the path, where it could hide installed packages.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True,
        )  # fmt: skip
        self._unread = b""
        try:
            self._send(recipe)
            ready = json.loads(self._receive(START_TIMEOUT_S))
        except (TimeoutError, OSError, EOFError) as error:
            self.kill()
            raise EngineError("the process that compiles grammars did not start") from error
        self._unusable: str | None = ready["problem"]

    def ask(self, source: str, timeout_s: float) -> str | None:
        """Raises TimeoutError, or OSError or EOFError where the process died."""
        if self._unusable is not None:
            return self._unusable
        self._send(json.dumps(source))
        problem: str | None = json.loads(self._receive(timeout_s))["problem"]
        return problem

    def interrupt(self) -> None:
        """From another thread: what is being asked ends with EOFError."""
        self._process.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a line that was not sent yet
                pipe.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(fd, 65536)
                if not data:
                    raise EOFError
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line
