"""What ingresses tell each other of variants, over a real redis-server: where keys went, and who was taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shoal.router.config import RouterConfig
from shoal.router.homes import Homes
from shoal.router.ingress import Ingress
from shoal.router.redis_store import RedisStore
from shoal.router.rollout_config import STABLE, RollbackConfig, RolloutConfig

from ..redis_servers import RedisServer, needs_redis
from .fakes import INFO, MODEL, byte_level_text
from .redis_stores import opened, until
from .rollouts import CANARY, said

pytestmark = needs_redis
CONFIG = RouterConfig(served_model_name=(MODEL,), secret="s" * 32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder: Path = tmp_path_factory.mktemp("redis")
    with RedisServer(folder) as running:
        yield running


def test_a_key_keeps_its_home(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.unix_url) as one, opened(server.unix_url) as other:
            here, there = (Homes(each.store, salt=salt, config=CONFIG) for each in (one, other))
            assert await here.find("ann", "k") is None
            assert await here.settle("ann", "k", CANARY) == CANARY
            assert await there.settle("ann", "k", STABLE) == CANARY
            assert await there.find("ann", "k") == CANARY
            assert await there.find("bob", "k") is None
            await there.move("ann", "k", STABLE)
            assert await here.settle("ann", "k", CANARY) == STABLE

    asyncio.run(scenario())


def salt(*parts: bytes) -> str:
    return b"-".join(parts).decode()


def test_a_verdict_is_heard_and_withdrawn(server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(server.unix_url) as one, opened(server.unix_url) as other:
            here, there = made = [ingress(each.store) for each in (one, other)]
            for each in made:
                each.roll_out(rollout(1))
            court = here.variants.court
            court.fared(CANARY, failed=True, ttft_s=None)
            assert court.verdict(CANARY) is not None
            await until(lambda: there.variants.court.verdict(CANARY), "the other ingress to hear of it")
            for each in made:
                each.roll_out(rollout(2))
            await until(lambda: not server.ask("KEYS", "shoal:rollback:*"), "the verdict to be withdrawn")
            assert there.variants.court.verdict(CANARY) is None
            for each in made:
                await each.drain(0.0)

    asyncio.run(scenario())


def ingress(store: RedisStore) -> Ingress:
    made = Ingress(said(STABLE), CONFIG, store=store)
    made.open(INFO, byte_level_text())
    made.add_variant(CANARY, said(CANARY)).open(msgspec.structs.replace(INFO, digest="canary"), byte_level_text())
    return made


def rollout(weight: float) -> RolloutConfig:
    return RolloutConfig(weights={STABLE: 1, CANARY: weight}, rollback=RollbackConfig(min_requests=1))
