"""Beside station 5: one log in the store: a value when it is finished, and until then a stream with one leader.

Keys of one log share a hash tag. `v` is the finished log, `s` the stream, `l` the lease: the leader's name, gone when
it is silent for too long, and `f` says that some other ingress follows. Entries are numbered 1, 2, 3...: entry n has
the id `n-0`, and whoever appends says which one is the last, so a leader that was replaced is refused by number as
well as by name.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .config import RouterConfig
from .log_value import Kept, Part, Seal, Unreadable
from .meters import CacheMeter
from .store import Script, Store, StoreDown

LINGER_S = 5.0  # a finished stream stays so long for those who still read it; newcomers find the value

_LAST = """
local function last(stream)
  local entries = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
  if #entries == 0 then return 0 end
  return tonumber(string.match(entries[1][1], '^%d+'))
end
"""
# The finished log; or where its leader is; or the lease, and all that an earlier leader left.
OPEN = Script(
    _LAST
    + """
local value_key, stream, lease, followers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, lease_ms, keep_ms, follow_ms, head = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local after, only_if_there = tonumber(ARGV[6]), ARGV[7] == '1'
local value = redis.call('GET', value_key)
if value then return {'value', value} end
local n = last(stream)
local leader = redis.call('GET', lease)
if leader and leader ~= me then
  redis.call('SET', followers, '1', 'PX', follow_ms)
  return {'tail', n}
end
if n == 0 and only_if_there then return {'none'} end
redis.call('SET', lease, me, 'PX', lease_ms)
redis.call('XADD', stream, (n + 1) .. '-0', 'p', head)
redis.call('PEXPIRE', stream, keep_ms)
if n < after then after = 0 end
return {'lead', n + 1, redis.call('XRANGE', stream, (after + 1) .. '-0', '+')}
"""
)
# One entry behind the last one, the finished log, or neither; the lease is renewed, or given up where its time is 0.
# A lease that nobody took since it ran out is still its leader's.
APPEND = Script(
    _LAST
    + """
local value_key, stream, lease, followers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, lease_ms, keep_ms = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local expected, number, part, value, ttl_ms = tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local leader = redis.call('GET', lease)
if leader and leader ~= me then return {'taken'} end
if lease_ms > 0 then redis.call('SET', lease, me, 'PX', lease_ms) else redis.call('DEL', lease) end
local n = last(stream)
if n ~= expected then return {'moved', n, redis.call('XRANGE', stream, (expected + 1) .. '-0', '+')} end
if #part > 0 then redis.call('XADD', stream, number .. '-0', 'p', part) end
if #value > 0 then redis.call('SET', value_key, value, 'PX', ttl_ms) end
redis.call('PEXPIRE', stream, keep_ms)
if redis.call('EXISTS', followers) == 1 and redis.call('EXISTS', value_key) == 0 then return {'ok', 1} end
return {'ok', 0}
"""
)
# "I read it." Says whether it has a leader, and the last entry's number.
FOLLOW = Script(
    _LAST
    + """
redis.call('SET', KEYS[4], '1', 'PX', ARGV[1])
return {redis.call('EXISTS', KEYS[3]), last(KEYS[2])}
"""
)


class Opened(msgspec.Struct, frozen=True):
    """kept: the log is finished. leads: the lease is ours; `parts` is what the stream had. Neither: another one leads.

    is_there: somebody has begun it, as far as the store said. may_be_there: it could not be asked just now.
    """

    kept: Kept | None = None
    leads: bool = False
    is_there: bool = True
    may_be_there: bool = False
    parts: list[Part] = []


class Appended(msgspec.Struct, frozen=True):
    """taken: another one leads now; nothing was written. wanted: some other ingress follows.

    missed: nothing was written, for these entries are behind the last one that we know of.
    """

    taken: bool = False
    wanted: bool = False
    missed: list[Part] | None = None


class LogStore:
    """What all logs of one ingress share: the store, the seal, and how long things last."""

    def __init__(self, store: Store, seal: Seal, *, config: RouterConfig, meter: CacheMeter) -> None:
        self.store = store
        self.seal = seal
        self.meter = meter
        self.beat_s = config.flight_lease_s / 3
        self.lease_ms = int(config.flight_lease_s * 1000)
        self.follow_ms = int(config.flight_lease_s * 2000 / 3)  # two beats
        self.keep_ms = int(config.flight_keep_s * 1000)
        self.ttl_s = config.cache_ttl_s
        self.limit_s = config.redis_timeout_s
        self.patience_s = config.resume_wait_s

    def link(self, name: bytes, *, owner: str) -> Link:
        return Link(self, name, owner=owner)


class Link:
    """One reader's or leader's view of one log: it knows the last entry that it read or wrote.

    Everything here raises StoreDown and nothing else: also where the stream holds what is not ours. owner: a name of
    its own.
    """

    def __init__(self, shared: LogStore, name: bytes, *, owner: str) -> None:
        base = b"shoal:{%b}:" % name.hex().encode()
        self._value, self._stream = base + b"v", base + b"s"
        self._keys = (self._value, self._stream, base + b"l", base + b"f")
        self._shared = shared
        self._store = shared.store
        self._seal = shared.seal
        self._owner = owner.encode()
        self._position = 0  # of the last entry read or written: numbers only grow, even where the store lost some
        self._last = 0  # of the stream's last entry as a leader knows it

    async def get(self) -> Kept | None:
        """The finished log. What is not ours is none, and goes."""
        data = await self._store.get(self._value)
        if data is None:
            return None
        try:
            return self._seal.unpack(self._value, data)
        except Unreadable:
            self._shared.meter.rejected.labels("unreadable").inc()
            await self._store.delete(self._value)
            return None

    async def open(self, head: Part, *, only_if_there: bool) -> Opened:
        """Take the lead, behind `head`, unless there is a finished log or a leader.

        only_if_there: do not begin a log that nobody has begun.
        """
        shared = self._shared
        packed = self._seal.pack_part(self._stream, head)
        args = (shared.lease_ms, shared.keep_ms, shared.follow_ms, packed, self._position, int(only_if_there))
        kind, *rest = await self._run(OPEN, self._owner, *args)
        if kind == b"value":
            return Opened(kept=self._read_value(rest[0]))
        if kind == b"none":
            return Opened(is_there=False)
        if kind == b"tail":
            self._rewind_if_lost(rest[0])
            return Opened()
        self._position = self._last = rest[0]
        try:
            return Opened(leads=True, is_there=rest[0] > 1, parts=self._parts(rest[1]))
        except StoreDown:  # the lease is ours, so what is in our way may go
            await self._store.delete(self._stream)
            return Opened(leads=True, is_there=False)

    async def append(self, part: Part | None) -> Appended:
        """Write one entry, or nothing, and stay the leader."""
        return await self._append(part, lease_ms=self._shared.lease_ms)

    async def give_up(self, part: Part) -> None:
        """The last entry of this leader, who leaves a log that is not finished."""
        await self._append(part, lease_ms=0)

    async def finish(self, part: Part, value: bytes | None) -> Appended:
        """The log's last entry, and its value where it may be stored."""
        keep_ms = self._shared.keep_ms if value is None else int(LINGER_S * 1000)
        return await self._append(part, lease_ms=0, keep_ms=keep_ms, value=value or b"")

    async def put(self, value: bytes) -> None:
        """The finished log, whoever leads."""
        await self._store.set(self._value, value, ttl_s=self._shared.ttl_s)

    def pack(self, kept: Kept) -> bytes | None:
        """None where it is larger than may be stored."""
        return self._seal.pack(self._value, kept)

    async def read(self, wait_s: float) -> list[Part]:
        """Entries behind the last one that was read."""
        entries = await self._store.read(self._stream, after=self._position, wait_s=wait_s)
        if entries:
            self._position = entries[-1].position
        return [self._read_part(entry.value) for entry in entries]

    async def follow(self) -> bool:
        """Tell the leader that somebody reads; whether there is one."""
        led, last = await self._run(FOLLOW, self._shared.follow_ms)
        self._rewind_if_lost(last)
        return bool(led)

    async def _append(
        self, part: Part | None, *, lease_ms: int, keep_ms: int | None = None, value: bytes = b""
    ) -> Appended:
        shared = self._shared
        packed = b"" if part is None else self._seal.pack_part(self._stream, part)
        times = (lease_ms, shared.keep_ms if keep_ms is None else keep_ms)
        numbers = (self._last, self._position + 1)
        reply = await self._run(APPEND, self._owner, *times, *numbers, packed, value, int(shared.ttl_s * 1000))
        if reply[0] == b"taken":
            return Appended(taken=True)
        if reply[0] == b"moved":
            self._last = reply[1]
            self._position = max(self._position, self._last)
            return Appended(missed=self._parts(reply[2]))
        if part is not None:
            self._position += 1
            self._last = self._position
        return Appended(wanted=bool(reply[1]))

    def _rewind_if_lost(self, last: int) -> None:
        """Where the store lost the stream and it was begun anew, it is read again, and held against what is known."""
        if last < self._position:
            self._position = 0

    def _parts(self, entries: Any) -> list[Part]:
        return [self._read_part(fields[1]) for _, fields in entries]

    def _read_part(self, data: bytes) -> Part:
        try:
            return self._seal.unpack_part(self._stream, data)
        except Unreadable as error:
            raise self._reject(error) from error

    def _read_value(self, data: bytes) -> Kept:
        try:
            return self._seal.unpack(self._value, data)
        except Unreadable as error:
            raise self._reject(error) from error

    def _reject(self, error: Unreadable) -> StoreDown:
        self._shared.meter.rejected.labels("unreadable").inc()
        return StoreDown(str(error))

    async def _run(self, script: Script, *args: bytes | int) -> Any:
        return await self._store.run(script, self._keys, args)
