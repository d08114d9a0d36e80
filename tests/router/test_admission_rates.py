"""Rates and budgets: the arithmetic, on a clock of its own; and that Redis does the same sums."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.http import error_headers
from shoal.router.rates import Level, Levels, Limit, RateLimited, Rates, SharedLevels, Taken, level_at, limits_of
from shoal.router.store import NoStore, Script, StoreDown
from shoal.router.tenant import Tenant


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def tenant(**fields: object) -> Tenant:
    return Tenant(name="t", salt="", **fields)  # type: ignore[arg-type]


def charge(rates: Rates, owner: Tenant, tokens: int = 1) -> dict[str, str]:
    return asyncio.run(rates.charge(owner, tokens=tokens)).headers


def refused(rates: Rates, owner: Tenant, tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        charge(rates, owner, tokens)
    return caught.value


def test_who_has_no_limits_has_no_account() -> None:
    assert charge(Rates(NoStore(), clock=Clock()), tenant(), 10**9) == {}


def test_requests_a_minute() -> None:
    clock = Clock()
    rates, owner = Rates(NoStore(), clock=clock), tenant(requests_per_minute=3)
    assert charge(rates, owner) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20s",
    }
    charge(rates, owner), charge(rates, owner)
    error = refused(rates, owner)
    assert error.retry_after == pytest.approx(20)
    assert error_headers(error)["retry-after"] == "20"
    assert error_headers(error)["x-should-retry"] == "true"
    assert error_headers(error)["x-ratelimit-remaining-requests"] == "0"
    clock.now += 19.9
    refused(rates, owner)
    clock.now += 0.2
    charge(rates, owner)


def test_less_than_one_request_a_minute() -> None:
    clock = Clock()
    rates, owner = Rates(NoStore(), clock=clock), tenant(requests_per_minute=0.5)
    charge(rates, owner)
    assert refused(rates, owner).retry_after == pytest.approx(120)


def test_a_budget_is_whole_again_at_the_periods_end_and_not_before() -> None:
    clock = Clock()
    rates, owner = Rates(NoStore(), clock=clock), tenant(token_budget=100, budget_s=3600)
    charge(rates, owner, 70)
    clock.now += 3599
    error = refused(rates, owner, 31)
    assert error.code == "insufficient_quota"
    assert error.retry_after == pytest.approx(1)
    assert "30 are left" in str(error)
    clock.now += 1
    assert charge(rates, owner, 100)["x-ratelimit-reset-budget"] == "1h0m0s"


def test_large_numbers_are_written_out_and_long_waits_in_hours() -> None:
    rates, owner = Rates(NoStore(), clock=Clock()), tenant(token_budget=50_000_000, budget_s=86_400)
    charge(rates, owner, 50_000_000)
    said = str(refused(rates, owner, 1_234_567))
    assert "may use 50000000 tokens in 86400 s (token_budget); 0 are left" in said
    assert "needs 1234567: there is room in 24h0m0s" in said


def test_what_never_fits_is_final() -> None:
    error = refused(Rates(NoStore(), clock=Clock()), tenant(tokens_per_minute=50), 51)
    assert "51 tokens, above 50, the whole tokens_per_minute" in str(error)
    headers = error_headers(error)
    assert headers["x-should-retry"] == "false"


def test_all_or_nothing() -> None:
    rates, owner = Rates(NoStore(), clock=Clock()), tenant(requests_per_minute=5, tokens_per_minute=50)
    charge(rates, owner, 50)
    refused(rates, owner, 1)
    assert refused(rates, owner, 1).headers["x-ratelimit-remaining-requests"] == "4"


def test_tenants_have_accounts_of_their_own() -> None:
    rates = Rates(NoStore(), clock=Clock())
    for name in ("a", "b"):
        charge(rates, Tenant(name=name, salt="", requests_per_minute=1))


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 30)), max_size=60),
    st.sampled_from(["even", "at_once"]),
)
def test_no_period_grants_more_than_twice_the_capacity(moves: list[tuple[float, int]], refill: Any) -> None:
    """A full bucket and what flows in meanwhile; of a budget, the ends of one period and the start of the next."""
    limit = Limit("tokens", 60, 60, refill, "x")
    levels, now = Levels(clock=Clock()), 0.0
    granted: list[tuple[float, int]] = []
    for pause, cost in moves:
        now += pause
        if levels.taken("t", [(limit, cost)], now).granted:
            granted.append((now, cost))
    for start, _ in granted:
        assert sum(cost for at, cost in granted if start <= at < start + 60) <= 120 + 1e-6


def test_a_clock_that_goes_back_refills_nothing() -> None:
    for refill in ("even", "at_once"):
        limit = Limit("tokens", 60, 60, refill, "x")  # type: ignore[arg-type]
        assert level_at(limit, Level(5.0, 1000.0), 900.0).left == 5.0


class Redis:
    """A real server's EVAL, as a `Store`."""

    def __init__(self, url: str) -> None:
        import redis

        self.client = redis.Redis(unix_socket_path=url)
        self.available = True
        self.is_down = False

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        if self.is_down:
            raise StoreDown("down")
        return self.client.eval(script.source, len(keys), *keys, *args)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    redis_client = pytest.importorskip("redis")
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server")
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        path = f"{folder}/s"
        command = [server, "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            store, deadline = Redis(path), time.monotonic() + 20
            while True:
                try:
                    store.client.ping()
                    break
                except redis_client.ConnectionError:
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.02)
            yield store
        finally:
            process.terminate()
            process.wait(10)


def same(one: Taken, other: Taken) -> None:
    assert one.granted == other.granted
    for left, right in zip(one.levels, other.levels, strict=True):
        assert left == pytest.approx(right, rel=1e-12, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-20, 60), max_size=20),
    st.sampled_from([
        {"requests_per_minute": 600.0}, {"tokens_per_minute": 1e5, "token_budget": 100, "budget_s": 0.01},
        {"requests_per_minute": 0.3, "tokens_per_minute": 90.0, "token_budget": 200},
    ]),
)  # fmt: skip
def test_redis_does_the_same_sums(redis: Any, costs: list[int], fields: dict[str, float]) -> None:
    shared, pure = SharedLevels(redis), Levels(clock=Clock())
    redis.client.flushall()
    limits = limits_of(tenant(**fields))
    for cost in costs:
        asked = [(limit, cost if limit.name != "requests" else 1) for limit in limits]
        there = asyncio.run(shared.take("t", asked))
        same(pure.taken("t", asked, there.now), there)
    assert all(redis.client.ttl(key) > 0 for key in redis.client.scan_iter())


def test_ingresses_share_one_account_and_each_has_its_own_while_redis_is_down(redis: Any) -> None:
    redis.client.flushall()
    owner = tenant(requests_per_minute=2)
    one, other = Rates(redis, clock=Clock()), Rates(redis, clock=Clock())
    charge(one, owner), charge(other, owner)
    refused(one, owner), refused(other, owner)
    redis.is_down = True
    for rates in (one, other):
        charge(rates, owner), charge(rates, owner)
        refused(rates, owner)
    redis.is_down = False
    refused(one, owner)


@pytest.mark.parametrize("value", [b"requests x y \xff\x00 tokens", b"requests -inf 1", b"requests nan nan"])
def test_garbage_in_redis_is_no_level(redis: Any, value: bytes) -> None:
    redis.client.set("shoal:rate:{t}", value)
    assert charge(Rates(redis, clock=Clock()), tenant(requests_per_minute=2))["x-ratelimit-remaining-requests"] == "1"


class Scripted(NoStore):
    """Answers every script alike, once it is let."""

    available = True

    def __init__(self, answer: object = None) -> None:
        self.answer = answer
        self.let = asyncio.Event()
        self.asked: list[list[bytes | int]] = []

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        self.asked.append(list(args))
        await self.let.wait()
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [None, 7, b"OK", [], [1, b"x", b""], [1, b"1", b""], [0, b"1", b"requests -inf 1"], [1, b"nan", b"requests 1 1"]],
)
def test_a_redis_that_lies_fails_no_request(answer: object) -> None:
    store = Scripted(answer)
    store.let.set()
    assert charge(Rates(store, clock=Clock()), tenant(requests_per_minute=2))["x-ratelimit-remaining-requests"] == "1"


def test_who_leaves_while_redis_is_asked_pays_nothing() -> None:
    async def scenario() -> list[list[bytes | int]]:
        store = Scripted([1, b"1", b"requests 4 1 tokens 550 1"])
        rates = Rates(store, clock=Clock())
        asking = asyncio.create_task(rates.charge(tenant(requests_per_minute=5, tokens_per_minute=600), tokens=50))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        store.let.set()
        for _ in range(5):
            await asyncio.sleep(0)
        return store.asked

    asked = asyncio.run(scenario())
    assert [[args[4], args[9]] for args in asked] == [[b"1.0", b"50.0"], [b"-1.0", b"-50.0"]]
