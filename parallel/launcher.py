"""Where rank processes come from: started, looked after and ended, whatever they do inside."""

import contextlib
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from .control import RankStart

log = logging.getLogger(__name__)

TAIL_BYTES = 16384  # of a rank's output are kept
KILL_TIMEOUT_S = 5.0
POLL_S = 0.005


class Launcher(Protocol):
    """Starts one process a rank, always in the same places. `kill` then `launch` starts them anew.

    node: the id of the driver's node. address: the driver's own, on which the ranks can reach it.
    """

    node: str
    address: str

    def launch(self, starts: Sequence[RankStart]) -> None:
        """Start a process for each, that calls `rank.run_rank` with it (its node filled in). Does not wait for them.

        Raises OSError, or what says in one line why it cannot be done.
        """
        ...

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        """How a rank's process ended, as `subprocess` has it: -9 for SIGKILL. Waits until it ends, at most so long.

        None: it runs, or nobody knows. Any thread may ask.
        """
        ...

    def last_words(self, rank: int) -> str:
        """The last line that the rank's process wrote, or nothing."""
        ...

    def kill(self) -> None:
        """End all of them by force and wait until they are gone. Idempotent; any thread may call."""
        ...


class ProcessLauncher:
    """A `Launcher` of processes on this machine. They never import the caller's `__main__`."""

    node = "local"
    address = "127.0.0.1"

    def __init__(self, *, environment: Mapping[str, str] | None = None) -> None:
        """environment: variables for the ranks, beside the caller's own."""
        self._environment = {**os.environ, **(environment or {}), "PYTHONSAFEPATH": "1"}
        self._lock = threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._tails: dict[int, bytearray] = {}
        self._keeper: threading.Thread | None = None

    def launch(self, starts: Sequence[RankStart]) -> None:
        assert not self._processes, "kill the ranks before starting them anew"
        self._tails = {start.rank: bytearray() for start in starts}
        started: queue.Queue[OSError | None] = queue.Queue()
        # A rank's parent is a thread: it gets its death signal (rank_process.py) when the *thread* that started it
        # ends. So the thread that starts them stays until they are gone, and meanwhile reads what they write.
        self._keeper = threading.Thread(target=self._keep, args=(starts, started), name="shoal-ranks", daemon=True)
        self._keeper.start()
        problem = started.get()
        if problem is not None:
            self.kill()
            raise problem

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                process = self._processes.get(rank)
                status = None if process is None else _peek(process.pid)
            if status is not None or process is None or time.monotonic() >= deadline:
                return status
            time.sleep(POLL_S)

    def last_words(self, rank: int) -> str:
        lines = self._tails.get(rank, b"").decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        with self._lock:
            processes, self._processes = self._processes, {}
            for process in processes.values():
                # Not reaped yet (`_peek`), so its number still stands for its session: what it started ends too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in processes.values():
                try:
                    process.wait(KILL_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    log.warning("process %d of a rank does not end on SIGKILL", process.pid)
        if self._keeper is not None:
            self._keeper.join(KILL_TIMEOUT_S)

    def _keep(self, starts: Sequence[RankStart], started: "queue.Queue[OSError | None]") -> None:
        pids = []
        with selectors.DefaultSelector() as selector:
            try:
                for start in starts:
                    process = self._start(start)
                    pids.append(process.pid)
                    assert process.stderr is not None
                    selector.register(process.stderr, selectors.EVENT_READ, (start.rank, process.stderr))
            except OSError as problem:
                started.put(problem)
            else:
                started.put(None)
            while selector.get_map():
                for key, _ in selector.select():
                    rank, output = key.data
                    if not self._heard(rank, os.read(key.fd, 65536)):
                        selector.unregister(output)
                        output.close()
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def _start(self, start: RankStart) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.rank_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # the operator's terminal is not theirs, nor is a caller's standard output
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        with self._lock:
            self._processes[start.rank] = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it ended already: its status will tell
            process.stdin.write(msgspec.msgpack.encode(start))
        return process

    def _heard(self, rank: int, data: bytes) -> bytes:
        for line in data.decode(errors="replace").splitlines():
            log.debug("rank %d: %s", rank, line)
        tail = self._tails[rank]
        tail += data
        del tail[:-TAIL_BYTES]
        return data


def _peek(pid: int) -> int | None:
    """The status of a child that has ended, without reaping it."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody else has reaped it
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
