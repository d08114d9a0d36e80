"""Beside station 6: ingresses tell each other which variants they took back, through the store, within a second or two.

A verdict lies under a name made of all that it is on: variant, model, weight and bounds. So one on another rollout is
not found, and nobody without the secret can make one. Without the store each ingress judges by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from .model import Model
from .rollback import Bound, Charge, Court, Verdict
from .store import Store, StoreDown

POLL_S = 1.0
_KEEP_S = 30 * 86_400.0


class Bulletin:
    """Where one ingress's court posts its verdicts, and reads those of the others.

    find: a variant by its name; None where there is none. salt: makes names that nobody else can make (`Keys.salt`).
    """

    def __init__(
        self, store: Store, court: Court, *, find: Callable[[str], Model | None], salt: Callable[..., str]
    ) -> None:
        self._store = store
        self._salt = salt
        self._court = court
        self._find = find
        self._known: dict[str, bytes] = {}  # variant -> where the verdict on it lies
        self._void: set[bytes] = set()  # where verdicts lie that are to be withdrawn
        self._num_forgotten = 0
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """While anybody is on trial. Idempotent."""
        if self._task is None and self._is_needed:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    def forget(self, variant: str) -> None:
        """The verdict on it is void, for all ingresses: it is another one from now on."""
        self._num_forgotten += 1
        if variant in self._known:
            self._void.add(self._known.pop(variant))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while self._is_needed:
            with suppress(StoreDown):
                await self.exchange()
            await asyncio.sleep(POLL_S)
        self._task = None

    async def exchange(self) -> None:
        """Withdraw verdicts that are void, post our own, hear those of others. Raises StoreDown."""
        charges = self._court.charges
        names = {name: self._name(name, charge) for name, charge in charges.items()}
        for variant in list(self._known):
            if names.get(variant) != self._known[variant]:
                self.forget(variant)
        for void in list(self._void):
            await self._store.delete(void)
            self._void.discard(void)
        for variant, name in names.items():
            if name is None or variant in self._known:
                continue
            verdict = self._court.verdict(variant)
            if verdict is not None:
                await self._store.set(name, verdict.bound.encode(), ttl_s=_KEEP_S)
                self._known[variant] = name
            else:
                await self._hear(variant, name)

    @property
    def _is_needed(self) -> bool:
        return bool(self._court.charges or self._known or self._void)

    async def _hear(self, variant: str, name: bytes) -> None:
        asked = self._num_forgotten, self._court.charges.get(variant)
        value = await self._store.get(name)
        if asked != (self._num_forgotten, self._court.charges.get(variant)):  # the answer is to another question
            return
        if value in (b"error_rate", b"ttft"):
            bound: Bound = "ttft" if value == b"ttft" else "error_rate"
            words = f"another ingress has seen it cross its bound (rollback: {bound})"
            self._court.hear(variant, Verdict(bound, words, is_own=False))
            self._known[variant] = name

    def _name(self, variant: str, charge: Charge) -> bytes | None:
        """None while the variant is not there: nobody knows then what it computes."""
        model = self._find(variant)
        if model is None or not model.is_open:
            return None
        parts = variant.encode(), model.info.digest.encode(), charge.fingerprint()
        return b"shoal:rollback:" + self._salt(b"rollback", *parts).encode()
