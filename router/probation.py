"""Beside station 7: whose fault was it that a replica was lost? Pure: it only remembers who is under suspicion.

    it said goodbye                               proves nothing
    it broke, fell silent, or its engine died     all logs in flight there are suspects
    the same, while a suspect was tried there     that one is guilty, and all others are innocent

Suspects go on one at a time, whatever else their replica does, each until it is past the place where it was. So a
request that ends replicas ends two, one in company and one on trial, and no other request. Each ingress tries its own;
where their trials meet on a replica, that holds them one behind the other (line_server.py). A kill that happens to come
during a trial cannot be told from a poison: then the router decides for the replicas, and the log on trial fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import Enum, auto

PAST = 2  # tokens behind its place at which a suspect is cleared: a replica may be a step ahead of what it has sent
_REMEMBERED = 64  # replicas whose end is explained; a slow client's log hears of it late


class Verdict(Enum):
    """What the loss of its replica says of one log."""

    INNOCENT = auto()
    SUSPECT = auto()
    GUILTY = auto()


class Probation:
    """The suspects among one ingress's logs, in the order in which they are tried."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}
        self._court: str | None = None  # the replica where the first of them is tried
        self._explained: deque[str] = deque(maxlen=_REMEMBERED)

    @property
    def num_suspects(self) -> int:
        return len(self._places)

    def may_go(self, log: Hashable) -> bool:
        """Whether it may be given to a replica: it is no suspect, or it is its turn."""
        return log not in self._places or log == next(iter(self._places))

    def move(self, log: Hashable, replica: str | None) -> None:
        """It is on that replica from now on; None: on none, or nobody knows which. A suspect is tried there."""
        if replica is not None and replica in self._explained:  # and back under its name: its next end is another one
            self._explained.remove(replica)
        if log in self._places and (replica is not None or self.may_go(log)):
            assert self.may_go(log), "a suspect goes on before its turn"
            self._court = replica

    def judge(self, log: Hashable, replica: str | None, *, length: int) -> Verdict:
        """Take in that its replica was lost, with nobody knowing why. length: of the log, in tokens.

        Every log in flight there is to be brought here, in any order. One that is guilty is to be cleared.
        """
        if log in self._places:
            if replica is not None:
                self._explained.append(replica)
            return Verdict.GUILTY
        if replica is not None and (replica in self._explained or (self._places and replica == self._court)):
            return Verdict.INNOCENT
        self._places[log] = length + PAST
        return Verdict.SUSPECT

    def clear(self, log: Hashable, *, length: int | None = None) -> bool:
        """Let a suspect go: it has ended, or is past its place with `length` tokens. Whether it was let go."""
        place = self._places.get(log)
        if place is None or (length is not None and length < place):
            return False
        if log == next(iter(self._places)):
            self._court = None
        del self._places[log]
        return True
