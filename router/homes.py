"""Beside station 6: which variant a request with an `Idempotency-Key` went to, so that sent again it goes there again.

The draw alone would send it elsewhere once weights change, or a variant comes or goes; then the kept answer would not
be found, and one that is gone on with could change under its client.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from .config import RouterConfig
from .store import Script, Store, StoreDown

_MAX_NAME = 64  # bytes; longer ones are no name of ours

# What is there already, else what is put there now.
SETTLE = Script("""
local there = redis.call('GET', KEYS[1])
if there then return there end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return ARGV[1]
""")


class Homes:
    """Kept as long as answers are. Where the store is down the draw decides, as it does the first time.

    salt: makes names that nobody else can make (`Keys.salt`).
    """

    def __init__(self, store: Store, *, salt: Callable[..., str], config: RouterConfig) -> None:
        self._store = store
        self._salt = salt
        self._keep_s = max(config.cache_ttl_s, config.flight_keep_s, config.max_timeout_s)

    async def settle(self, scope: str, key: str, drawn: str) -> str:
        """Where a request goes under `key`: where it went, else where it is `drawn` to now. scope: whose key it is."""
        try:
            home = await self._store.run(SETTLE, [self._name(scope, key)], [drawn.encode(), int(self._keep_s)])
        except StoreDown:
            return drawn
        return _read(home) or drawn

    async def find(self, scope: str, key: str) -> str | None:
        """Where it went; None: it went nowhere while there was a choice. Raises StoreDown."""
        return _read(await self._store.get(self._name(scope, key)))

    async def move(self, scope: str, key: str, name: str) -> None:
        """From now on it goes there."""
        with suppress(StoreDown):
            await self._store.set(self._name(scope, key), name.encode(), ttl_s=self._keep_s)

    def _name(self, scope: str, key: str) -> bytes:
        return b"shoal:home:" + self._salt(b"home", scope.encode(), key.encode()).encode()


def _read(value: object) -> str | None:
    if not isinstance(value, bytes) or len(value) > _MAX_NAME:
        return None
    return value.decode("ascii", "replace")
