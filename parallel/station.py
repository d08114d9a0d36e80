"""Where a rank is and whether it moves: what its watchers are told while its own thread computes or waits."""

import time

COMPUTE = "compute"  # where a rank is that waits for nobody; whoever waits says so again when the wait is over


class Station:
    """Written by the rank's thread, read by its heartbeat. Writing is one tuple store, so no lock is needed.

    A long step passes many stations: a rank that is alive but passes none is stuck, however long its steps are.
    """

    def __init__(self) -> None:
        self._now = ("start", 0)
        self.seconds_waited = 0.0  # for input, since the start: the pipeline's idle time

    def at(self, name: str) -> None:
        """The rank has come to `name`: "all_reduce", "receive", "compute", "plan" (waiting for work), ..."""
        self._now = (name, self._now[1] + 1)

    def read(self) -> tuple[str, int]:
        """(the station's name, how many were passed)."""
        return self._now

    def waited(self, since: float) -> None:
        """Count the time from `since` (`time.perf_counter`) until now as waiting for input."""
        self.seconds_waited += time.perf_counter() - since
