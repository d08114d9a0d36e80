"""The operating system's side of a clean end: signals become an exception, orphans come to us, none is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """SIGINT or SIGTERM came. Not an Exception: nothing on the way may take it for a failure of its own."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `Stop` in the main thread. `ray.init` sets its own: call this after it."""

    def handle(signum: int, _: FrameType | None) -> None:
        raise Stop(signum)

    for signum in SIGNALS:
        signal.signal(signum, handle)


def ignore_signals() -> None:
    """While we shut down; a second signal changes nothing, the steps have deadlines of their own."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within: grandchildren whose parent dies become our children (Linux). On exit: all descendants are ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    adopts = hasattr(libc, "prctl") and libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    before = set(descendants(os.getpid()))
    try:
        yield
    finally:
        end_all(before)
        if adopts:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def end_all(spared: set[int], *, grace_s: float = 1.0) -> None:
    """End every descendant that is not spared: SIGTERM, then SIGKILL after the grace."""
    deadline = time.monotonic() + grace_s
    signum = signal.SIGTERM
    told: set[int] = set()
    while left := [pid for pid in descendants(os.getpid()) if pid not in spared]:
        if time.monotonic() > deadline and signum is signal.SIGTERM:
            signum, told = signal.SIGKILL, set()
        for pid in left:
            if pid not in told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signum)
                told.add(pid)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline + grace_s:
            return
        time.sleep(0.02)


def descendants(root: int) -> list[int]:
    """Every process below `root`, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []
    for pid in pids:
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
