"""Worker factories for tests of real rank processes: workers that do what the plan says. None needs torch at import."""

import json
import os
import signal
import time

from shoal.parallel.group import Begun


class ConfigError(Exception):
    """As `shoal.runtime.errors` has it: the driver knows the name alone."""


class Obedient:
    """A plan is `{"do": command, "rank": whose, ...}` in JSON; without a rank it is everybody's. Counts its steps."""

    def __init__(self, argument, place, station):
        self.details = {"argument": argument.decode(), "pid": os.getpid()}
        self.place = place
        self.station = station
        self.num_steps = 0

    def begin(self, plan):
        order = json.loads(plan)
        self.num_steps += 1
        self.station.at(order.get("at", "compute"))
        if order.get("rank", self.place.rank) == self.place.rank:
            self.obey(order)
        value = json.dumps([self.num_steps, order.get("value")]).encode() if self.place.answers else None
        return Begun(lambda: value)

    def obey(self, order):
        match order["do"]:
            case "echo":
                pass
            case "sleep":
                time.sleep(order["seconds"])
            case "raise":
                raise ValueError("row 3 is bad")
            case "blame":
                from shoal.parallel.rank import SlotsFailed

                raise SlotsFailed("rows are bad", slots=tuple(order["slots"]))
            case "exit":
                os.write(2, b"last words" + b"\n")
                os._exit(order["status"])
            case "signal":
                os.kill(os.getpid(), order["signal"])
            case other:
                raise AssertionError(other)

    def close(self):
        os.write(2, b"closed" + b"\n")


def obedient(argument, place, *, comm, ring, station, progress):
    progress(f"{place}: built")
    return Obedient(argument, place, station)


def misconfigured(argument, place, *, comm, ring, station, progress):
    """Rank 1 alone cannot start."""
    if place.rank == 1:
        raise ConfigError("max_model_len is 10: at least 16")
    return Obedient(argument, place, station)


def broken(argument, place, *, comm, ring, station, progress):
    """The last rank ends without a word to the driver."""
    if place.answers:
        os.write(2, b"Traceback: of a compiler" + b"\n")
        os._exit(3)
    return Obedient(argument, place, station)


def once(argument, place, *, comm, ring, station, progress):
    """Comes up the first time alone, of which it leaves the file `argument`."""
    if os.path.exists(argument):
        progress("sleeping")
        signal.pause()
    with open(argument, "xb"):
        return Obedient(b"", place, station)


class Summing:
    """A number goes around the ring; every stage adds the sum of its shards' ranks to it."""

    def __init__(self, place, comm, ring):
        self.details = {}
        self.place, self.comm, self.ring = place, comm, ring

    def begin(self, plan):
        import torch

        x = torch.tensor([float(plan)])
        if not self.place.is_first:
            x = self.ring.receive((1,), torch.float32)
        x += self.comm.all_reduce(torch.tensor([float(self.place.rank)]))
        if not self.place.is_last:
            self.ring.send(x)
        return Begun(lambda: str(x.item()).encode())

    def close(self):
        pass


def summing(argument, place, *, comm, ring, station, progress):
    return Summing(place, comm, ring)
