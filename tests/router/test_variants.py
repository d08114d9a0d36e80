"""Which variant answers: shares, what sticks, what moves, and what may be asked for."""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shoal.router.homes import Homes
from shoal.router.log_key import LogKeys
from shoal.router.rollout_config import STABLE, RolloutConfig
from shoal.router.tenant import Tenant
from shoal.router.variants import Variants, order_of
from shoal.runtime.errors import InvalidRequest, LogLost, Unavailable

from .cache_fakes import play
from .fakes import INFO, MODEL, FakeBackend, Server, byte_level_text
from .memory_store import MemoryStore
from .rollouts import ANN, CANARY, Service, redis, said, words_of

SECRET = b"k" * 32
POINTS = [b"%d" % number for number in range(20_000)]


def gone(request: object, event: int) -> None:
    """Interferes with a backend."""
    raise Unavailable("the replica was gone before it began")


def owners(weights: dict[str, float], secret: bytes = SECRET) -> list[str]:
    return [order_of(weights, point, secret=secret)[0] for point in POINTS]


# The choice


@pytest.mark.parametrize(
    "weights", [{"a": 95, "b": 5}, {"a": 1, "b": 1, "c": 1}, {"a": 0.2, "b": 50, "c": 3, "d": 0.002}]
)
def test_each_takes_its_share(weights: dict[str, float]) -> None:
    counts, total = Counter(owners(weights)), sum(weights.values())
    chi_square = 0.0
    for name, weight in weights.items():
        expected = len(POINTS) * weight / total
        chi_square += (counts[name] - expected) ** 2 / expected
    assert chi_square < 16.3, counts  # three degrees of freedom at most: one in a thousand by chance


def test_who_comes_next_takes_by_weight_too() -> None:
    """What is left out leaves its points to the others as their weights are."""
    weights = {"a": 6.0, "b": 3.0, "c": 1.0}
    heirs = Counter(order[1] for point in POINTS if (order := order_of(weights, point, secret=SECRET))[0] == "a")
    assert heirs["b"] / heirs.total() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 95, "b": 5}, {"a": 95, "b": 10}),
        ({"a": 95, "b": 5}, {"a": 90, "b": 10}),
        ({"a": 60, "b": 30, "c": 10}, {"a": 60, "b": 30, "c": 40}),
        ({"a": 60, "b": 30}, {"a": 60, "b": 30, "c": 10}),
    ],
)
def test_a_weight_that_rises_moves_only_what_it_must(before: dict[str, float], after: dict[str, float]) -> None:
    shares = [{name: weight / sum(w.values()) for name, weight in w.items()} for w in (before, after)]
    riser = max(after, key=lambda name: shares[1][name] / shares[0].get(name, 1e-9))
    pairs = list(zip(owners(before), owners(after), strict=True))
    moved = [pair for pair in pairs if pair[0] != pair[1]]
    assert {new for _, new in moved} == {riser}
    least = shares[1][riser] - shares[0].get(riser, 0.0)
    spread = 4 * math.sqrt(least / len(POINTS))
    assert len(moved) / len(POINTS) == pytest.approx(least, abs=spread)
    back = list(zip(owners(after), owners(before), strict=True))
    assert {old for old, new in back if old != new} == {riser}


def test_scale_and_names_without_a_weight_do_not_matter() -> None:
    assert owners({"a": 95, "b": 5}) == owners({"a": 0.95, "b": 0.05, "c": 0.0})


def test_without_the_secret_nobody_knows() -> None:
    one, other = owners({"a": 1, "b": 1}), owners({"a": 1, "b": 1}, b"x" * 32)
    assert 0.45 < sum(a == b for a, b in zip(one, other, strict=True)) / len(POINTS) < 0.55


# Who sticks


def test_sessions_stick_at_every_ingress() -> None:
    async def scenario() -> None:
        one, other = Service(CANARY, seed=1), Service(CANARY, seed=2)
        for service in (one, other):
            service.roll_out(weights={STABLE: 70, CANARY: 30})
        seen: Counter[str] = Counter()
        for number in range(60):
            session = {"X-Shoal-Session": f"s{number}"}
            names = {await service.who(session) for service in (one, other, one)}
            assert len(names) == 1
            seen.update(names)
        assert set(seen) == {STABLE, CANARY}
        assert len({await one.who(tenant=ANN) for _ in range(40)}) == 2  # what has no session does not stick
        assert await one.who({"X-Shoal-Session": "s1"}) == await one.who(user="s1")

    play(scenario)


def test_a_session_is_its_tenants_own() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        service.roll_out(weights={STABLE: 1, CANARY: 1})
        bob = Tenant(name="bob", salt="salt of bob")
        sessions = [{"X-Shoal-Session": str(number)} for number in range(40)]
        pairs = [(await service.who(of), await service.who(of, tenant=bob)) for of in sessions]
        assert any(ann != bobs for ann, bobs in pairs)

    play(scenario)


@pytest.mark.parametrize(("sticky_by", "sticks"), [("session", True), ("user", False), ("none", False)])
def test_what_sticks_is_the_configs_to_say(sticky_by: str, sticks: bool) -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        service.roll_out(weights={STABLE: 1, CANARY: 1}, sticky_by=sticky_by)
        session = {"X-Shoal-Session": "s"}
        assert (len({await service.who(session) for _ in range(30)}) == 1) is sticks
        users = {await service.who(session, user="u") for _ in range(30)}
        assert (len(users) == 1) is (sticky_by != "none")

    play(scenario)


def test_a_new_weight_moves_few_sessions() -> None:
    async def scenario() -> None:
        service = Service(CANARY)

        async def all_of_them() -> list[str]:
            return [await service.who({"X-Shoal-Session": str(number)}) for number in range(200)]

        service.roll_out(weights={STABLE: 95, CANARY: 5})
        before = await all_of_them()
        service.roll_out(weights={STABLE: 80, CANARY: 20})
        after = await all_of_them()
        assert {(a, b) for a, b in zip(before, after, strict=True) if a != b} == {(STABLE, CANARY)}
        assert 20 < after.count(CANARY) < 60

    play(scenario)


# Who takes part


def test_without_a_rollout_stable_answers() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        assert {await service.who() for _ in range(20)} == {STABLE}

    play(scenario)


def test_who_is_not_ready_gets_nothing_and_the_others_its_share() -> None:
    async def scenario() -> None:
        service = Service(CANARY, "third")
        service.roll_out(weights={STABLE: 1, CANARY: 8, "third": 1})
        service.backends[CANARY].ready_problem = "it is loading"
        counts = Counter([await service.who() for _ in range(100)])
        assert counts[CANARY] == 0
        assert 30 < counts["third"] < 70
        passed = service.sample("shoal_variant_passed_over_total", variant=CANARY, why="not_ready")
        assert 60 < passed <= 100
        assert service.ingress.variants.shares() == {STABLE: 0.5, CANARY: 0.0, "third": 0.5}
        service.backends[CANARY].ready_problem = None
        assert Counter([await service.who() for _ in range(50)])[CANARY] > 25

    play(scenario)


def test_stable_answers_where_nobody_with_a_weight_can() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        service.roll_out(weights={CANARY: 1})
        assert {await service.who() for _ in range(5)} == {CANARY}
        service.backends[CANARY].ready_problem = "it is gone"
        assert {await service.who() for _ in range(5)} == {STABLE}
        service.backends[STABLE].ready_problem = "it is gone, too"
        with pytest.raises(Unavailable, match="it is gone, too"):
            await service.ingress.ready()

    play(scenario)


def test_the_service_is_ready_while_any_variant_that_gets_requests_is() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        service.backends[STABLE].ready_problem = "it is gone"
        with pytest.raises(Unavailable, match="it is gone"):
            await service.ingress.ready()
        service.roll_out(weights={STABLE: 1, CANARY: 1})
        await service.ingress.ready()
        assert {await service.who() for _ in range(10)} == {CANARY}

    play(scenario)


def test_a_name_without_a_variant_waits_for_one(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        service = Service()
        with caplog.at_level(logging.WARNING, "shoal.router"):
            for _ in range(3):
                service.roll_out(weights={STABLE: 1, CANARY: 99})
        assert [record.getMessage() for record in caplog.records if CANARY in record.getMessage()] != []
        assert len(caplog.records) == 1
        assert {await service.who() for _ in range(10)} == {STABLE}
        service.add(CANARY)
        assert Counter([await service.who() for _ in range(20)])[CANARY] > 15

    play(scenario)


def test_what_is_dropped_ends_what_it_began() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        service.roll_out(weights={CANARY: 1})
        service.backends[CANARY].delay_s = 0.1
        running = asyncio.create_task(service.ask())
        await asyncio.sleep(0.5)
        model = service.ingress.drop(CANARY)
        gone = asyncio.create_task(model.unused())
        assert {await service.who() for _ in range(5)} == {STABLE}
        assert not gone.done()
        told = await running
        assert (told.variant, told.text) == (CANARY, words_of(CANARY))
        await asyncio.wait_for(gone, 1.0)
        assert service.ingress.part(CANARY) is None
        assert len(service.backends[CANARY].requests) == 1

    play(scenario)


# Answers that are kept


@pytest.mark.parametrize("body", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_variants_never_give_each_others_answers(body: dict[str, Any]) -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        service.roll_out(weights={STABLE: 1, CANARY: 1}, allow_variant_header=True)
        for status in ("miss", "hit"):
            for name in (STABLE, CANARY):
                told = await service.ask({"X-Shoal-Variant": name}, **body)
                assert (told.variant, told.text, told.headers["x-shoal-cache"]) == (name, words_of(name), status)
        assert [len(backend.requests) for backend in service.backends.values()] == [1, 1]

    play(scenario)


def test_equal_requests_in_the_air_share_nothing_across_variants() -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        service.roll_out(weights={STABLE: 1, CANARY: 1}, allow_variant_header=True)
        for backend in service.backends.values():
            backend.delay_s = 0.1
        names = [STABLE, CANARY] * 3
        told = await asyncio.gather(*(service.ask({"X-Shoal-Variant": name}, temperature=0) for name in names))
        assert [(each.variant, each.text) for each in told] == [(name, words_of(name)) for name in names]

    play(scenario)


@pytest.mark.parametrize("has_store", [True, False])
def test_a_key_goes_where_it_went(has_store: bool) -> None:
    async def scenario() -> None:
        shared = MemoryStore(redis()) if has_store else None
        one, other = Service(CANARY, store=shared, seed=1), Service(CANARY, store=shared, seed=2)
        for service in (one, other):
            service.roll_out(weights={STABLE: 1, CANARY: 1})
        keys = [{"Idempotency-Key": f"k{number}"} for number in range(30)]
        before = [await one.who(key, temperature=1) for key in keys]
        assert [await other.who(key, temperature=1) for key in keys] == before
        assert set(before) == {STABLE, CANARY}
        if has_store:  # whatever has become of the weights, and as the answer that was kept
            other.roll_out(weights={STABLE: 1})
            told = [await other.ask(key, temperature=1) for key in keys]
            assert [each.variant for each in told] == before
            assert {each.headers["x-shoal-cache"] for each in told} == {"hit"}

    play(scenario)


def test_a_key_goes_elsewhere_where_its_variant_cannot_answer() -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        service.roll_out(weights={CANARY: 1})
        key = {"Idempotency-Key": "k"}
        assert await service.who(key, temperature=1) == CANARY
        service.backends[CANARY].ready_problem = "it is gone"
        assert await service.who(key, temperature=1) == CANARY  # as the answer that was kept
        other = {"Idempotency-Key": "other"}
        service.backends[CANARY].ready_problem = None
        service.backends[CANARY].before = gone
        with pytest.raises(Unavailable):
            await service.who(other, temperature=1)
        launch = await service.launch(other, temperature=1, avoid=frozenset([CANARY]))
        async with launch.flight:
            assert [piece async for pieces in launch.flight for piece in pieces]
        service.backends[CANARY].before = None
        assert await service.who(other, temperature=1) == STABLE  # where it has an answer now

    play(scenario)


def test_a_broken_stream_goes_on_at_its_variant_or_not_at_all() -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        service.roll_out(weights={CANARY: 1})
        key = {"Idempotency-Key": "k"}
        for body in ({"temperature": 0}, {"temperature": 1}):
            key = {"Idempotency-Key": f"k{body}"}
            assert await service.who(key, stream=True, **body) == CANARY
        service.roll_out(weights={STABLE: 1})
        go_on = {"Last-Event-ID": "3"}
        for body in ({"temperature": 0}, {"temperature": 1}):
            told = await service.ask({"Idempotency-Key": f"k{body}"} | go_on, stream=True, **body)
            assert (told.variant, told.text) == (CANARY, words_of(CANARY)[3:])
        with pytest.raises(InvalidRequest, match="idempotency-key"):  # it could be anybody's
            await service.ask(go_on, stream=True, temperature=0)
        service.ingress.drop(CANARY)
        for body in ({"temperature": 0}, {"temperature": 1}):
            with pytest.raises(LogLost, match="canary"):
                await service.ask({"Idempotency-Key": f"k{body}"} | go_on, stream=True, **body)

    play(scenario)


def test_a_stream_that_began_before_there_were_variants_goes_on() -> None:
    async def scenario() -> None:
        service = Service(store=MemoryStore(redis()))
        key = {"Idempotency-Key": "k"}
        assert await service.who(key, stream=True, temperature=1) == STABLE
        service.add(CANARY)
        service.roll_out(weights={CANARY: 1})
        told = await service.ask(key | {"Last-Event-ID": "3"}, stream=True, temperature=1)
        assert (told.variant, told.text) == (STABLE, words_of(STABLE)[3:])

    play(scenario)


def test_a_store_that_is_down_fails_nobody_but_who_goes_on() -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        assert service.store is not None
        service.roll_out(weights={STABLE: 1, CANARY: 1})
        service.store.down = True
        names = [await service.who({"Idempotency-Key": f"k{number % 10}"}, temperature=1) for number in range(20)]
        assert names[:10] == names[10:]
        assert set(names) == {STABLE, CANARY}
        for body in ({"temperature": 0}, {"temperature": 1}):  # the weights may have been others when it began
            with pytest.raises(Unavailable, match="which knows the variant"):
                await service.ask({"Idempotency-Key": "k1", "Last-Event-ID": "3"}, stream=True, **body)

    play(scenario)


# What clients may ask for


def test_a_variant_by_its_name() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        by_name = {"X-Shoal-Variant": CANARY}
        with pytest.raises(InvalidRequest, match="allow_variant_header"):
            await service.ask(by_name)
        service.roll_out(allow_variant_header=True)
        assert await service.who(by_name) == CANARY
        assert await service.who({"X-Shoal-Variant": STABLE}) == STABLE
        with pytest.raises(InvalidRequest, match="there is stable, canary"):
            await service.ask({"X-Shoal-Variant": "other"})
        service.ingress.add(FakeBackend(), name="small").open(INFO, byte_level_text())
        with pytest.raises(InvalidRequest, match="no other model"):
            await service.ask(by_name, model="small")
        assert (await service.ask(model="small")).variant == "small"

    play(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_what_its_variant_cannot_answer_another_one_does(stream: bool) -> None:
    """It was ready when it was chosen, and is gone when it is asked."""
    with Server() as server:
        canary = said(CANARY)
        server.ingress.add_variant(CANARY, canary).open(INFO, byte_level_text())
        server.ingress.roll_out(RolloutConfig(weights={CANARY: 1}, allow_variant_header=True))

        canary.before = gone
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 100, "stream": stream}
        reply = server.post("/v1/completions", body)
        assert reply.status == 200
        assert reply.headers["x-shoal-variant"] == STABLE
        assert reply.body.count(b"Paris") or "".join(c["choices"][0]["text"] for c in reply.chunks).count("Paris")
        assert len(canary.requests) == 1
        assert server.post("/v1/completions", body, x_shoal_variant=CANARY).status == 503  # it was asked for

        server.backend.before = gone
        assert server.post("/v1/completions", body).status == 503
        assert len(canary.requests) == 3  # each was asked once more, and no oftener


def test_how_variants_stand() -> None:
    with Server() as server:
        model = server.ingress.add_variant(CANARY, said(CANARY))
        server.ingress.roll_out(RolloutConfig(weights={STABLE: 3, CANARY: 1}, shadow={CANARY: 0.5}))
        stable, canary = server.get("/v1/cluster").json["variants"]
        assert (canary["state"], canary["share"], stable["share"]) == ("not ready", 0.0, 1.0)
        model.open(INFO, byte_level_text())
        stable, canary = server.get("/v1/cluster").json["variants"]
        assert (stable["name"], stable["state"], stable["share"]) == (STABLE, "serving", 0.75)
        assert (canary["name"], canary["state"], canary["weight"], canary["share"]) == (CANARY, "serving", 1.0, 0.25)
        assert (canary["shadow"], canary["replicas"]) == (0.5, ["r1"])
        assert 'shoal_variant_share{variant="canary"} 0.25' in server.get("/metrics").body.decode()


def test_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="nobody would answer"):
        RolloutConfig(weights={STABLE: 0, CANARY: 0})
    for config in (RolloutConfig(weights={CANARY: 1}), RolloutConfig(shadow={CANARY: 1})):
        config.check_names([CANARY])
        with pytest.raises(ValueError, match="'canary'; there is other, stable"):
            config.check_names(["other"])
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        RolloutConfig(weights={STABLE: -1})


def test_dice_are_the_ingresss_own() -> None:
    async def scenario() -> None:
        seeds = random.Random(0).sample(range(100), 2)
        drawn = []
        for seed in (*seeds, seeds[0]):
            service = Service(CANARY, seed=seed)
            service.roll_out(weights={STABLE: 1, CANARY: 1})
            drawn.append([await service.who() for _ in range(30)])
        assert drawn[0] == drawn[2] != drawn[1]

    play(scenario)


# Bugs that the tests above must catch


def _shares_of_a_line(weights: dict[str, float], point: bytes, *, secret: bytes) -> list[str]:
    """Consistent for equal weights, but every border moves with every weight."""
    at = int.from_bytes(hashlib.blake2b(point, key=secret, digest_size=8).digest(), "big") / 2**64
    names = sorted(weights, key=lambda name: (weights[name], name))
    borders = list(itertools.accumulate(weights[name] / sum(weights.values()) for name in names))
    first = names[bisect.bisect(borders, at)]
    return [first, *(name for name in names if name != first)]


async def _wherever_it_is_drawn(self: Homes, scope: str, key: str, drawn: str) -> str:
    return drawn


three = {"a": 60.0, "b": 30.0, "c": 10.0}
BUGS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "all borders move": (
        sys.modules[__name__],
        "order_of",
        _shares_of_a_line,
        lambda: test_a_weight_that_rises_moves_only_what_it_must(three, three | {"b": 60.0}),
    ),
    "each ingress has a secret of its own": (
        Variants,
        "_point",
        lambda self, tenant, asks, user: self._rng.randbytes(8),
        test_sessions_stick_at_every_ingress,
    ),
    "tenants share their sessions": (
        Variants,
        "_point",
        lambda self, tenant, asks, user: (asks.session or "").encode(),
        test_a_session_is_its_tenants_own,
    ),
    "where it went is forgotten": (Homes, "settle", _wherever_it_is_drawn, lambda: test_a_key_goes_where_it_went(True)),
    "names of answers do not hold the model": (
        LogKeys,
        "_digest",
        lambda self, *parts: hashlib.sha256(msgspec.msgpack.encode(parts)).digest(),
        lambda: test_variants_never_give_each_others_answers({"temperature": 0}),
    ),
    "who cannot answer is all there is": (
        Variants,
        "has_other",
        lambda self, model, avoid: False,
        lambda: test_what_its_variant_cannot_answer_another_one_does(False),
    ),
    "who is dropped is asked on": (
        Variants,
        "drop",
        lambda self, name: self._members[name],
        test_what_is_dropped_ends_what_it_began,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted, test = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError):
        test()
