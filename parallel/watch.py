"""Who is to blame: judges a group's ranks by what their control lines say. Pure: no I/O, no clock of its own."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .control import Beat, Failed
from .grid import Place
from .group import Cause, GroupFailure

SETTLE_S = 0.1  # after the first sign of an end: what a rank's death does to its peers must not be blamed on them
STALL_S = 1.0  # the watcher itself did not run for so long: its ranks are not to blame
MISSED_S = 1.0  # four heartbeats

# Where a rank waits for others. Whoever is elsewhere, or is silent, is who they wait for.
WAITING = frozenset({"plan", "receive", "send", "all_reduce", "all_gather"})

# A process ended by one of these was told to by somebody outside; by another, it broke.
FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """How long to wait for ranks, in seconds. A hang is named within silence_s or step_timeout_s."""

    start_timeout_s: float = 600.0  # loading may take long; it reports progress
    silence_s: float = 5.0  # no heartbeat
    step_timeout_s: float = 8.0  # a result is waited for, and no rank passes any station
    # One rank's wait for another, which may have a long step to do. What is above judges by progress, and sooner.
    wire_deadline_s: float = 30.0
    close_grace_s: float = 1.0  # for ranks to end by themselves


@dataclass(frozen=True, slots=True)
class Fault:
    """What ended the group. `seconds`: how long the rank was silent or stuck. failed: its own words, if it had any."""

    rank: int
    kind: Literal["died", "raised", "silent", "stuck"]
    station: str
    seconds: float = 0.0
    failed: Failed | None = None


@dataclass(slots=True)
class _Seen:
    """What is known of one rank."""

    heard_at: float
    moved_at: float
    station: str = "start"
    count: int = 0


class Watch:
    """Fed by the watcher with everything it hears; `fault` is asked after each round."""

    def __init__(self, size: int, limits: GroupLimits, *, now: float) -> None:
        self._limits = limits
        self._seen = [_Seen(now, now) for _ in range(size)]
        self._asked_at = now
        self._first_end: float | None = None
        self._failed: dict[int, Failed] = {}  # in the order they came
        self._ended: list[int] = []
        self._missed: list[int] = []  # ranks that somebody waited for in vain

    def beat(self, rank: int, beat: Beat, now: float) -> None:
        """A rank is alive, and this is where it stands."""
        seen = self._seen[rank]
        seen.heard_at = now
        if beat.count != seen.count:
            seen.moved_at, seen.count = now, beat.count
        seen.station = beat.station

    def failed(self, rank: int, message: Failed, now: float) -> None:
        """A rank says that an exception ends it."""
        self._failed[rank] = message
        self.missed(message.peer, now)

    def ended(self, rank: int, now: float) -> None:
        """A rank's line has ended."""
        self._ended.append(rank)
        self.missed(None, now)

    def missed(self, peer: int | None, now: float) -> None:
        """The driver, or a rank, waited in vain; for whom, if that is known."""
        self._first_end = now if self._first_end is None else self._first_end
        if peer is not None and peer >= 0:
            self._missed.append(peer)

    def fault(self, now: float, *, waiting_since: float | None) -> Fault | None:
        """The verdict, if there is one. waiting_since: from when on the driver waits for a result, if it does."""
        self._forgive_own_stall(now)
        if self._first_end is not None:
            return self._of_the_ended(now) if now - self._first_end >= SETTLE_S else None
        rank = min(range(len(self._seen)), key=lambda rank: self._seen[rank].heard_at)
        silence = now - self._seen[rank].heard_at
        if silence > self._limits.silence_s:
            return Fault(rank, "silent", self._seen[rank].station, silence)
        if waiting_since is not None:
            still = now - max(waiting_since, *(seen.moved_at for seen in self._seen))
            if still > self._limits.step_timeout_s:
                return self._of_the_stuck(now, range(len(self._seen)))
        return None

    def _of_the_ended(self, now: float) -> Fault:
        """A death without a word comes first, then the first that raised something of its own, then a vain wait."""
        for rank in self._ended:
            if rank not in self._failed:
                return Fault(rank, "died", self._seen[rank].station)
        for rank, failed in self._failed.items():
            if not failed.is_victim:
                return Fault(rank, "raised", failed.station, failed=failed)
        everybody = range(len(self._seen))
        quiet = [rank for rank in everybody if rank not in self._failed]
        return self._of_the_stuck(now, [rank for rank in quiet if rank in self._missed] or quiet or everybody)

    def _of_the_stuck(self, now: float, ranks: Sequence[int]) -> Fault:
        """Of these, the one that all others wait for."""

        def innocence(rank: int) -> tuple[bool, bool, float]:
            seen = self._seen[rank]
            return now - seen.heard_at < MISSED_S, seen.station in WAITING, seen.moved_at

        guilty = min(ranks, key=innocence)
        seen = self._seen[guilty]
        return Fault(guilty, "stuck", seen.station, now - seen.moved_at)

    def _forgive_own_stall(self, now: float) -> None:
        """Where the driver was stopped or starved, time did not count."""
        gap, self._asked_at = now - self._asked_at, now
        if gap > STALL_S:
            for seen in self._seen:
                seen.heard_at = min(now, seen.heard_at + gap)
                seen.moved_at = min(now, seen.moved_at + gap)


def failure_of(fault: Fault, place: Place, *, status: int | None, last_words: str) -> GroupFailure:
    """The fault in words. status: how the process ended, as `subprocess` has it; None where nobody knows."""
    at = f"at {fault.station!r}"
    cause: Cause = "exception"
    if fault.failed is not None:
        text = f"{place} raised {fault.failed.kind} {at}: {fault.failed.message}"
    elif fault.kind == "silent":
        text = f"{place} has given no sign of life for {fault.seconds:.1f} s, last {at}"
        cause = "hang"
    elif fault.kind == "stuck":
        text = f"{place} has hung for {fault.seconds:.1f} s {at}"
        cause = "hang"
    elif status is None:
        text = f"the connection to {place} was lost {at}"
        cause = "lost"
    else:
        text = f"{place} {describe_exit(status)} {at}" + (f": {last_words}" if status > 0 and last_words else "")
        cause = "killed" if -status in FROM_OUTSIDE else "exception"
    return GroupFailure(
        text,
        rank=fault.rank,
        station=fault.station,
        cause=cause,
        slots=fault.failed.slots if fault.failed else (),
    )


def describe_exit(status: int) -> str:
    """As `subprocess` has it."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
