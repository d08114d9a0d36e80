"""Station 3: who may come in, in what order, and what is given up under load.

A request passes the tenant's rates (`rates.py`). What of it must be made anew, and only that, then waits for a place
in one queue that all tenants share fairly (`fair_queue.py`, pure): a cached answer or a shared flight takes none. Here
are only the waiting and the accounts. What is refused is refused at once, with the time after which it is worth another
try, or as soon as its turn can no longer come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..runtime.errors import QueueFull, RequestTimeout, ShoalError, Unavailable
from .body import ClientGone
from .config import RouterConfig
from .fair_queue import Entry, FairQueue
from .ladder import Degradation, Ladder
from .meters import AdmissionMeter
from .rates import Charge, RateLimited, Rates
from .tenant import Tenant

_MAX_STORED_NAMES = 256  # in metrics: of tenants that the config does not know
_OUTCOMES = (
    (RateLimited, "rate_limited"),
    (QueueFull, "queue_full"),
    (RequestTimeout, "expired"),
    (Unavailable, "unavailable"),
    (ClientGone, "client_gone"),
)


class Grant:
    """What a tenant's rates let one request have. headers: how the tenant stands since.

    It is open while anything runs on it: the request itself, and what it leads, which may go on for others behind it.
    """

    def __init__(self, admission: Admission, tenant: Tenant, charge: Charge) -> None:
        self.headers = charge.headers
        self._admission: Admission | None = admission
        self._tenant = tenant
        self._charge = charge
        self._used = 0
        self._num_open = 1
        self._error: Exception | None = None

    def open(self) -> None:
        """One more runs on it."""
        self._num_open += 1

    def use(self, num_tokens: int) -> None:
        """So many tokens were computed for it, prompt or answer. What comes from the cache costs nothing."""
        self._used += num_tokens

    def close(self, error: Exception | None = None) -> None:
        """One has ended, with `error`. Behind the last the rates get back what was not used; any further is nothing."""
        self._num_open -= 1
        self._error = self._error or error
        if self._admission is not None and self._num_open <= 0:
            # Never above the charge: what the limits have no room for any more could not be taken at all.
            used = min(self._used, self._charge.tokens)
            self._admission._settle(self._charge, used=used, served=self._error is None or used > 0)
            self._admission._count(self._tenant, self._error)
            self._admission = None


class Place:
    """Leave to run `weight` generations. waited_s: for it, in the queue."""

    def __init__(self, admission: Admission, entry: Entry, *, waited_s: float) -> None:
        self.weight = entry.weight
        self.waited_s = waited_s
        self._admission: Admission | None = admission
        self._entry = entry
        self._output = 0

    def charge(self, num_tokens: int) -> None:
        """So many tokens of output have come."""
        self._output += num_tokens
        if self._admission is not None:
            self._admission._served(self._entry, num_tokens)

    def close(self) -> None:
        """The place is free again. Twice is once."""
        if self._admission is not None:
            self._admission._leave(self._entry, output=self._output)
            self._admission = None


class Admission:
    """The door of one ingress. Belongs to one event loop."""

    def __init__(
        self, config: RouterConfig, *, rates: Rates, meter: AdmissionMeter, clock: Callable[[], float]
    ) -> None:
        self.draining = False
        self._max_wait_s = config.max_wait_s
        self._rates = rates
        self._meter = meter
        self._clock = clock
        self._queue = FairQueue(config.max_in_flight, config.max_waiting, clock=clock)
        self._ladder = Ladder(config.ladder)
        self._waiting: dict[Entry, asyncio.Future[None]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._names = {tenant.name for tenant in config.tenants}  # that metrics show
        self._max_names = len(self._names) + len(config.api_keys) + _MAX_STORED_NAMES
        meter.load.set_function(lambda: self._queue.load)

    @property
    def in_flight(self) -> int:
        return self._queue.in_flight

    @property
    def load(self) -> float:
        """Generations in flight or waiting, as a share of the places: from 1 on who comes waits."""
        return self._queue.load

    def check(self, tenant: Tenant) -> Degradation:
        """Refuse before the body is read, so that it costs next to nothing. Gives what is to be given up at this load.

        Raises:
            Unavailable: draining, or the load is so high that the tenant's requests are shed.
        """
        try:
            self._check_draining()
            degradation = self._ladder.at(self._queue.load)
            if degradation.shed and tenant.priority >= 0:
                self.degraded("shed")
                raise Unavailable(
                    f"{self._queue.load:.2f} times the generations that can run are here; requests like this one are "
                    "shed (ladder)",
                    retry_after=self._queue.time_to(self._ladder.shed_until),
                )
        except ShoalError as refusal:
            self._count(tenant, refusal)
            raise
        return degradation

    async def grant(self, tenant: Tenant, *, tokens: int) -> Grant:
        """Charge the tenant's rates with a request that may come to so many tokens, prompt and answers.

        Raises:
            RateLimited: over the tenant's rates or budget. Unavailable: draining.
        """
        try:
            self._check_draining()
            charge = await self._rates.charge(tenant, tokens=tokens)
        except ShoalError as refusal:
            self._count(tenant, refusal)
            raise
        return Grant(self, tenant, charge)

    async def place(
        self,
        tenant: Tenant,
        *,
        weight: int = 1,
        priority: int | None = None,
        prompt_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> Place:
        """A place for `weight` generations, all or none, as soon as it is their turn.

        priority: of the request, where it differs from its tenant's. timeout_s: the request's own deadline, from now.

        Raises:
            QueueFull: no room, or put out for a tenant with less. RequestTimeout: the deadline has passed.
            Unavailable: draining, or the wait was too long.
        """
        self._check_draining()
        if timeout_s is not None and timeout_s <= 0:
            raise RequestTimeout("the deadline passed before the request could be looked at (timeout)")
        priority = tenant.priority if priority is None else priority
        entry = Entry(tenant, weight=weight, priority=priority, prompt_tokens=prompt_tokens)
        waited_s = await self._take_place(entry, timeout_s)
        self._meter.wait.observe(waited_s)
        self._meter.tokens.labels(self._label(tenant), "prompt").inc(prompt_tokens)
        return Place(self, entry, waited_s=waited_s)

    def degraded(self, rung: str) -> None:
        """A request was given less: of what, in a word."""
        self._meter.degraded.labels(rung).inc()

    def drain(self) -> None:
        """Take nobody in any more; who waits is refused, who has a place keeps it."""
        self.draining = True
        for entry in list(self._waiting):
            if entry in self._waiting:
                self._let_in(self._queue.leave(entry))
                self._end_wait(entry, _draining())

    async def close(self) -> None:
        """Until the accounts are settled."""
        while self._settling:
            await asyncio.wait(self._settling)

    def _label(self, tenant: Tenant) -> str:
        """Its name in metrics. A store may hold any number of tenants: all beyond the first ones are `other`."""
        if tenant.name not in self._names:
            if len(self._names) >= self._max_names:
                return "other"
            self._names.add(tenant.name)
        return tenant.name

    def _check_draining(self) -> None:
        if self.draining:
            raise _draining()

    async def _take_place(self, entry: Entry, timeout_s: float | None) -> float:
        """Until it has its place; the seconds that took. However else it ends, the entry is in the queue no more."""
        began = self._clock()
        patience = self._max_wait_s if timeout_s is None else min(self._max_wait_s, timeout_s)
        let_in, put_out = self._queue.offer(entry, patience_s=patience)
        for other in put_out:
            self._end_wait(other, _crowded_out(other, self._queue.retry_after(other.weight)))
        self._let_in(let_in)
        if entry.in_flight:
            return 0.0
        future = self._waiting[entry] = asyncio.get_running_loop().create_future()
        queued = self._meter.queued.labels(self._label(entry.tenant))
        queued.inc(entry.weight)
        try:
            async with asyncio.timeout(patience):
                await future
        except BaseException as error:
            if self._waiting.pop(entry, None) is not None or entry.in_flight:
                self._let_in(self._queue.leave(entry))
            if isinstance(error, TimeoutError):
                raise self._too_late(patience, timeout_s) from None
            raise
        finally:
            queued.dec(entry.weight)
        return self._clock() - began

    def _let_in(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._end_wait(entry, None)

    def _end_wait(self, entry: Entry, error: ShoalError | None) -> None:
        future = self._waiting.pop(entry, None)
        if future is None or future.done():  # it never waited, or its client has left this very moment
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _too_late(self, waited_s: float, timeout_s: float | None) -> ShoalError:
        if timeout_s is not None and timeout_s <= self._max_wait_s:
            return RequestTimeout(f"the deadline passed after {timeout_s:.3g} s in the queue (timeout)")
        return Unavailable(
            f"no place came free in {waited_s:g} s (max_wait_s): {self._queue.in_flight} generations are in flight and "
            f"{self._queue.waiting} wait",
            retry_after=self._queue.retry_after(1),
        )

    # Of grants and places

    def _served(self, entry: Entry, num_tokens: int) -> None:
        self._queue.charge(entry.tenant, output=num_tokens)

    def _leave(self, entry: Entry, *, output: int) -> None:
        self._let_in(self._queue.leave(entry))
        self._meter.tokens.labels(self._label(entry.tenant), "output").inc(output)

    def _settle(self, charge: Charge, *, used: int, served: bool) -> None:
        if charge.limits:
            task = asyncio.get_running_loop().create_task(self._rates.settle(charge, used=used, served=served))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    def _count(self, tenant: Tenant, error: Exception | None) -> None:
        outcome = (
            "served" if error is None else next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "failed")
        )
        self._meter.requests.labels(self._label(tenant), outcome).inc()


def _draining() -> Unavailable:
    return Unavailable("the server is draining and takes no new requests", retry_after=1.0)


def _crowded_out(entry: Entry, retry_after: float) -> QueueFull:
    return QueueFull(
        f"the queue is full (max_waiting), and of all tenants {entry.tenant.name} has the most in it for its weight",
        retry_after=retry_after,
    )
