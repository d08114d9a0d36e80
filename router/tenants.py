"""Beside station 3: who owns which key, by the config, or by records that `shoal keys put` has left in the store.

A key is looked up by its *name*, an HMAC of its digest under the secret. Whoever times lookups learns how names
compare, and can choose no key by its name; a match is confirmed by comparing digests in constant time. So a lookup
takes as long for thousands of keys as for one. A record is sealed under its name: who can write to the store, but does
not know the secret, can neither make a key nor change what one may, nor put one's record under another.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pydantic import ValidationError

from ..runtime.errors import Unavailable
from .config import TenantConfig
from .config import digest_of as digest_of  # noqa: PLC0414 (told on)
from .store import Store, StoreDown
from .tenant import Tenant

KEY_PREFIX = b"shoal:key:"
_TAG_BYTES = 32
_MAX_RECORD = 4096
_KNOWN_S, _UNKNOWN_S = 30.0, 5.0  # how long the store's answer is believed: so long a key lives on when it is deleted
_OUTAGE_S = 3600.0  # and so much longer while the store is down
_MAX_REMEMBERED = 4096
_RETRY_S = 1.0
Value = TypeVar("Value")


class Seals:
    """What only the secret's holder can make."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def salt(self, *parts: bytes) -> str:
        """Equal for equal parts: the root of a tenant's block names and cache keys."""
        return self._mac(*parts).hex()

    def name(self, digest: bytes) -> bytes:
        """Of a key, by its SHA-256 digest: where its record lies in the store."""
        return KEY_PREFIX + self._mac(b"shoal key name", digest).hex().encode()

    def seal(self, name: bytes, record: bytes) -> bytes:
        """The record as it is stored under `name`."""
        return self._mac(b"shoal key record", name, record) + record

    def open(self, name: bytes, value: bytes) -> bytes | None:
        """The record; None where it was not sealed under this name and secret."""
        tag, record = value[:_TAG_BYTES], value[_TAG_BYTES:]
        return record if hmac.compare_digest(tag, self._mac(b"shoal key record", name, record)) else None

    def _mac(self, *parts: bytes) -> bytes:
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._secret, message, "sha256")


def name_of(key: str, seals: Seals) -> bytes:
    """Where the key's record lies in the store."""
    return seals.name(hashlib.sha256(key.encode()).digest())


def tenant_of(config: TenantConfig, seals: Seals) -> Tenant:
    """The tenant as the stations know it. Its salt is of its name: all its keys share their prefixes."""
    fields = config.model_dump(exclude={"keys"})
    return Tenant(salt=seals.salt(b"tenant", config.name.encode()), **fields)


def record_of(config: TenantConfig) -> bytes:
    """What is stored for a key of this tenant."""
    return config.model_dump_json(exclude={"keys"}, exclude_defaults=True).encode()


class Vault(Protocol):
    """Keys beyond the config's."""

    async def find(self, name: bytes) -> TenantConfig | None:
        """Whose key has this name; None: nobody's.

        Raises:
            Unavailable: it cannot be known now. The key may be good, so it is neither let in nor called wrong.
        """
        ...


class NoVault:
    """The config's keys are all there are."""

    async def find(self, name: bytes) -> TenantConfig | None:
        return None


class StoredKeys:
    """Keys in the store. What it says is believed for a short while; of keys it knew for longer while it is down, since
    no request fails of Redis. One that was deleted before may live on for as long."""

    def __init__(self, store: Store, *, seals: Seals, clock: Callable[[], float]) -> None:
        self._store = store
        self._seals = seals
        # Apart, so that whoever tries keys crowds out nobody who has one.
        self._known = _Remembered[TenantConfig](_KNOWN_S, clock=clock)
        self._unknown = _Remembered[None](_UNKNOWN_S, clock=clock)

    async def find(self, name: bytes) -> TenantConfig | None:
        for remembered in (self._known, self._unknown):
            if name in remembered:
                return remembered[name]
        try:
            value = await self._store.get(name)
        except StoreDown:
            if (last := self._known.last(name, _OUTAGE_S)) is not None:
                return last
            raise Unavailable(
                "the API key is none of the config's, and the store that may know it does not answer",
                retry_after=_RETRY_S,
            ) from None
        config = None if value is None else self._read(name, value)
        if config is None:
            self._unknown[name] = None
            self._known.forget(name)
        else:
            self._known[name] = config
        return config

    def _read(self, name: bytes, value: bytes) -> TenantConfig | None:
        record = self._seals.open(name, value) if len(value) <= _MAX_RECORD else None
        try:
            return None if record is None else TenantConfig.model_validate_json(record)
        except ValidationError:  # of a version that knew other fields
            return None


class _Remembered(Generic[Value]):
    """The last answers, each for a while, not more than so many."""

    def __init__(self, keep_s: float, *, clock: Callable[[], float]) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, Value]] = OrderedDict()  # oldest first

    def __contains__(self, name: bytes) -> bool:
        entry = self._entries.get(name)
        return entry is not None and self._clock() < entry[0]

    def __getitem__(self, name: bytes) -> Value:
        return self._entries[name][1]

    def last(self, name: bytes, longer_s: float) -> Value | None:
        """As if each were kept so much longer."""
        until, value = self._entries.get(name, (-math.inf, None))
        return value if self._clock() < until + longer_s else None

    def forget(self, name: bytes) -> None:
        self._entries.pop(name, None)

    def __setitem__(self, name: bytes, value: Value) -> None:
        self.forget(name)
        self._entries[name] = self._clock() + self._keep_s, value
        while len(self._entries) > _MAX_REMEMBERED:
            self._entries.popitem(last=False)
