"""The main module of a nursery: the process that has imported what ranks need, and forks each of them.

A rank of its own would spend seconds of a core on its imports at every start; a fork of what is imported takes
milliseconds, and shares the memory. Its launcher's `keeper.Keeper` speaks with it over the socket that is its stdin:

    launcher                                    nursery
    Fork, with a descriptor for its stderr  ->
                                            <-  Forked, or Refused
                                            <-  Exited, when it has ended; its pid stays taken
    Kill                                    ->
                                            <-  Exited, of each that still ran; Killed: all are reaped

The end of the line is the end of all. A nursery has one thread, since a fork has only the thread that forked and
would wait forever for locks that others held; and it never touches CUDA, which survives no fork.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec

from .control import RankStart
from .rank import run_rank

PR_SET_PDEATHSIG = 1
MAX_MESSAGE_BYTES = 65536


class Fork(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Start a rank. environment: variables that it has otherwise than the nursery; None: not at all."""

    start: RankStart
    environment: dict[str, str | None]


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End all ranks, and what they started."""


class Forked(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The rank has a process."""

    rank: int
    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The rank has no process, and this is why."""

    rank: int
    reason: str


class Exited(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The rank's process has ended. status: as `subprocess` has it."""

    rank: int
    status: int


class Killed(msgspec.Struct, frozen=True, tag=True):
    """No rank is left."""


Request = Fork | Kill
Report = Forked | Refused | Exited | Killed


class Nursery:
    """Forks ranks and tells how they end, in one thread."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._decode = msgspec.msgpack.Decoder(Request).decode
        self._pids: dict[int, int] = {}  # by rank: not reaped, so nobody else can get these numbers
        self._running: dict[int, int] = {}  # ranks, by a descriptor that becomes readable when the process ends

    def serve(self) -> RankStart | None:
        """Until the launcher lets go. Returns in every rank's process, too: what this process is now to be."""
        while True:
            line = self._line.fileno()
            ready, _, _ = select.select([line, *self._running], [], [])
            for descriptor in self._running.keys() & set(ready):
                self._bring_news(descriptor)
            if line not in ready:
                continue
            data, descriptors = self._receive()
            if not data:
                self._kill()
                return None
            match self._decode(data):
                case Fork() as order:
                    if self._fork(order, descriptors[0]):
                        return order.start
                case Kill():
                    self._kill()
                    self._say(Killed())

    def _fork(self, order: Fork, output: int) -> bool:
        """True in the rank, once it is a process like any other."""
        nursery, rank = os.getpid(), order.start.rank
        try:
            pid = os.fork()
        except OSError as problem:
            os.close(output)
            self._say(Refused(rank=rank, reason=str(problem)))
            return False
        if pid == 0:
            for descriptor in self._running:
                os.close(descriptor)
            self._line.close()
            _leave_home(nursery, output, order.environment)
            return True
        os.close(output)
        self._pids[rank] = pid
        self._running[os.pidfd_open(pid)] = rank
        self._say(Forked(rank=rank, pid=pid))
        return False

    def _bring_news(self, descriptor: int) -> None:
        """Wait for the end of a rank, and report it."""
        rank = self._running.pop(descriptor)
        os.close(descriptor)
        ended = os.waitid(os.P_PID, self._pids[rank], os.WEXITED | os.WNOWAIT)
        assert ended is not None, "waitid waits"
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self._say(Exited(rank=rank, status=status))

    def _kill(self) -> None:
        for pid in self._pids.values():
            kill_group(pid)
        for descriptor in list(self._running):
            self._bring_news(descriptor)
        for pid in self._pids.values():
            os.waitpid(pid, 0)
        self._pids.clear()

    def _receive(self) -> tuple[bytes, list[int]]:
        """Nothing, where the launcher has ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._line, MAX_MESSAGE_BYTES, 1)
        except ConnectionError:
            return b"", []
        return data, descriptors

    def _say(self, report: Report) -> None:
        with contextlib.suppress(ConnectionError):  # the next `_receive` meets the end, too
            self._line.sendall(msgspec.msgpack.encode(report))


def kill_group(pid: int) -> None:
    """End a rank and what it started. It may not lead its group yet, or have gone."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _leave_home(nursery: int, output: int, environment: dict[str, str | None]) -> None:
    """What sets a rank's process apart from the nursery that it was forked from."""
    os.setsid()
    _die_with_parent()
    if os.getppid() != nursery:  # it ended before it could be died with
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, source in enumerate((nothing, nothing, output)):
        os.dup2(source, descriptor)
    os.close(nothing)
    os.close(output)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _die_with_parent() -> None:
    """Where the line's end does not help: a rank may be stopped, or deep in a wait that nobody will end."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _preload(modules: Sequence[str]) -> None:
    for module in modules:
        # What fails here fails again in the rank that needs it, which reports it.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.stderr.write("what is preloaded starts threads: every rank imports for itself\n")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", f"{__package__}.nursery"])
    gc.freeze()  # the collector writes into what it looks at, and what is written to is shared no more


def main() -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    faulthandler.enable()
    _preload(sys.argv[1:])
    with socket.socket(fileno=os.dup(0)) as line:  # 0 itself becomes each rank's stdin
        start = Nursery(line).serve()
    if start is not None:
        run_rank(start)


if __name__ == "__main__":
    main()
