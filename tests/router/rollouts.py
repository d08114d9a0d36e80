"""One ingress over variants that each say something else, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry

from shoal.router.config import RouterConfig
from shoal.router.headers import VARIANT, read_asks
from shoal.router.homes import SETTLE
from shoal.router.ingress import Ingress
from shoal.router.launch import Launch
from shoal.router.log_cache import LogCache
from shoal.router.meters import CacheMeter
from shoal.router.rollout_config import STABLE, RolloutConfig
from shoal.router.schema import CompletionRequest, parse
from shoal.router.tenant import Tenant

from .fakes import INFO, MODEL, SECRET, FakeBackend, byte_level_text
from .memory_store import MemoryRedis, MemoryStore

ANN = Tenant(name="ann", salt="salt of ann")
CANARY = "canary"


def redis() -> MemoryRedis:
    return MemoryRedis(scripts={SETTLE: settle})


def settle(redis: MemoryRedis, keys: Sequence[bytes], args: Sequence[bytes | int]) -> bytes:
    """What `SETTLE` does."""
    there = redis.get(keys[0])
    if there is None:
        there, ttl_s = args
        assert isinstance(there, bytes)
        redis.set(keys[0], there, float(ttl_s))
    return there


class Told(NamedTuple):
    """An answer: its headers and its text."""

    headers: dict[str, str]
    text: str

    @property
    def variant(self) -> str:
        return self.headers[VARIANT]


class Service:
    """`variants` beside stable, each open and ready, which says its own name; `store` is one that ingresses share."""

    def __init__(
        self, *variants: str, store: MemoryStore | None = None, seed: int = 0, secret: str = "s" * 32, **config: Any
    ) -> None:
        self.config = RouterConfig(served_model_name=(MODEL,), secret=secret, **config)
        self.store = store
        self.backends = {STABLE: said(STABLE)}
        self.ingress = Ingress(
            self.backends[STABLE],
            self.config,
            store=store,
            clock=asyncio.get_running_loop().time,
            rng=random.Random(seed),
        )
        self.open(STABLE)
        for name in variants:
            self.add(name)

    def add(self, name: str, *, digest: str | None = None) -> FakeBackend:
        backend = self.backends[name] = said(name)
        self.ingress.add_variant(name, backend)
        self.open(name, digest=digest)
        return backend

    def open(self, name: str, *, digest: str | None = None) -> None:
        model = self.ingress.part(name)
        assert model is not None
        info, cache = msgspec.structs.replace(INFO, digest=digest or name), None
        if self.store is not None:
            meter = CacheMeter(CollectorRegistry())
            cache = LogCache(self.store, model=info.digest, secret=SECRET, config=self.config, meter=meter)
        model.open(info, byte_level_text(), cache=cache)

    def roll_out(self, **config: Any) -> None:
        self.ingress.roll_out(RolloutConfig(**config))

    async def launch(
        self,
        headers: dict[str, str] | None = None,
        *,
        tenant: Tenant = ANN,
        avoid: frozenset[str] = frozenset(),
        **body: Any,
    ) -> Launch:
        asks = read_asks((name.lower().encode(), value.encode()) for name, value in (headers or {}).items())
        given = {"model": MODEL, "prompt": "hi", "max_tokens": 100, **body}
        return await self.ingress.completion(parse(CompletionRequest, given), tenant, asks, avoid=avoid)

    async def ask(self, headers: dict[str, str] | None = None, *, tenant: Tenant = ANN, **body: Any) -> Told:
        """Raises what ends it."""
        launch = await self.launch(headers, tenant=tenant, **body)
        async with launch.flight:
            text = "".join([piece.text async for pieces in launch.flight for piece in pieces])
            return Told(launch.headers(), text)

    async def who(self, headers: dict[str, str] | None = None, *, tenant: Tenant = ANN, **body: Any) -> str:
        """Which variant answers, and nothing else does."""
        told = await self.ask(headers, tenant=tenant, **body)
        assert told.text == words_of(told.variant)
        return told.variant

    def sample(self, name: str, **labels: str) -> float:
        return self.ingress.metrics.registry.get_sample_value(name, labels) or 0.0


def said(name: str) -> FakeBackend:
    backend = FakeBackend()
    backend.answer = words_of(name)
    return backend


def words_of(name: str) -> str:
    return f"I am {name}."
