"""One router on the virtual clock: the real balancer over what this router alone has sent and was told.

What it knows of a replica is as old as the replica's last beat, and so is the prefix index; the real ledger corrects
that by what it has sent and received since. It learns of a death at once: the connection breaks.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..router.backend import ReplicaState
from ..router.balance import BalancerName, select_balancer
from ..router.ledger import Ledger
from ..router.prefix_index import PrefixIndex
from ..runtime.blocks import BlockNames, Changes
from ..runtime.generation import GenerationRequest
from ..runtime.stats import Stats
from .sim_load import SECRET, Script


@dataclass(frozen=True, slots=True)
class Sent:
    """A log on a replica, as the router that sent it numbers it."""

    replica: str
    stream: int


@dataclass(slots=True)
class _Link:
    stats: Stats
    ledger: Ledger
    in_flight: int = 0
    num_submitted: int = 0
    received: int = 0  # of those, all up to this had arrived at the last beat
    under_way: deque[tuple[float, int]] = field(default_factory=deque)  # when a stream arrives, and its number

    def state(self) -> ReplicaState:
        corrections = self.ledger.corrections()
        return ReplicaState(
            problem=None,
            stats=self.stats,
            ranks=[],
            in_flight=self.in_flight,
            digest="",
            is_leaving=False,
            **corrections,
        )


class ScriptIndex(PrefixIndex):
    """The prefix index over block names that are made once a conversation."""

    def __init__(self) -> None:
        super().__init__(secret=SECRET)
        self.script: Script | None = None  # of the log that is asked about

    def names(self, request: GenerationRequest) -> BlockNames:
        assert self.script is not None, "nobody asks about a log before it is sent"
        return self.script.names


class SimIngress:
    """Chooses replicas and keeps count of what it sent. Pure but for its dice."""

    def __init__(self, balancer: BalancerName, *, rng: random.Random) -> None:
        self._links: dict[str, _Link] = {}
        self._states: dict[str, ReplicaState] = {}
        self._changed: dict[str, None] = {}  # in order, lest a run differs from the next
        self._index = ScriptIndex()
        self.reads_names = balancer == "prefix"
        self._balancer = select_balancer(balancer, self._replicas, self._index, rng=rng)

    # Replicas

    def join(self, replica: str, stats: Stats, *, block_size: int) -> None:
        """A replica is there."""
        if self.reads_names:
            self._index.join(replica, block_size=block_size)
        self._links[replica] = _Link(stats, Ledger(replica, self._index))
        self._changed[replica] = None

    def lose(self, replica: str) -> None:
        """It is gone, with all that was sent there."""
        del self._links[replica]
        self._states.pop(replica, None)
        self._changed.pop(replica, None)
        self._index.leave(replica)

    def hear(self, replica: str, stats: Stats, changes: Changes | None, now: float) -> None:
        """A beat: what it does not count is what had not arrived."""
        link = self._links[replica]
        link.stats = stats
        if changes is not None:
            self._index.hear(replica, changes)
        while link.under_way and link.under_way[0][0] <= now:
            link.received = link.under_way.popleft()[1]
        link.ledger.beat(link.received)
        self._changed[replica] = None

    # Logs

    def choose(self, request: GenerationRequest, script: Script, *, lost: frozenset[str]) -> str | None:
        """The replica that the balancer takes; None if there is none."""
        self._index.script = script
        return self._balancer.choose(request, lost=lost)

    def send(self, request: GenerationRequest, script: Script, replica: str, arrives_at: float) -> Sent:
        """The log is on its way."""
        self._index.script = script
        link = self._links[replica]
        link.in_flight += 1
        link.num_submitted += 1
        link.ledger.sent(link.num_submitted, request)
        link.under_way.append((arrives_at, link.num_submitted))
        self._changed[replica] = None
        return Sent(replica, link.num_submitted)

    def answered(self, sent: Sent) -> None:
        """Its first token from there has come."""
        link = self._links.get(sent.replica)
        if link is not None:
            link.ledger.answered(sent.stream)
            self._changed[sent.replica] = None

    def ended(self, sent: Sent) -> None:
        """It is over there, one way or the other."""
        link = self._links.get(sent.replica)
        if link is not None:
            link.in_flight -= 1
            link.ledger.ended(sent.stream)
            self._changed[sent.replica] = None

    def _replicas(self) -> Mapping[str, ReplicaState]:
        for replica in self._changed:
            self._states[replica] = self._links[replica].state()
        self._changed.clear()
        return self._states
