"""A `WorkerGroup` of processes (station 11): submit and collect over the wires, and a watcher for the rest.

From one start to the next a group lives a `_Life`. Its watcher alone reads the control lines; it ends all ranks when
one of them dies, raises or hangs.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

from .control import Beat, Failed, FromRank, Progress
from .grid import Grid
from .group import GroupFailure, GroupStartError, Plan, RankInfo, Result
from .launcher import Launcher
from .peer import PeerTimeout
from .rank_start import LAST_WORDS_S, Program, Started, Startup
from .watch import Fault, GroupLimits, Watch, failure_of

if TYPE_CHECKING:
    from .wiring import DriverWires

log = logging.getLogger(__name__)

SLICE_S = 0.05  # how long `collect` may miss that the group has ended
TICK_S = 0.1  # between two looks at the clock


@dataclass(slots=True)
class _Life:
    """The ranks between two starts."""

    started: Started
    watch: Watch
    outstanding: int = 0
    waiting_since: float | None = None  # `collect` waits for a result; written there, read by the watcher
    failure: GroupFailure | None = None
    missed: PeerTimeout | None = None  # what the driver itself met
    is_over: threading.Event = field(default_factory=threading.Event)  # ends the watcher
    is_judged: threading.Event = field(default_factory=threading.Event)  # the watcher has ended
    watcher: threading.Thread | None = None

    def end(self) -> GroupFailure:
        """Why nothing goes any more."""
        return self.failure or GroupFailure("the group of ranks is closed")

    def wires(self) -> "DriverWires":
        """To be used at once. Raises GroupFailure where the group has ended."""
        if self.failure is not None or self.is_over.is_set():
            raise self.end()
        return self.started.wires


class RankGroup(Generic[Plan, Result]):
    """The ranks of one replica, each in a process of its own, wherever the launcher puts them."""

    def __init__(
        self,
        grid: Grid,
        *,
        launcher: Launcher,
        program: Program,
        encode_plan: Callable[[Plan], bytes],
        decode_result: Callable[[bytes], Result],
        limits: GroupLimits | None = None,
        depth: int | None = None,
    ) -> None:
        """Returns when every rank is ready. Raises GroupStartError.

        encode_plan: never to empty bytes. depth: see `WorkerGroup`; default: what the ring of stages needs.
        The launcher is the group's own from now on, and is closed with it.
        """
        self.depth = grid.pp + 1 if depth is None else depth
        self._grid = grid
        self._launcher = launcher
        self._program = program
        self._encode_plan = encode_plan
        self._decode_result = decode_result
        self._limits = limits or GroupLimits()
        self._closing = threading.Event()
        self._infos: list[RankInfo] = []
        self._using = threading.Lock()  # the wires: they must not be closed under a thread that uses them
        self._life: _Life | None = None
        try:
            self._start()
        except BaseException:
            launcher.close()
            raise

    def submit(self, plan: Plan) -> None:
        life = self._living()
        assert life.outstanding < self.depth, "collect first"
        data = self._encode_plan(plan)
        with self._waiting(life), self._using:
            life.wires().send(data)
        life.outstanding += 1

    def collect(self) -> Result:
        life = self._living()
        assert life.outstanding, "nothing to collect"
        result = None
        with self._waiting(life):
            while result is None:
                with self._using:
                    result = life.wires().receive(SLICE_S)
        life.outstanding -= 1
        return self._decode_result(result)

    @contextmanager
    def _waiting(self, life: _Life) -> Iterator[None]:
        """While the driver needs its ranks to move."""
        life.waiting_since = time.monotonic()
        try:
            yield
        except PeerTimeout as missed:
            life.missed = missed  # the watcher sees all ranks, and may know better who it was
            life.is_judged.wait()
            raise life.end() from missed
        finally:
            life.waiting_since = None

    def check(self) -> None:
        life = self._life
        if life is not None and life.is_judged.is_set() and life.failure is not None:
            raise life.end()

    def restart(self) -> None:
        self._end()
        self._start()

    def ranks(self) -> list[RankInfo]:
        return list(self._infos)

    def close(self) -> None:
        """Any thread may close: a start that goes on elsewhere is given up, a wait for a result ends."""
        self._closing.set()
        self._end()
        self._launcher.close()

    def _start(self) -> None:
        startup = Startup(self._grid, self._launcher, self._program, self._limits, cancelled=self._closing)
        try:
            started = startup.run()
        except Exception as problem:
            if self._closing.is_set():  # which has ended the ranks, whatever that looked like from here
                raise GroupStartError("the group was closed while it started") from problem
            raise
        self._infos = started.infos
        life = _Life(started, Watch(self._grid.size, self._limits, now=time.monotonic()))
        life.watcher = threading.Thread(target=self._watch, args=(life,), name="shoal-watcher", daemon=True)
        life.watcher.start()
        self._life = life
        if self._closing.is_set():  # while the last rank came up
            self._end()
            raise GroupStartError("the group was closed while it started")

    def _living(self) -> _Life:
        if self._life is None:
            raise GroupFailure("the group of ranks is closed")
        return self._life

    def _end(self) -> None:
        """By agreement where nothing is amiss, else by force: no process, segment or port is left."""
        with self._using:
            life, self._life = self._life, None
        if life is None:
            return
        life.is_over.set()
        assert life.watcher is not None
        life.watcher.join()
        with self._using:
            if life.failure is None and not life.outstanding:
                with suppress(PeerTimeout):
                    life.started.wires.send(b"")
                    self._await_ends(life.started)
            self._launcher.kill()
            life.started.server.close()
            life.started.wires.close()

    def _await_ends(self, started: Started) -> None:
        deadline = time.monotonic() + self._limits.close_grace_s
        left = self._grid.size
        while left and (rest := deadline - time.monotonic()) > 0:
            left -= sum(message is None for _, message in started.server.poll(rest))

    def _watch(self, life: _Life) -> None:
        """Until the group ends: listen to the ranks, and judge them."""
        try:
            fault = self._listen(life)
            if fault is not None:
                life.failure = self._failure(fault)
        finally:
            life.is_judged.set()

    def _listen(self, life: _Life) -> Fault | None:
        while not life.is_over.is_set():
            for rank, message in life.started.server.poll(TICK_S):
                _take(life.watch, rank, message)
            if life.missed is not None:
                life.watch.missed(life.missed.peer, time.monotonic())
            fault = life.watch.fault(time.monotonic(), waiting_since=life.waiting_since)
            if fault is not None:
                return fault
        return None

    def _failure(self, fault: Fault) -> GroupFailure:
        """End all ranks, and say what happened."""
        status = self._launcher.exit_status(fault.rank, timeout_s=LAST_WORDS_S) if fault.kind == "died" else None
        self._launcher.kill()
        words = self._launcher.last_words(fault.rank)
        return failure_of(fault, self._grid.place(fault.rank), status=status, last_words=words)


def _take(watch: Watch, rank: int, message: FromRank | None) -> None:
    now = time.monotonic()
    if message is None:
        watch.ended(rank, now)
    elif isinstance(message, Beat):
        watch.beat(rank, message, now)
    elif isinstance(message, Failed):
        watch.failed(rank, message, now)
    elif isinstance(message, Progress):
        log.info("%s", message.text)
