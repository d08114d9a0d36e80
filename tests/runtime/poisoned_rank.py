"""A real rank that breaks whenever it computes anything of a log that holds one certain token: for test_poison.py."""

import os
import signal

import msgspec

from shoal.parallel.rank import SlotsFailed
from shoal.runtime.plan import StepPlan
from shoal.runtime.rank import start_rank

POISON = 66


class Poisoned:
    """Around the worker of `start_rank`. `breaks`: what happens to rank 1 when the poison is in a step."""

    def __init__(self, worker, place, breaks):
        self.details = worker.details
        self._worker = worker
        self._bites = place.rank == 1
        self._break = breaks
        self._slots = set()

    def begin(self, plan):
        decoded = msgspec.msgpack.decode(plan, type=StepPlan)
        for admission in decoded.admissions:
            self._slots.discard(admission.slot)
            if POISON in admission.tokens:
                self._slots.add(admission.slot)
        hit = [part.slot for part in decoded.slices if part.slot in self._slots]
        if hit and self._bites:
            self._break(hit[0])
        return self._worker.begin(plan)

    def close(self):
        self._worker.close()


def start_crashing(argument, place, *, comm, ring, station, progress):
    def crash(_slot):
        os.kill(os.getpid(), signal.SIGSEGV)

    worker = start_rank(argument, place, comm=comm, ring=ring, station=station, progress=progress)
    return Poisoned(worker, place, crash)


def start_naming(argument, place, *, comm, ring, station, progress):
    def name(slot):
        raise SlotsFailed("this row broke it", slots=(slot,))

    worker = start_rank(argument, place, comm=comm, ring=ring, station=station, progress=progress)
    return Poisoned(worker, place, name)
