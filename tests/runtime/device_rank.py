"""A real rank whose steps are not over when they have begun, as on a device: for test_ahead.py."""

import os
from pathlib import Path

from shoal.parallel.group import Begun
from shoal.runtime.rank import start_rank

DIARY = "DIARY"  # the variable that names a folder, where each rank leaves how many steps were under way at once
LOOKS = 40  # at a step, before it is over


class OnDevice:
    """Around the worker of `start_rank`."""

    def __init__(self, worker, place):
        self.details = worker.details
        self._worker = worker
        self._file = Path(os.environ[DIARY]) / str(place.rank)
        self._under_way = self._most = 0

    def begin(self, plan):
        begun = self._worker.begin(plan)
        self._under_way += 1
        self._most = max(self._most, self._under_way)
        looks = iter(range(LOOKS))

        def result():
            self._under_way -= 1
            return begun.result()

        return Begun(result, lambda: begun.is_done() and next(looks, None) is None)

    def close(self):
        self._file.write_text(str(self._most))
        self._worker.close()


def start(argument, place, *, comm, ring, station, progress):
    worker = start_rank(argument, place, comm=comm, ring=ring, station=station, progress=progress)
    return OnDevice(worker, place)
