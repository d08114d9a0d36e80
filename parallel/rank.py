"""One rank, from its first word to its last: reports to its driver, builds its worker, executes plans (station 12).

What it imports before it says Hello is kept small, so that mistakes show at once; torch comes with the wires.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from .control import MAX_TEXT, ControlLine, Failed, Hello, RankStart, Ready, Wire, Wired, versions
from .grid import Grid, Place
from .group import Begun
from .peer import PeerTimeout
from .station import Station

if TYPE_CHECKING:
    from .comm import Comm
    from .ring import Ring
    from .wiring import RankWires

LOOK_S = 50e-6  # between two looks at a device that computes, while no plan comes


class SlotsFailed(Exception):
    """A step failed, and these rows are to blame: raised by a worker's step, from what went wrong."""

    def __init__(self, message: str, *, slots: tuple[int, ...]) -> None:
        super().__init__(message)
        self.slots = slots


class RankWorker(Protocol):
    """What a rank is for."""

    details: dict[str, int | str]
    """For `RankInfo`, once it is built."""

    def begin(self, plan: bytes) -> Begun[bytes | None]:
        """Start a step, in the order of the plans. The output rank has a result, the others' is not looked at.

        What is raised here, or by the result, ends the group. `SlotsFailed` names the rows.
        """
        ...

    def close(self) -> None:
        """Let go. Not called where a rank is killed."""
        ...


class WorkerFactory(Protocol):
    """Builds a rank's worker: an importable top-level function."""

    def __call__(
        self,
        argument: bytes,
        place: Place,
        *,
        comm: Comm,
        ring: Ring,
        station: Station,
        progress: Callable[[str], None],
    ) -> RankWorker:
        """argument: the same for all ranks. station: to be told where the rank is. progress: lines for the operator.

        Whatever it does at its first step alone and takes seconds (compiling, say) belongs in here: no watcher counts
        the time. What it raises is the operator's to read, by its name and message.
        """
        ...


def run_rank(start: RankStart) -> None:
    """Be a rank until the group is closed. Ends this very process if the driver ends.

    Raises what ended it, once the driver has been told: a process or an actor ends by that.
    """
    line = ControlLine(start)
    station = Station()
    line.send(
        Hello(
            rank=start.rank,
            node=start.node,
            address=line.address,
            pid=os.getpid(),
            device=_device(start.device),
            versions=versions(),
        )
    )
    try:
        wire = line.receive()
        line.keep(station)
        _serve(line, wire, Grid(wire.tp, wire.pp).place(start.rank), station)
    except BaseException as error:  # SystemExit too, and panics of extensions
        line.send(_failed(error, station))
        raise
    line.close()


def _serve(line: ControlLine, wire: Wire, place: Place, station: Station) -> None:
    factory = load_factory(wire.factory)
    from .wiring import Wiring, connect

    wires = connect(msgspec.msgpack.decode(wire.wiring, type=Wiring), place, station)
    line.send(Wired())
    worker = factory(wire.argument, place, comm=wires.comm, ring=wires.ring, station=station, progress=line.progress)
    line.send(Ready(worker.details))
    _obey(worker, wires, answers=place.answers)
    worker.close()
    wires.close()


def _obey(worker: RankWorker, wires: RankWires, *, answers: bool) -> None:
    """Plans, to the last one: an answer goes out as soon as it is there; until then whatever comes is begun behind it,
    so that a device has its next step before it is done with this one."""
    begun: deque[Begun[bytes | None]] = deque()
    while True:
        if begun and begun[0].is_done():
            result = begun.popleft().result()
            if answers:
                assert result is not None, "the output rank has a result for every plan"
                wires.send(result)
        elif not begun or wires.poll(LOOK_S):
            plan = wires.receive()
            if not plan:  # the end
                return
            begun.append(worker.begin(plan))


def load_factory(name: str) -> WorkerFactory:
    """The function that "package.module:function" names. Raises ImportError or AttributeError."""
    module, _, function = name.partition(":")
    factory: WorkerFactory = getattr(importlib.import_module(module), function)
    return factory


def _failed(error: BaseException, station: Station) -> Failed:
    return Failed(
        kind=type(error).__name__,
        message=str(error)[:MAX_TEXT],
        station=station.read()[0],
        slots=error.slots if isinstance(error, SlotsFailed) else (),
        is_victim=isinstance(error, PeerTimeout),
        peer=error.peer if isinstance(error, PeerTimeout) else None,
    )


def _device(wanted: str) -> str:
    """What is here of the wanted device: "cuda" where the driver library counts one. Without torch, so at once."""
    if wanted == "cpu":
        return "cpu"
    count = ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cpu"
    is_there = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return "cuda" if is_there else "cpu"
