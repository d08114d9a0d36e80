"""Brings the ranks of a group up, step by step, in the caller's thread; or says in one message why they do not come.

Launch, Hello, checks, wires, Ready. Nothing is left behind where it fails.
"""

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .control import Failed, FromRank, Hello, Progress, RankStart, Ready, Wire, Wired, versions
from .control_server import ControlServer
from .grid import Grid
from .group import GroupStartError, RankInfo
from .launcher import Launcher
from .peer import PeerTimeout
from .watch import GroupLimits, describe_exit

if TYPE_CHECKING:
    from .wiring import DriverWires, WireSizes

POLL_S = 0.1
LAST_WORDS_S = 0.5  # from the end of a line to the exit status of its process

Kind = TypeVar("Kind", bound=FromRank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What the ranks of a group run.

    factory: a `rank.WorkerFactory` as "package.module:function", which each rank calls with `argument`.
    device: "cpu" or "cuda", of all ranks. on_progress: is given lines for the operator while they start.
    """

    factory: str
    argument: bytes
    sizes: "WireSizes"
    device: str = "cpu"
    on_progress: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True, slots=True)
class Started:
    """Ranks that wait for plans."""

    server: ControlServer
    wires: "DriverWires"
    infos: list[RankInfo]


class Startup:
    """One attempt to bring the ranks up."""

    def __init__(
        self, grid: Grid, launcher: Launcher, program: Program, limits: GroupLimits, *, cancelled: threading.Event
    ) -> None:
        self._grid = grid
        self._launcher = launcher
        self._program = program
        self._limits = limits
        self._cancelled = cancelled
        self._deadline = time.monotonic() + limits.start_timeout_s
        self._secret = secrets.token_bytes(32)
        try:
            self._server = ControlServer(launcher.address, secret=self._secret, size=grid.size)
        except OSError as problem:
            raise GroupStartError(f"the driver cannot listen on {launcher.address}: {problem}") from problem
        self._wires: DriverWires | None = None
        # By kind, then rank: a quick rank is ready before a slow one is wired.
        self._came: dict[type, dict[int, Any]] = defaultdict(dict)

    def run(self) -> Started:
        """Raises GroupStartError, after everything that was started has been ended."""
        try:
            return self._run()
        except BaseException as problem:  # the operator's Ctrl-C too
            self._launcher.kill()
            self._server.close()
            if self._wires is not None:
                self._wires.close()
            if isinstance(problem, OSError | PeerTimeout):  # no process, port or shared memory to be had; no peer
                raise GroupStartError(str(problem), kind=type(problem).__name__) from problem
            raise

    def _run(self) -> Started:
        self._launch()
        hellos = self._await(Hello, "to report")
        self._server.shut_door()
        self._check(hellos)
        wires = self._wires = self._lay_wires(hellos)
        wire = Wire(
            tp=self._grid.tp,
            pp=self._grid.pp,
            wiring=msgspec.msgpack.encode(wires.wiring),
            factory=self._program.factory,
            argument=self._program.argument,
        )
        for place in self._grid:
            self._server.send(place.rank, wire)
        self._await(Wired, "to be connected with each other")
        wires.attached()
        readies = self._await(Ready, "to be ready")
        return Started(
            self._server, wires, [self._info(hellos[place.rank], readies[place.rank]) for place in self._grid]
        )

    def _launch(self) -> None:
        address, port, device = self._launcher.address, self._server.port, self._program.device
        self._launcher.launch(
            [
                RankStart(host=address, port=port, secret=self._secret, rank=place.rank, device=device)
                for place in self._grid
            ]
        )

    def _lay_wires(self, hellos: Mapping[int, Hello]) -> "DriverWires":
        from .wiring import lay_wires

        in_order = [hellos[place.rank] for place in self._grid]
        return lay_wires(
            self._grid,
            [hello.node for hello in in_order],
            driver_node=self._launcher.node,
            address=self._launcher.address,
            addresses=[hello.address for hello in in_order],
            device=self._program.device,
            sizes=self._program.sizes,
            deadline_s=self._limits.wire_deadline_s,
        )

    def _await(self, kind: type[Kind], purpose: str) -> dict[int, Kind]:
        """The message of this kind from every rank. Only a death, an error or the deadline ends the wait before."""
        came = self._came[kind]
        while len(came) < self._grid.size:
            for rank, message in self._server.poll(POLL_S):
                self._take(rank, message)
            if kind is Hello:  # who has no line yet cannot lose it
                for rank in set(range(self._grid.size)) - set(came):
                    if (status := self._launcher.exit_status(rank, timeout_s=0.0)) is not None:
                        raise self._ended(rank, status)
            self._look_at_the_clock(came, purpose)
        return came

    def _take(self, rank: int, message: FromRank | None) -> None:
        if message is None:
            raise self._ended(rank, self._launcher.exit_status(rank, timeout_s=LAST_WORDS_S))
        if isinstance(message, Failed):
            text = f"{self._grid.place(rank)} did not start: {message.kind}: {message.message}"
            raise GroupStartError(text, kind=message.kind)
        if isinstance(message, Progress):
            self._program.on_progress(message.text)
        self._came[type(message)][rank] = message

    def _ended(self, rank: int, status: int | None) -> GroupStartError:
        self._launcher.kill()  # all that it wrote has been read then
        how = "lost its connection" if status is None else describe_exit(status)
        said = self._launcher.last_words(rank)
        return GroupStartError(f"{self._grid.place(rank)} did not start: it {how}" + (f": {said}" if said else ""))

    def _look_at_the_clock(self, came: Mapping[int, FromRank], purpose: str) -> None:
        if self._cancelled.is_set():
            raise GroupStartError("the group was closed while it started")
        if time.monotonic() > self._deadline:
            missing = ", ".join(str(place) for place in self._grid if place.rank not in came)
            raise GroupStartError(
                f"waited {self._limits.start_timeout_s:g} s for the ranks {purpose}; still missing: {missing}"
            )

    def _check(self, hellos: dict[int, Hello]) -> None:
        """All run the same software, and have the device."""
        own = versions()
        for rank, hello in sorted(hellos.items()):
            place = f"{self._grid.place(rank)} on node {hello.node}"
            for name, version in own.items():
                if hello.versions.get(name) != version:
                    raise GroupStartError(
                        f"{place} runs {name} {hello.versions.get(name, 'of no version')}, the driver {version}: "
                        "install the same everywhere"
                    )
            if hello.device != self._program.device:
                raise GroupStartError(f"{place} has no {self._program.device} device, only {hello.device}")

    def _info(self, hello: Hello, ready: Ready) -> RankInfo:
        place = self._grid.place(hello.rank)
        return RankInfo(
            rank=place.rank,
            stage=place.stage,
            shard=place.shard,
            node=hello.node,
            pid=hello.pid,
            device=hello.device,
            details=ready.details,
        )
