"""Beside station 5: what the router asks of Redis, in few words, so that one place knows how Redis fails.

Every call is short and fails in one way, `StoreDown`, whatever happened: down, slow, full, read-only, refused, or the
breaker is open and nobody was asked. No caller retries, and none lets a request fail of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec


class StoreDown(Exception):
    """The store did not answer as it should, or was not asked. Says why, for our log alone."""


class StoreAbsent(StoreDown):
    """There is no store, and there will be none: to ask again is no use."""


class Script(msgspec.Struct, frozen=True):
    """Lua that Redis runs as one step: shipped with us, sent by its digest once it is known there."""

    source: str


class Entry(msgspec.Struct, frozen=True):
    """One entry of a stream: `position` is the first part of its id, `<position>-0`."""

    position: int
    value: bytes


class Store(Protocol):
    """Bytes under keys. Keys of one call lie in one slot of a cluster: they share a `{hash tag}`."""

    @property
    def available(self) -> bool:
        """Whether it is worth a call: False where there is no store, or while the breaker is open."""
        ...

    async def get(self, key: bytes) -> bytes | None:
        """Raises StoreDown."""
        ...

    async def set(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        """Raises StoreDown: also where it is full or read-only."""
        ...

    async def delete(self, *keys: bytes) -> None:
        """Raises StoreDown."""
        ...

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        """The script's answer. Raises StoreDown."""
        ...

    async def read(self, stream: bytes, *, after: int, wait_s: float) -> list[Entry]:
        """Entries behind `<after>-0`, waiting up to `wait_s` for the first one; empty where none came.

        Waiting is not slowness: it does not count against the store. Raises StoreDown.
        """
        ...

    async def close(self) -> None:
        """Idempotent."""
        ...


class NoStore:
    """The null store: never there."""

    available = False

    async def get(self, key: bytes) -> bytes | None:
        raise StoreAbsent("there is no store")

    async def set(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        raise StoreAbsent("there is no store")

    async def delete(self, *keys: bytes) -> None:
        raise StoreAbsent("there is no store")

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        raise StoreAbsent("there is no store")

    async def read(self, stream: bytes, *, after: int, wait_s: float) -> list[Entry]:
        raise StoreAbsent("there is no store")

    async def close(self) -> None:
        return
