"""A launcher's side of one nursery: has ranks forked, knows how they ended and what they said, and ends them."""

import contextlib
import logging
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from .control import RankStart
from .nursery import MAX_MESSAGE_BYTES, Exited, Fork, Forked, Kill, Killed, Refused, Report, Request, kill_group

log = logging.getLogger(__name__)

TAIL_BYTES = 16384  # of a process's output are kept
KILL_TIMEOUT_S = 5.0

# A pool of threads in the nursery would forbid it to fork. Of numpy's library alone: torch has its threads from
# elsewhere, and starts them when a rank computes.
SINGLE_THREAD = "OPENBLAS_NUM_THREADS"


class Tail:
    """The end of what a process writes into a pipe."""

    def __init__(self, name: str, descriptor: int) -> None:
        """name: of the process, in the log. descriptor: the pipe's end to read from, closed in the end."""
        os.set_blocking(descriptor, False)
        self._name = name
        self._descriptor = descriptor
        self._data = bytearray()
        self.is_open = True

    def fileno(self) -> int:
        return self._descriptor

    def take(self) -> bool:
        """Whether there was anything. Where a selector has said so and there is not, there never will be."""
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return False
        for line in data.decode(errors="replace").splitlines():
            log.debug("%s: %s", self._name, line)
        self.add(data)
        return bool(data)

    def take_all(self) -> None:
        """What there is by now, and no more."""
        while self.is_open and self.take():
            pass

    def add(self, data: bytes) -> None:
        """As if it had been written."""
        self._data += data
        del self._data[:-TAIL_BYTES]

    def close(self) -> None:
        self.is_open = False
        os.close(self._descriptor)

    def last_line(self) -> str:
        lines = self._data.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


@dataclass(slots=True)
class _Rank:
    tail: Tail
    pid: int | None = None
    status: int | None = None
    is_gone: bool = False  # reaped, and all that it wrote is read


class Keeper:
    """One nursery, from its start to its end. Any thread may call any method.

    A thread of its own starts the nursery and stays: a process gets its death signal when the *thread* that started
    it ends. Meanwhile it hears the nursery's reports and reads what the ranks write.
    """

    def __init__(self, *, environment: Mapping[str, str], preload: Sequence[str]) -> None:
        """environment: the whole of it. preload: modules to import. Raises OSError."""
        self._environment = environment
        self._preload = preload
        self._changed = threading.Condition()  # guards what follows, and the line against being closed in mid-use
        self._ranks: dict[int, _Rank] = {}
        self._is_over = False
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        started: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(theirs, started), name="shoal-nursery", daemon=True)
        self._thread.start()
        process = started.get()
        if isinstance(process, OSError):
            raise process
        self._process = process

    @property
    def is_over(self) -> bool:
        """The nursery has ended, and its ranks with it."""
        return self._is_over

    def fork(self, start: RankStart, environment: Mapping[str, str | None]) -> None:
        """Have a rank started; not waited for. environment: what it has otherwise than the others. Raises OSError."""
        own = {SINGLE_THREAD: self._environment.get(SINGLE_THREAD), **environment}
        ours, theirs = os.pipe()
        try:
            with self._changed:
                if self._is_over:
                    os.close(ours)
                    raise ConnectionResetError("what ranks are forked from has ended")
                self._ranks[start.rank] = _Rank(Tail(f"rank {start.rank}", ours))
                self._say(Fork(start=start, environment=own), theirs)
        finally:
            os.close(theirs)

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        """See `Launcher`."""
        with self._changed:
            known = self._ranks.get(rank)
            if known is None:
                return None
            self._changed.wait_for(lambda: known.status is not None, timeout_s)
            return known.status

    def last_words(self, rank: int) -> str:
        """See `Launcher`."""
        with self._changed:
            known = self._ranks.get(rank)
        return known.tail.last_line() if known else ""

    def kill(self) -> None:
        """End all ranks and wait until they are gone. The nursery stays, unless it does not do as it is told."""
        with self._changed:
            ranks = [rank for rank in self._ranks.values() if not rank.is_gone]
            if not ranks:
                return
            self._say(Kill())
            are_gone = self._changed.wait_for(lambda: all(rank.is_gone for rank in ranks), KILL_TIMEOUT_S)
        if not are_gone:
            log.warning("ranks are still there after %g s: ending what they were forked from", KILL_TIMEOUT_S)
            self._end()

    def close(self) -> None:
        """End all ranks and the nursery, and wait until they are gone. Idempotent."""
        self.kill()
        self._end()

    def let_go(self) -> None:
        """Have the nursery end its ranks and itself; not waited for."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        self._process.kill()
        self._thread.join(KILL_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("process %d does not end on SIGKILL", self._process.pid)

    def _say(self, request: Request, *descriptors: int) -> None:
        if self._is_over:
            return
        with contextlib.suppress(ConnectionError):  # it has just ended: the thread will say what became of the ranks
            socket.send_fds(self._line, [msgspec.msgpack.encode(request)], descriptors)

    def _run(self, theirs: socket.socket, started: "queue.Queue[subprocess.Popen[bytes] | OSError]") -> None:
        with self._line, selectors.DefaultSelector() as selector:
            try:
                process, own = self._start(theirs)
            except OSError as problem:
                started.put(problem)
                return
            finally:
                theirs.close()
            started.put(process)
            selector.register(self._line, selectors.EVENT_READ)
            selector.register(own, selectors.EVENT_READ, own)
            self._listen(selector)
            selector.unregister(self._line)
            self._bury(process.wait(), own)
            self._read_to_the_end(selector)

    def _start(self, theirs: socket.socket) -> "tuple[subprocess.Popen[bytes], Tail]":
        ours, output = os.pipe()
        own = Tail("nursery", ours)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.nursery", *self._preload],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,  # the operator's terminal is not theirs, nor a caller's standard output
                stderr=output,
                env={**self._environment, SINGLE_THREAD: "1"},
                start_new_session=True,
            )
        except OSError:
            own.close()
            raise
        finally:
            os.close(output)
        return process, own

    def _listen(self, selector: selectors.BaseSelector) -> None:
        """Until the nursery ends."""
        while True:
            ready = [key.data for key, _ in selector.select()]
            for tail in filter(None, ready):
                _read(selector, tail)
            if None in ready and not self._hear(selector):
                return

    def _hear(self, selector: selectors.BaseSelector) -> bool:
        """One report; False at the end."""
        try:
            data = self._line.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            return False
        if not data:
            return False
        report: Report = _decode(data)
        with self._changed:
            match report:
                case Forked(rank=rank, pid=pid):
                    self._ranks[rank].pid = pid
                    selector.register(self._ranks[rank].tail, selectors.EVENT_READ, self._ranks[rank].tail)
                case Refused(rank=rank, reason=reason):
                    self._ranks[rank].status = 1
                    self._ranks[rank].tail.add(reason.encode())
                case Exited(rank=rank, status=status):
                    self._ranks[rank].status = status
                case Killed():
                    # Those of unknown status were asked for after the kill, and are yet to come.
                    for known in self._ranks.values():
                        if known.status is not None:
                            _forget(selector, known.tail)
                            known.is_gone = True
            self._changed.notify_all()
        return True

    def _bury(self, status: int, own: Tail) -> None:
        """The nursery has ended, so there will be no ranks; those that it had are killed by that, and here."""
        own.take_all()
        with self._changed:
            self._is_over = True
            for rank in self._ranks.values():
                if rank.pid is None:
                    rank.tail.add(own.last_line().encode())
                elif not rank.is_gone:
                    kill_group(rank.pid)
                if rank.status is None:
                    rank.status = status if rank.pid is None else -signal.SIGKILL
            self._changed.notify_all()

    def _read_to_the_end(self, selector: selectors.BaseSelector) -> None:
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while selector.get_map() and (rest := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(rest):
                _read(selector, key.data)
        with self._changed:
            for rank in self._ranks.values():
                _forget(selector, rank.tail)
                rank.is_gone = True
            self._changed.notify_all()


_decode = msgspec.msgpack.Decoder(Report).decode


def _read(selector: selectors.BaseSelector, tail: Tail) -> None:
    if not tail.take():
        selector.unregister(tail)
        tail.close()


def _forget(selector: selectors.BaseSelector, tail: Tail) -> None:
    """Once nobody writes any more."""
    if tail.is_open:
        tail.take_all()
        if tail in selector.get_map():
            selector.unregister(tail)
        tail.close()
