"""Station 3's core: who has a place, who waits, and whose turn it is. Pure: no I/O, no waiting, the clock is handed in.

Places are shared out by the virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024). Each tenant has a counter of the tokens it was served, output weighted, divided by its weight; of those in the
first class that wait, the one with the lowest goes next, inside a tenant who came first. A tenant that had nobody
waiting comes back with its counter lifted to that of those who do, or who went last: idleness saves nothing up.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from itertools import count

from ..runtime.errors import QueueFull
from ..runtime.policy import OUTPUT_WEIGHT
from .tenant import Tenant

_MEMORY_S = 120.0  # how far back the pace looks
_FIRST_GAP_S = 1.0  # between two ends, before there was any
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 30.0


class Entry:
    """One request in the queue: `weight` generations that come in together. in_flight: it has its place."""

    __slots__ = ("arrival", "in_flight", "priority", "prompt_tokens", "tenant", "weight")

    def __init__(self, tenant: Tenant, *, weight: int = 1, priority: int = 0, prompt_tokens: int = 0) -> None:
        self.tenant = tenant
        self.weight = weight
        self.priority = priority
        self.prompt_tokens = prompt_tokens
        self.in_flight = False
        self.arrival = 0


class _Line:
    """Those of one tenant and one class that wait. size: their generations."""

    __slots__ = ("entries", "priority", "size", "tenant")

    def __init__(self, tenant: Tenant, priority: int) -> None:
        self.tenant = tenant
        self.priority = priority
        self.entries: deque[Entry] = deque()
        self.size = 0


class FairQueue:
    """`in_flight` and `waiting` are the weights of all entries that have a place, and of those that wait for one.

    in_flight <= max_in_flight, but for one entry heavier than that, which has its place alone; waiting <= max_waiting;
    nobody waits who fits and whose turn it is.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, *, clock: Callable[[], float]) -> None:
        self.in_flight = 0
        self.waiting = 0
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._pace = Pace(max_in_flight, clock=clock)
        self._lines: dict[tuple[int, str], _Line] = {}  # those that are not empty
        self._counters: defaultdict[str, float] = defaultdict(float)  # tenants: few, and the operator's to name
        self._held: Counter[str] = Counter()  # generations of each tenant, in flight or waiting
        self._arrivals = count()
        self._last: str | None = None  # whose entry got the last place

    # What comes in

    def offer(self, entry: Entry, *, patience_s: float = math.inf) -> tuple[list[Entry], list[Entry]]:
        """Take the entry in; gives those that have a place now, maybe this one too, and those it has put out.

        Where the queue is full the newest of the longest line of the last class is put out, as long as that is not the
        newcomer's own: so no tenant can fill the queue against the others.

        Raises:
            QueueFull: no room for it, or more of its tenant than may be here, or it would wait beyond `patience_s`.
        """
        self._check_share(entry.tenant, entry.weight)
        out: list[Entry] = []
        if not self._has_place(entry.weight):
            out = self._displaced(entry)
            self._check_patience(entry, patience_s)
        for other in out:
            self._take_out(other)
        self._put_in(entry)
        return self._fill(), out

    def leave(self, entry: Entry) -> list[Entry]:
        """The entry has ended, or waits no longer; gives those that have a place because of it."""
        if entry.in_flight:
            self._held[entry.tenant.name] -= entry.weight
            self.in_flight -= entry.weight
            self._pace.change(self.in_flight, ended=entry.weight)
        else:
            self._take_out(entry)
        return self._fill()

    def charge(self, tenant: Tenant, *, prompt: int = 0, output: int = 0) -> None:
        """The tenant was served so many tokens."""
        self._counters[tenant.name] += (prompt + OUTPUT_WEIGHT * output) / tenant.weight

    def retry_after(self, weight: int) -> float:
        """Seconds until there is room for so many generations at the queue's end, about."""
        return self._pace.retry_after(self.in_flight + self.waiting + weight - self._max_in_flight - self._max_waiting)

    def time_to(self, load: float) -> float:
        """Seconds until the load has fallen to this one if nobody comes, about."""
        return self._pace.retry_after(self.in_flight + self.waiting - load * self._max_in_flight)

    @property
    def load(self) -> float:
        """Generations in flight or waiting, as a share of the places."""
        return (self.in_flight + self.waiting) / self._max_in_flight

    # Order

    def _has_place(self, weight: int) -> bool:
        return not self._lines and self._fits(weight)

    def _fits(self, weight: int) -> bool:
        return not self.in_flight or self.in_flight + weight <= self._max_in_flight

    def _fill(self) -> list[Entry]:
        """Give places to whoever's turn it is. One who does not fit yet holds up all behind him, or he never would."""
        admitted = []
        while self._lines:
            line = min(self._lines.values(), key=self._turn)
            entry = line.entries[0]
            if not self._fits(entry.weight):
                break
            self._drop(entry, line)
            entry.in_flight = True
            self.in_flight += entry.weight
            self._pace.change(self.in_flight)
            self._last = entry.tenant.name
            self.charge(entry.tenant, prompt=entry.prompt_tokens)
            admitted.append(entry)
        return admitted

    def _turn(self, line: _Line) -> tuple[int, float, int]:
        return line.priority, self._counters[line.tenant.name], line.entries[0].arrival

    def _put_in(self, entry: Entry) -> None:
        name = entry.tenant.name
        waiting = {line.tenant.name for line in self._lines.values()}
        if name not in waiting:
            floor = min((self._counters[other] for other in waiting), default=self._counters[self._last or name])
            self._counters[name] = max(self._counters[name], floor)
        line = self._lines.setdefault((entry.priority, name), _Line(entry.tenant, entry.priority))
        entry.arrival = next(self._arrivals)
        line.entries.append(entry)
        line.size += entry.weight
        self.waiting += entry.weight
        self._held[name] += entry.weight

    def _take_out(self, entry: Entry) -> None:
        """Out of the line it waits in, and of the queue."""
        self._drop(entry, self._lines[entry.priority, entry.tenant.name])
        self._held[entry.tenant.name] -= entry.weight

    def _drop(self, entry: Entry, line: _Line) -> None:
        line.entries.remove(entry)
        line.size -= entry.weight
        self.waiting -= entry.weight
        if not line.entries:
            del self._lines[entry.priority, entry.tenant.name]

    # Refusals

    def _check_share(self, tenant: Tenant, weight: int) -> None:
        held, most = self._held[tenant.name], tenant.max_in_flight
        if most is not None and held and held + weight > most:
            raise QueueFull(
                f"{held} generations of {tenant.name} are here and {weight} more were asked for; "
                f"at most {most} are admitted at a time (the tenant's max_in_flight)",
                retry_after=self._pace.retry_after(self._max_in_flight * (held + weight - most) / held),
                code="rate_limit_exceeded",
            )

    def _displaced(self, entry: Entry) -> list[Entry]:
        """Whom the newcomer puts out so that it can wait. Raises QueueFull where that would be itself."""
        over = self.waiting + entry.weight - self._max_waiting
        if over <= 0:
            return []
        own = (entry.priority, entry.tenant.name)
        shares = {key: line.tenant.weight for key, line in self._lines.items()} | {own: entry.tenant.weight}
        sizes = Counter({key: line.size for key, line in self._lines.items()})
        sizes[own] += entry.weight
        out: list[Entry] = []
        taken: Counter[tuple[int, str]] = Counter()
        while over > 0:
            key = max(sizes, key=lambda key: (key[0], sizes[key] / shares[key], key == own))
            if key == own:
                raise self._full(entry.weight)
            taken[key] += 1
            out.append(self._lines[key].entries[-taken[key]])
            over -= out[-1].weight
            sizes[key] -= out[-1].weight
            if not sizes[key]:
                del sizes[key]
        return out

    def _full(self, weight: int) -> QueueFull:
        return QueueFull(
            f"{self.in_flight} generations are in flight, {self.waiting} wait and {weight} more were asked for; "
            f"at most {self._max_in_flight} are admitted (max_in_flight) and {self._max_waiting} wait (max_waiting)",
            retry_after=self.retry_after(weight),
        )

    def _check_patience(self, entry: Entry, patience_s: float) -> None:
        wait = self._pace.wait(self.in_flight + self._ahead(entry) + entry.weight - self._max_in_flight)
        if wait is not None and wait > patience_s:
            raise QueueFull(
                f"{self.in_flight} generations are in flight and {self.waiting} wait: a place would come in about "
                f"{wait:.1f} s, but this request waits {patience_s:.1f} s at most (max_wait_s, timeout)",
                retry_after=min(_MAX_RETRY_S, wait - patience_s + _MIN_RETRY_S),
            )

    def _ahead(self, entry: Entry) -> float:
        """About how many generations go before it: all of earlier classes, of its own what fair turns make of it."""
        lines = self._lines.values()
        own = sum(line.size for line in lines if line.tenant.name == entry.tenant.name)
        peers = [line for line in lines if line.priority == entry.priority]
        others = {line.tenant.name: line.tenant.weight for line in peers if line.tenant.name != entry.tenant.name}
        in_turn = (own + entry.weight) * (1 + sum(others.values()) / entry.tenant.weight)
        return sum(line.size for line in lines if line.priority < entry.priority) + min(
            sum(line.size for line in peers), in_turn - entry.weight
        )


class Pace:
    """How fast places come free once all are taken, of how long generations have held theirs.

    By Little's law: the time that all places were held together, over the generations that ended in it, is the time one
    holds a place. So neither idle times, nor ends that come in bunches, nor a load that leaves places free bend it.
    Both sums fade, together.
    """

    def __init__(self, num_places: int, *, clock: Callable[[], float]) -> None:
        self._num_places = num_places
        self._clock = clock
        self._at = clock()
        self._held = 0
        self._held_s = 0.0
        self._ended = 0.0

    def change(self, held: int, *, ended: int = 0) -> None:
        """From now on so many places are held."""
        now = self._clock()
        fade = math.exp((self._at - now) / _MEMORY_S)
        self._held_s = self._held_s * fade + self._held * (now - self._at)
        self._ended = self._ended * fade + ended
        self._at, self._held = now, held

    def wait(self, num_places: float) -> float | None:
        """Seconds until so many have come free; None while nothing is known of it."""
        if self._ended <= 0:
            return None
        return max(0.0, num_places) * self._held_s / self._ended / self._num_places

    def retry_after(self, num_places: float) -> float:
        """As `wait`, within bounds that a client can be asked for."""
        wait = self.wait(num_places)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, num_places * _FIRST_GAP_S if wait is None else wait))
