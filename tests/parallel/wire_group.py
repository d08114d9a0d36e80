"""A driver with its ranks as processes, for the tests of the wires."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec

from shoal.parallel.grid import Grid
from shoal.parallel.wiring import DriverWires, WireSizes, lay_wires

LOOPBACK = "127.0.0.1"
SCRIPT = Path(__file__).with_name("wire_rank.py")


@functools.cache
def host() -> socket.socket:
    """Orders to the process that all ranks are forked from. It ends when this process does."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    subprocess.Popen([sys.executable, SCRIPT, str(its.fileno())], pass_fds=[its.fileno()], env=environment)
    its.close()
    return ours


class Ranks:
    """Processes that run one of `wire_rank.py`'s programs."""

    def __init__(self, wires: DriverWires, program: str) -> None:
        self._wires = wires
        self._pipes = [self._start(program, place.rank) for place in wires.wiring.grid]
        self.pids = [int(pipe.readline()) for pipe in self._pipes]

    def _start(self, program: str, rank: int) -> TextIO:
        out, into = os.pipe()
        order = {"program": program, "rank": rank, "wiring": self._wires.wiring}
        socket.send_fds(host(), [msgspec.msgpack.encode(order)], [into])
        os.close(into)
        return os.fdopen(out)

    def await_connected(self) -> None:
        assert [pipe.readline() for pipe in self._pipes] == ["connected\n"] * len(self._pipes)
        self._wires.attached()

    def report(self, rank: int) -> Any:
        """What the rank's program returned, once it has."""
        return json.loads(self._pipes[rank].readline())

    def reports(self) -> list[Any]:
        return [self.report(rank) for rank in range(len(self._pipes))]

    def kill(self, rank: int) -> None:
        """Returns when it is gone, by itself or by this."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGKILL)
        self._pipes[rank].read()  # to its end, which is the process's

    def close(self) -> None:
        for rank, pipe in enumerate(self._pipes):
            self.kill(rank)
            pipe.close()


@contextmanager
def wires_of(
    grid: Grid, nodes: Sequence[str] = (), *, sizes: WireSizes | None = None, deadline_s: float = 15.0
) -> Iterator[DriverWires]:
    """The driver's end. Several nodes are pretended: all of them are on loopback."""
    wires = lay_wires(
        grid,
        nodes or ["here"] * grid.size,
        driver_node="here",
        address=LOOPBACK,
        device="cpu",
        sizes=sizes or WireSizes(),
        deadline_s=deadline_s,
        addresses=[LOOPBACK] * grid.size,
    )
    try:
        yield wires
    finally:
        wires.close()


@contextmanager
def running(wires: DriverWires, program: str) -> Iterator[Ranks]:
    ranks = Ranks(wires, program)
    try:
        ranks.await_connected()
        yield ranks
    finally:
        ranks.close()
