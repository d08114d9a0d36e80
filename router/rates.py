"""Station 3, what a tenant may use: requests and tokens a minute, and a budget of tokens over a longer time.

The arithmetic is pure (`Levels`). Where there is a store all ingresses share one account, kept by one script a request
that does the same sums (`_TAKE`); where there is none, or while it is down, each ingress grants the limits by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

import msgspec

from ..runtime.errors import QueueFull
from .store import Script, Store, StoreDown
from .tenant import Tenant

_MINUTE_S = 60.0


class RateLimited(QueueFull):
    """A tenant's own limit. is_final: waiting cannot help, the request is larger than the limit itself."""

    def __init__(
        self, message: str, *, retry_after: float, code: str, headers: Mapping[str, str], is_final: bool
    ) -> None:
        super().__init__(message, retry_after=retry_after, code=code)
        self.headers = headers
        self.is_final = is_final


class Limit(msgspec.Struct, frozen=True):
    """`capacity` in `period_s`. refill "even" is a token bucket; "at_once": all is there again at the period's end."""

    name: Literal["requests", "tokens", "budget"]
    capacity: float
    period_s: float
    refill: Literal["even", "at_once"]
    knob: str


class Level(NamedTuple):
    """What was left of a limit, and when; for one that refills at once: left of the period that began then."""

    left: float
    at: float


def limits_of(tenant: Tenant) -> list[Limit]:
    """Those that the tenant has. A bucket holds a minute's worth, and at least one request."""
    limits = []
    if (rate := tenant.requests_per_minute) is not None:
        capacity = max(1.0, rate)
        limits.append(Limit("requests", capacity, _MINUTE_S * capacity / rate, "even", "requests_per_minute"))
    if (rate := tenant.tokens_per_minute) is not None:
        limits.append(Limit("tokens", rate, _MINUTE_S, "even", "tokens_per_minute"))
    if tenant.token_budget is not None:
        limits.append(Limit("budget", tenant.token_budget, tenant.budget_s, "at_once", "token_budget"))
    return limits


def most_tokens(tenant: Tenant) -> int | None:
    """The most that one request of the tenant can ever be granted, prompt and answers."""
    return min((int(limit.capacity) for limit in limits_of(tenant) if limit.name != "requests"), default=None)


def level_at(limit: Limit, level: Level | None, now: float) -> Level:
    """What is left by now. A clock that was set back refills nothing."""
    if level is None:
        return Level(limit.capacity, now)
    passed = max(0.0, now - level.at)
    if limit.refill == "even":
        return Level(min(limit.capacity, level.left + passed * limit.capacity / limit.period_s), now)
    return Level(limit.capacity, now) if passed >= limit.period_s else Level(min(limit.capacity, level.left), level.at)


def wait_for(limit: Limit, level: Level, amount: float, now: float) -> float:
    """Seconds until `amount` is left, if nothing is taken."""
    if level.left >= amount:
        return 0.0
    if limit.refill == "even":
        return (amount - level.left) * limit.period_s / limit.capacity
    return max(0.0, level.at + limit.period_s - now)


class Taken(msgspec.Struct, frozen=True):
    """granted: all costs were taken, else none. levels: of each limit, behind it."""

    granted: bool
    levels: list[Level]
    now: float


Costs = Sequence[tuple[Limit, float]]


class Books(Protocol):
    """Where the levels are kept."""

    async def take(self, tenant: str, costs: Costs) -> Taken:
        """All or nothing; what costs less than nothing is always granted. Raises StoreDown."""
        ...


class Levels:
    """Of this process alone."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, str], Level] = {}

    async def take(self, tenant: str, costs: Costs) -> Taken:
        return self.taken(tenant, costs, self._clock())

    def taken(self, tenant: str, costs: Costs, now: float) -> Taken:
        """`take`, at a time of the caller's."""
        levels = [level_at(limit, self._levels.get((tenant, limit.name)), now) for limit, _ in costs]
        granted = all(cost <= 0 or level.left >= cost for level, (_, cost) in zip(levels, costs, strict=True))
        if granted:
            pairs = zip(levels, costs, strict=True)
            levels = [Level(min(limit.capacity, left - cost), at) for (left, at), (limit, cost) in pairs]
        for level, (limit, _) in zip(levels, costs, strict=True):
            self._levels[tenant, limit.name] = level
        return Taken(granted, levels, now)


# KEYS[1]: one tenant's levels, "name left at ...". ARGV, of each limit: name, capacity, period, refill, cost.
_TAKE = Script("""
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local known, order, kept = {}, {}, 0
local function is_sane(number)
  return number and math.abs(number) < 1e300
end
for name, left, at in string.gmatch(redis.call('GET', KEYS[1]) or '', '(%a+) (%S+) (%S+)') do
  known[name] = {left = tonumber(left), at = tonumber(at)}
end
local granted = 1
for i = 1, #ARGV, 5 do
  local capacity, period, cost = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 4])
  local level = known[ARGV[i]]
  if not (level and is_sane(level.left) and is_sane(level.at)) then
    level = {left = capacity, at = now}
  end
  local passed = math.max(0, now - level.at)
  if ARGV[i + 3] == 'even' then
    level = {left = math.min(capacity, level.left + passed * capacity / period), at = now}
  elseif passed >= period then
    level = {left = capacity, at = now}
  else
    level.left = math.min(capacity, level.left)
  end
  if cost > 0 and level.left < cost then
    granted = 0
  end
  level.name, level.cost, level.capacity = ARGV[i], cost, capacity
  order[#order + 1] = level
  kept = math.max(kept, period)
end
local words = {}
for _, level in ipairs(order) do
  if granted == 1 then
    level.left = math.min(level.capacity, level.left - level.cost)
  end
  words[#words + 1] = level.name
  words[#words + 1] = string.format('%.17g', level.left)
  words[#words + 1] = string.format('%.17g', level.at)
end
local answer = table.concat(words, ' ')
redis.call('SET', KEYS[1], answer, 'EX', math.ceil(kept) + 1)
return {granted, string.format('%.17g', now), answer}
""")


class SharedLevels:
    """Of all ingresses, in the store and by its clock."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def take(self, tenant: str, costs: Costs) -> Taken:
        args: list[bytes | int] = []
        for limit, cost in costs:
            numbers = (_number(limit.capacity), _number(limit.period_s), limit.refill.encode(), _number(cost))
            args += [limit.name.encode(), *numbers]
        answer = await self._store.run(_TAKE, [b"shoal:rate:{%s}" % tenant.encode()], args)
        try:
            granted, now, words = int(answer[0]), float(answer[1]), bytes(answer[2]).decode().split()
            levels = [Level(float(left), float(at)) for left, at in zip(words[1::3], words[2::3], strict=True)]
        except (TypeError, ValueError, LookupError):
            raise StoreDown("the answer is none of ours") from None
        if len(levels) != len(costs) or not all(map(math.isfinite, (now, *itertools.chain(*levels)))):
            raise StoreDown("the answer is none of ours")
        return Taken(bool(granted), levels, now)


class Charge(msgspec.Struct, frozen=True):
    """What a request was charged with when it came. headers: how the tenant stands since, in OpenAI's names."""

    tenant: str
    limits: list[Limit]
    tokens: int
    books: Books
    headers: dict[str, str]


class Rates:
    """Charges requests with what they may come to, and gives back what they did not."""

    def __init__(self, store: Store, *, clock: Callable[[], float]) -> None:
        """clock: for the levels that are kept here."""
        self._store = store
        self._shared = SharedLevels(store)
        self._local = Levels(clock=clock)
        self._undoing: set[asyncio.Task[None]] = set()

    async def charge(self, tenant: Tenant, *, tokens: int) -> Charge:
        """One request of at most `tokens`, prompt and answers. Where it is cancelled it costs nothing.

        Raises:
            RateLimited: over a limit; with the time until there is room, or final where the limit itself is too small.
        """
        limits = limits_of(tenant)
        if not limits:
            return Charge(tenant.name, limits, tokens, self._local, {})
        costs = _costs(limits, requests=1, tokens=tokens)
        for limit, cost in costs:
            if cost > limit.capacity:
                raise RateLimited(
                    f"the request may come to {tokens} tokens, above {_plain(limit.capacity)}, the whole {limit.knob} "
                    f"of {tenant.name}: shorten the prompt or lower max_tokens",
                    retry_after=limit.period_s, code=_code(limit), headers={}, is_final=True,
                )  # fmt: skip
        taking = asyncio.create_task(self._take(tenant.name, costs))
        try:
            books, taken = await asyncio.shield(taking)
        except asyncio.CancelledError:  # the store may have done it all the same
            undoing = asyncio.create_task(self._undo(taking, tenant.name, costs))
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            raise
        headers = _headers(limits, taken)
        if not taken.granted:
            raise _refusal(tenant, costs, taken, headers)
        return Charge(tenant.name, limits, tokens, books, headers)

    async def settle(self, charge: Charge, *, used: int, served: bool = True) -> None:
        """The request has come to `used` tokens. served: whether it counts as a request at all."""
        if not charge.limits:
            return
        costs = _costs(charge.limits, requests=0 if served else -1, tokens=used - charge.tokens)
        try:
            await charge.books.take(charge.tenant, costs)
        except StoreDown:
            return  # the charge stands: it would be forgotten sooner than it could be put right

    async def _undo(self, taking: asyncio.Task[tuple[Books, Taken]], tenant: str, costs: Costs) -> None:
        books, taken = await taking
        if taken.granted:
            with suppress(StoreDown):
                await books.take(tenant, [(limit, -cost) for limit, cost in costs])

    async def _take(self, tenant: str, costs: Costs) -> tuple[Books, Taken]:
        if self._store.available:
            try:
                return self._shared, await self._shared.take(tenant, costs)
            except StoreDown:
                pass
        return self._local, await self._local.take(tenant, costs)


def _costs(limits: Sequence[Limit], *, requests: int, tokens: int) -> list[tuple[Limit, float]]:
    return [(limit, requests if limit.name == "requests" else tokens) for limit in limits]


def _refusal(tenant: Tenant, costs: Costs, taken: Taken, headers: Mapping[str, str]) -> RateLimited:
    """Names the limit that is the longest to wait for."""
    waits = [wait_for(limit, level, cost, taken.now) for (limit, cost), level in zip(costs, taken.levels, strict=True)]
    wait = max(waits)
    limit, cost = costs[waits.index(wait)]
    left = max(0, math.floor(taken.levels[waits.index(wait)].left))
    unit = "requests" if limit.name == "requests" else "tokens"
    return RateLimited(
        f"{tenant.name} may use {_plain(limit.capacity)} {unit} in {_plain(limit.period_s)} s ({limit.knob}); {left} "
        f"are left and this request needs {_plain(cost)}: there is room in {_duration(wait)}",
        retry_after=max(0.001, wait), code=_code(limit), headers=headers, is_final=False,
    )  # fmt: skip


def _code(limit: Limit) -> str:
    return "insufficient_quota" if limit.name == "budget" else "rate_limit_exceeded"


def _headers(limits: Sequence[Limit], taken: Taken) -> dict[str, str]:
    headers = {}
    for limit, level in zip(limits, taken.levels, strict=True):
        headers[f"x-ratelimit-limit-{limit.name}"] = str(int(limit.capacity))
        headers[f"x-ratelimit-remaining-{limit.name}"] = str(max(0, math.floor(level.left)))
        headers[f"x-ratelimit-reset-{limit.name}"] = _duration(wait_for(limit, level, limit.capacity, taken.now))
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s, 1h30m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"


def _plain(value: float) -> str:
    """For people: 0.5, 30, 50000000."""
    return f"{value:.15g}"


def _number(value: float) -> bytes:
    return repr(float(value)).encode()
