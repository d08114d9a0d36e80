"""Beside station 5: commands to Redis over connections of redis-py, without what its client adds to them.

redis-py makes, authenticates and parses a connection, finds masters through Sentinels and reads a cluster's map. Its
client is left out: it retries for seconds, and its pool costs more than the call (a GET takes about 75 us of CPU here,
110 through it). So nothing here retries and nothing here has a timeout: whoever calls gives it one (`Deadline`), and a
call that is cancelled closes its connection, since an answer may still come over it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection as UnixConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    InvalidResponse,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .redis_url import RedisAddress

Make = Callable[[], AbstractConnection]
_TICKS = 5


class Deadline:
    """`async with`: TimeoutError behind `seconds`, as `asyncio.timeout`, of a loop that had time for us.

    It runs in ticks, each set when the one before it came. So a loop that was busy for long costs one tick, and an
    answer that waits in the socket is read: how slow we are is not held against Redis.
    """

    def __init__(self, seconds: float) -> None:
        self._tick_s = seconds / _TICKS
        self._left = _TICKS

    async def __aenter__(self) -> None:
        self._timeout = await asyncio.timeout(None).__aenter__()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._tick_s, self._tick)
        else:
            self._timeout.reschedule(self._loop.time())


class Link(Protocol):
    """The way to the server that holds a key."""

    async def call(self, key: bytes, *command: bytes | int | str) -> Any:
        """The bare answer (RESP2). Raises whatever `diagnose` knows; may be cancelled at any time."""
        ...

    async def doubt(self) -> None:
        """Where Redis is may have changed: the next calls find out anew, over new connections."""
        ...

    async def close(self) -> None:
        """Cuts what is under way. Idempotent."""
        ...


class Pool:
    """Connections to one place: as many as there are calls at once, kept for the next ones. No locks: one loop."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._idle: list[AbstractConnection] = []
        self._busy: set[AbstractConnection] = set()
        self._closed = False

    async def call(self, key: bytes, *command: bytes | int | str) -> Any:
        return await self.pipeline(command)

    async def pipeline(self, *commands: tuple[bytes | int | str, ...]) -> Any:
        """The answer to the last one."""
        connection = await self._take()
        try:
            if not connection.is_connected:
                await connection.connect()  # type: ignore[no-untyped-call]
            answer = None
            for command in commands:
                await connection.send_command(*command, check_health=False)
                answer = await connection.read_response(disable_decoding=True)
            return answer
        finally:
            self._busy.discard(connection)
            if connection.is_connected:  # redis-py has cut it wherever an answer is still to come
                if self._closed:
                    await connection.disconnect(nowait=True)
                else:
                    self._idle.append(connection)

    async def _take(self) -> AbstractConnection:
        connection = None
        while connection is None and self._idle:
            connection = self._idle.pop()  # the one used last: the others may go stale
            if not connection.is_connected or await connection.can_read():  # closed by Redis, or an answer too many
                await connection.disconnect(nowait=True)
                connection = None
        if self._closed:
            raise RedisConnectionError("closed")
        connection = connection or self._make()
        self._busy.add(connection)
        return connection

    async def doubt(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def close(self) -> None:
        self._closed = True
        await self.doubt()
        for connection in list(self._busy):
            await connection.disconnect(nowait=True)


class Cluster:
    """A pool for each master, by redis-py's map of the slots, which any of the address's hosts may draw."""

    def __init__(self, address: RedisAddress, patience_s: float) -> None:
        self._options = _options(address)
        share_s = patience_s / (len(address.hosts) + 1)  # one dead host leaves time to ask the next
        options: dict[str, Any] = self._options | _limits(share_s) | {"connection_class": _tcp(address)}
        hosts = [ClusterNode(host, port, **options) for host, port in address.hosts]
        self._map = NodesManager(
            hosts, require_full_coverage=False, connection_kwargs=options, dynamic_startup_nodes=False
        )
        self._tcp = _tcp(address)
        self._pools: dict[str, Pool] = {}
        self._known = False

    async def call(self, key: bytes, *command: bytes | int | str) -> Any:
        if not self._known:
            await self._map.initialize()
            self._known = True
        slot = key_slot(key)
        try:
            return await self._master(slot).call(key, *command)
        except MovedError as moved:
            await self._map.move_slot(moved)
            return await self._master(slot).call(key, *command)
        except AskError as ask:
            there = ClusterNode(ask.host, ask.port, **self._options)
            return await self._pool(there).pipeline(("ASKING",), command)

    def _master(self, slot: int) -> Pool:
        if slot not in self._map.slots_cache:
            raise ClusterDownError("a slot has no master")
        return self._pool(self._map.get_node_from_slot(slot))

    def _pool(self, node: ClusterNode) -> Pool:
        if node.name not in self._pools:
            options = self._options | {"host": node.host, "port": node.port}
            self._pools[node.name] = Pool(lambda: self._tcp(**options))
        return self._pools[node.name]

    async def doubt(self) -> None:
        self._known = False
        for pool in self._pools.values():
            await pool.doubt()

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.close()
        await self._map.aclose("startup_nodes")
        await self._map.aclose()


class Guarded:
    """The master that Sentinels name. They are asked for each new connection."""

    def __init__(self, address: RedisAddress, patience_s: float) -> None:
        tls = address.tls or {}
        login = {"username": address.sentinel_username, "password": address.sentinel_password}
        share_s = patience_s / (len(address.hosts) + 1)
        asking = login | _limits(share_s) | {"driver_info": None, "protocol": 2, "ssl": address.tls is not None} | tls
        self._sentinel = Sentinel(address.hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        # redis-py's pool makes the connections and tells them the master; it never holds one.
        options = _options(address) | {"ssl": address.tls is not None}
        self._masters = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            address.service, self._sentinel, **options
        )
        self._pool = Pool(self._masters.make_connection)

    async def call(self, key: bytes, *command: bytes | int | str) -> Any:
        return await self._pool.call(key, *command)

    async def doubt(self) -> None:
        await self._pool.doubt()

    async def close(self) -> None:
        await self._pool.close()
        await self._sentinel.aclose()


def connect(address: RedisAddress, patience_s: float) -> Link:
    """A link that connects when first used. patience_s: to find out where a key is, shared by the hosts that know."""
    if address.kind == "cluster":
        return Cluster(address, patience_s)
    if address.kind == "sentinel":
        return Guarded(address, patience_s)
    options: dict[str, Any] = _options(address)
    if address.kind == "unix":
        return Pool(lambda: UnixConnection(path=address.path, **options))
    (host, port), tcp = address.hosts[0], _tcp(address)
    return Pool(lambda: tcp(host=host, port=port, **options))


def _tcp(address: RedisAddress) -> type[Connection]:
    return Connection if address.tls is None else SSLConnection


def _limits(seconds: float | None) -> dict[str, Any]:
    return {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
    }


def _options(address: RedisAddress) -> dict[str, Any]:
    """What all connections to Redis are made with. RESP2 needs no greeting; `driver_info` would send one more."""
    return {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "client_name": address.client_name,
        "protocol": 2,
        "driver_info": None,
        **_limits(None),
        **(address.tls or {}),
    }


# What went wrong

UNREACHABLE = frozenset({"timeout", "connection", "auth", "loading", "cluster", "busy", "garbage"})
REFUSED = frozenset({"readonly", "full", "misconf", "denied"})
_CODES = {
    "NOAUTH": "auth",
    "WRONGPASS": "auth",
    "LOADING": "loading",
    "MASTERDOWN": "loading",
    "CLUSTERDOWN": "cluster",
    "MOVED": "cluster",
    "ASK": "cluster",
    "TRYAGAIN": "cluster",
    "BUSY": "busy",
    "READONLY": "readonly",
    "OOM": "full",
    "MISCONF": "misconf",
    "NOREPLICAS": "misconf",
    "NOPERM": "denied",
}
_UNREAD = "Protocol error: unauthenticated"  # Redis 7 does not even read a long call of who has not logged in
_CODE = re.compile(r"(?:^|-)(" + "|".join(_CODES) + r")\b")  # behind a hyphen where Redis 6 quotes it from a script


def diagnose(error: Exception) -> str:
    """The kind of a failed call: one of UNREACHABLE, one of REFUSED, or "script", a call that was wrong in itself.

    UNREACHABLE: no call would be answered. REFUSED: this one was not done, others may be. No text of the server is
    used but its code: it quotes keys and arguments.
    """
    match error:
        case TimeoutError() | RedisTimeoutError():
            return "timeout"
        case AuthenticationError() | AuthenticationWrongNumberOfArgsError():
            return "auth"
        case BusyLoadingError():
            return "loading"
        case MasterNotFoundError():
            return "cluster"
        case RedisClusterException():
            return diagnose(error.__cause__) if isinstance(error.__cause__, Exception) else "cluster"
        case ClusterError() | TryAgainError() | AskError():
            return "cluster"
        case ResponseError():
            code, text = error.status_code or "", str(error)
            if _UNREAD in text:
                return "auth"
            found = _CODE.search(text)
            return _CODES.get(code) or (_CODES[found[1]] if found else "script")
        case InvalidResponse():
            return "garbage"
        case RedisConnectionError() if isinstance(error.__context__, ReadOnlyError):  # as redis-py's Sentinel has it
            return "readonly"
        case OSError() | RedisConnectionError():
            return "connection"
        case _:  # whatever a parser makes of nonsense: ValueError, RecursionError, and the like
            return "garbage"


def system_error(error: BaseException | None) -> str:
    """What the system said, `: Connection refused`, say; empty where it did not. For logs: it quotes no call."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return f": {error.strerror}"
        error = error.__cause__ or error.__context__
    return ""
