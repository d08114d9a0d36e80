"""Where rank processes come from: started, looked after and ended, whatever they do inside."""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

from .control import RankStart
from .keeper import Keeper

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class Launcher(Protocol):
    """Starts one process a rank, always in the same places. `kill` then `launch` starts them anew.

    What it keeps to start them sooner lives until `close`, or until the launcher is dropped.

    node: the id of the driver's node. address: the driver's own, on which the ranks can reach it.
    """

    node: str
    address: str

    def warm(self) -> None:
        """Begin now with whatever `launch` will need, so that it goes on beside the caller's own work. Idempotent."""
        ...

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

    def close(self) -> None:
        """`kill`, and let go of everything: there is no launch after it. Idempotent; any thread may call."""
        ...


class ProcessLauncher:
    """A `Launcher` of processes on this machine. They never import the caller's `__main__`.

    They are forked from a nursery (`nursery.py`), which has imported what they need and outlives them.
    """

    node = "local"
    address = "127.0.0.1"

    def __init__(self, *, environment: Mapping[str, str] | None = None, preload: Sequence[str] = ("torch",)) -> None:
        """environment: variables for the ranks, beside the caller's own. preload: modules that they will import.

        With device "cuda" each rank sees one of the devices that are visible to the launcher, in turn.
        """
        self._environment = {**os.environ, **(environment or {}), "PYTHONSAFEPATH": "1"}
        self._preload = tuple(preload)
        self._lock = threading.Lock()
        self._is_closed = False
        self._keeper: Keeper | None = None

    def warm(self) -> None:
        with self._lock:
            self._living_keeper()

    def launch(self, starts: Sequence[RankStart]) -> None:
        with self._lock:
            keeper = self._living_keeper()
            for index, start in enumerate(starts):
                device = {VISIBLE_DEVICES: self._device(index)} if start.device == "cuda" else {}
                keeper.fork(start, device)

    def exit_status(self, rank: int, *, timeout_s: float) -> int | None:
        keeper = self._keeper
        return keeper.exit_status(rank, timeout_s=timeout_s) if keeper else None

    def last_words(self, rank: int) -> str:
        keeper = self._keeper
        return keeper.last_words(rank) if keeper else ""

    def kill(self) -> None:
        keeper = self._keeper
        if keeper:
            keeper.kill()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            keeper = self._keeper
        if keeper:
            keeper.close()

    def _living_keeper(self) -> Keeper:
        if self._is_closed:
            raise OSError("the launcher of ranks is closed")
        if self._keeper is None or self._keeper.is_over:
            self._keeper = Keeper(environment=self._environment, preload=self._preload)
            weakref.finalize(self, self._keeper.let_go)  # for who forgets to close
        return self._keeper

    def _device(self, index: int) -> str:
        """Of the visible devices this one; none where there are not so many."""
        visible = self._environment.get(VISIBLE_DEVICES)
        if visible is None:
            return str(index)
        return dict(enumerate(visible.split(","))).get(index, "")
