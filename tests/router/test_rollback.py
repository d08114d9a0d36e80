"""When a variant is taken back, what counts against it, how other ingresses hear of it; and a test of these tests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router import rollback, verdicts
from shoal.router.backend import ReplicaLost
from shoal.router.model import Model
from shoal.router.rollback import Court, Trial, Verdict, Window
from shoal.router.rollout_config import STABLE, RollbackConfig, RolloutConfig
from shoal.runtime.errors import (
    EngineDead,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
    RowFailed,
    ShoalError,
    Unavailable,
)
from shoal.runtime.generation import GenerationRequest

from .cache_fakes import play
from .memory_store import MemoryStore
from .rollouts import CANARY, Service, redis, words_of

BOUNDS = RollbackConfig(max_error_rate=0.2, max_ttft_s=1.0, min_requests=5, window_s=10)
CONFIG = RolloutConfig(weights={STABLE: 1, CANARY: 1}, rollback=BOUNDS)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# The window, against a plain list


class Plain:
    """What a window is: all that came, looked at anew each time."""

    def __init__(self, bounds: RollbackConfig, clock: Clock) -> None:
        self.bounds, self.clock = bounds, clock
        self.all: list[tuple[float, bool | None, float | None]] = []

    def crossed(self) -> str | None:
        bounds = self.bounds
        recent = [fared for fared in self.all if fared[0] > self.clock.now - bounds.window_s]
        ended = [failed for _, failed, _ in recent if failed is not None]
        times = sorted(seconds for _, _, seconds in recent if seconds is not None)
        most, limit = bounds.max_error_rate, bounds.max_ttft_s
        if most is not None and len(ended) >= bounds.min_requests and ended.count(True) / len(ended) > most:
            return "error_rate"
        # Above the highest that counts is one in ten at most.
        if limit is not None and len(times) >= bounds.min_requests and times[-1 - len(times) // 10] > limit:
            return "ttft"
        return None


FARED = st.tuples(
    st.sampled_from([0.0, 0.5, 3.0, 11.0]),
    st.sampled_from([True, False, False, False, None]),
    st.sampled_from([None, 0.1, 0.1, 0.1, 1.0, 1.5]),
)


@settings(max_examples=300, deadline=None)
@given(
    fared=st.lists(FARED, max_size=60),
    rate=st.sampled_from([None, 0.0, 0.25, 1.0]),
    ttft_s=st.sampled_from([None, 1.0]),
    least=st.integers(1, 12),
)
def test_a_window_is_what_a_list_would_be(
    fared: list[tuple[float, bool | None, float | None]], rate: float | None, ttft_s: float | None, least: int
) -> None:
    clock = Clock()
    bounds = RollbackConfig(max_error_rate=rate, max_ttft_s=ttft_s, min_requests=least, window_s=10)
    window, plain = Window(bounds, clock=clock), Plain(bounds, clock)
    for step_s, failed, seconds in fared:
        clock.now += step_s
        window.add(failed=failed, ttft_s=seconds)
        plain.all.append((clock.now, failed, seconds))
        found = window.crossed()
        assert (found and found[0]) == plain.crossed()


def test_a_window_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "MOST", 20)
    window = Window(BOUNDS, clock=Clock())
    for _ in range(20):
        window.add(failed=True, ttft_s=0.1)
    for _ in range(17):
        window.add(failed=False, ttft_s=0.1)
    assert window.crossed() is None  # 3 of the last 20


def test_who_left_after_too_long_a_wait_was_made_to_wait() -> None:
    window = Window(BOUNDS, clock=Clock())
    for _ in range(5):
        window.add(failed=None, ttft_s=None, waited_s=0.9)
    assert window.crossed() is None
    for _ in range(5):
        window.add(failed=None, ttft_s=None, waited_s=1.1)
    assert (window.crossed() or [None])[0] == "ttft"


# The court


def court(config: RolloutConfig = CONFIG) -> tuple[Court, Clock, list[str]]:
    clock, told = Clock(), list[str]()
    made = Court(clock=clock, on_verdict=lambda name, verdict: told.append(name))
    made.roll_out(config)
    return made, clock, told


def fail(made: Court, name: str = CANARY, times: int = 5) -> None:
    for _ in range(times):
        made.fared(name, failed=True, ttft_s=None)


def test_a_verdict_falls_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    made, _, told = court()
    fail(made, times=4)
    assert made.verdict(CANARY) is None
    with caplog.at_level(logging.WARNING, "shoal.router"):
        fail(made, times=4)
    verdict = made.verdict(CANARY)
    assert verdict is not None
    assert (verdict.bound, verdict.words) == ("error_rate", "5 of 5 requests failed (max_error_rate 0.2)")
    assert told == [CANARY]
    assert len(caplog.records) == 1


def test_stable_is_never_on_trial() -> None:
    made, _, _ = court()
    fail(made, STABLE, 100)
    assert made.verdict(STABLE) is None
    made.hear(STABLE, Verdict("ttft", "", is_own=False))
    assert made.verdict(STABLE) is None


@pytest.mark.parametrize(
    ("then", "stands"),
    [
        (CONFIG, True),
        (RolloutConfig(weights={STABLE: 9, CANARY: 1}, rollback=BOUNDS, sticky_by="user"), True),
        (RolloutConfig(weights={STABLE: 1, CANARY: 2}, rollback=BOUNDS), False),
        (RolloutConfig(weights={STABLE: 1, CANARY: 1}, rollback=BOUNDS.model_copy(update={"window_s": 5})), False),
        (RolloutConfig(weights={STABLE: 1, CANARY: 1}), False),
        (RolloutConfig(weights={STABLE: 1}, rollback=BOUNDS), False),
    ],
)
def test_what_a_verdict_outlives(then: RolloutConfig, stands: bool) -> None:
    made, _, _ = court()
    fail(made)
    made.roll_out(then)
    assert (made.verdict(CANARY) is not None) is stands
    made.roll_out(CONFIG)
    assert (made.verdict(CANARY) is not None) is stands


def test_a_new_rollout_begins_with_nothing_against_it() -> None:
    made, _, _ = court()
    fail(made, times=4)
    made.roll_out(RolloutConfig(weights={STABLE: 1, CANARY: 2}, rollback=BOUNDS))
    fail(made, times=4)
    assert made.verdict(CANARY) is None
    made.forget(CANARY)
    fail(made, times=4)
    assert made.verdict(CANARY) is None


# What counts, from the service's own mouth


def broken(error: Callable[[], ShoalError], at: int = 0) -> Callable[[GenerationRequest, int], None]:
    def before(request: GenerationRequest, event: int) -> None:
        if event >= at:
            raise error()

    return before


async def ask_many(service: Service, times: int = 20, **body: Any) -> int:
    """How many failed."""
    failed = 0
    for _ in range(times):
        try:
            await service.who(**body)
        except ShoalError:
            failed += 1
    return failed


def on_trial(**config: Any) -> Service:
    service = Service(CANARY, resume_attempts=0, **config)
    service.ingress.roll_out(CONFIG.model_copy(update={"weights": {CANARY: 1}}))
    return service


def state(service: Service) -> str:
    return str(service.ingress.variants.describe()[1]["state"])


@pytest.mark.parametrize(
    ("error", "body", "counts"),
    [
        (lambda: RowFailed("a NaN"), {}, True),
        (lambda: ReplicaLost("it is gone"), {}, True),
        (lambda: EngineDead("it is dead"), {}, True),
        (lambda: Unavailable("no replica"), {}, True),
        (lambda: RequestTimeout("late"), {}, True),
        (lambda: RequestTimeout("late"), {"timeout": 1.0}, False),  # as the client wished
        (lambda: InvalidRequest("a grammar"), {}, False),
        (lambda: QueueFull("full"), {}, False),
    ],
)
def test_only_our_own_failures_count(error: Callable[[], ShoalError], body: dict[str, Any], counts: bool) -> None:
    async def scenario() -> None:
        service = on_trial()
        is_refusal = isinstance(error(), Unavailable | QueueFull)
        service.backends[CANARY].before = broken(error, at=0 if is_refusal else 2)
        failed = await ask_many(service, **body)
        if counts:
            assert failed == 5
            assert state(service).startswith("rolled back: 5 of 5 requests failed")
            assert service.sample("shoal_variant_rollbacks_total", variant=CANARY, bound="error_rate") == 1
            assert service.ingress.variants.shares() == {STABLE: 1.0, CANARY: 0.0}
        else:
            assert failed == 20
            assert state(service) == "serving"
        await close(service)

    play(scenario)


def test_clients_who_leave_prove_nothing() -> None:
    async def scenario() -> None:
        service = on_trial()
        service.backends[CANARY].delay_s = 0.05
        for _ in range(20):
            launch = await service.launch()
            async with launch.flight:
                await asyncio.sleep(0.2)
        assert state(service) == "serving"
        await close(service)

    play(scenario)


def test_one_request_is_one_however_many_choices_it_has() -> None:
    async def scenario() -> None:
        service = on_trial()
        service.backends[CANARY].before = broken(lambda: RowFailed("a NaN"))
        with pytest.raises(RowFailed):
            await service.ask(n=50)
        assert state(service) == "serving"
        assert await ask_many(service) == 4
        await close(service)

    play(scenario)


def test_what_comes_from_the_cache_says_nothing() -> None:
    async def scenario() -> None:
        service = on_trial(store=MemoryStore(redis()))
        for _ in range(30):
            await service.who(temperature=0)
        service.backends[CANARY].before = broken(lambda: RowFailed("a NaN"))
        assert await ask_many(service, temperature=1) == 4
        assert state(service).startswith("rolled back: 4 of 5")  # one was good, the others' answers were its
        await close(service)

    play(scenario)


def test_slow_first_tokens() -> None:
    async def scenario() -> None:
        service = on_trial()
        service.backends[CANARY].delay_s = 1.5
        await asyncio.gather(*(service.who() for _ in range(5)))
        assert "5 of 5 first tokens took longer than 1 s" in state(service)
        await close(service)

    play(scenario)


def test_what_it_takes_to_wake_is_not_held_against_it() -> None:
    async def scenario() -> None:
        service = on_trial()
        canary = service.backends[CANARY]

        async def wake() -> None:
            await asyncio.sleep(5)
            canary.ready_problem = None

        model = service.ingress.part(CANARY)
        assert model is not None
        model.sleep.allow(wake)
        canary.ready_problem = "it sleeps"
        await asyncio.gather(*(service.who() for _ in range(10)))
        assert state(service) == "serving"
        await close(service)

    play(scenario)


def test_the_ingresss_own_queue_is_no_variants_fault() -> None:
    async def scenario() -> None:
        service = on_trial(max_in_flight=1)
        service.backends[CANARY].delay_s = 0.05  # 0.65 s an answer
        await asyncio.gather(*(service.who() for _ in range(8)))
        assert state(service) == "serving"
        await close(service)

    play(scenario)


def test_what_runs_goes_on_and_nothing_new_comes() -> None:
    async def scenario() -> None:
        service = on_trial()
        canary = service.backends[CANARY]
        canary.delay_s = 0.1
        running = asyncio.create_task(service.ask())
        await asyncio.sleep(0.3)
        canary.before = lambda request, event: (
            broken(lambda: RowFailed("a NaN"))(request, event) if event == 0 else None
        )
        assert await ask_many(service) == 5
        asked = len(canary.requests)
        assert {await service.who() for _ in range(5)} == {STABLE}
        told = await running
        assert (told.variant, told.text) == (CANARY, words_of(CANARY))
        assert len(canary.requests) == asked
        await close(service)

    play(scenario)


def test_an_ingress_that_shuts_down_judges_nobody() -> None:
    async def scenario() -> None:
        service = on_trial()
        service.backends[CANARY].delay_s = 1.0
        service.backends[CANARY].before = broken(lambda: ReplicaLost("it is gone"), at=1)
        asked = [asyncio.create_task(service.ask()) for _ in range(10)]
        await asyncio.sleep(0.5)
        await service.ingress.drain(5.0)
        assert all(isinstance(each, ShoalError) for each in await asyncio.gather(*asked, return_exceptions=True))
        assert state(service) == "serving"
        await close(service)

    play(scenario)


# Several ingresses


def several(number: int, store: MemoryStore) -> list[Service]:
    services = [Service(CANARY, store=store, seed=seed, resume_attempts=0) for seed in range(number)]
    for service in services:
        service.ingress.roll_out(CONFIG)
    return services


async def take_back(service: Service) -> None:
    service.backends[CANARY].before = broken(lambda: RowFailed("a NaN"))
    await ask_many(service, 40)
    assert state(service).startswith("rolled back")
    service.backends[CANARY].before = None


def test_all_ingresses_hear_within_seconds_also_those_that_come_later() -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        one, other = several(2, store)
        await take_back(one)
        await asyncio.sleep(3)
        assert "another ingress" in state(other)
        assert {await other.who() for _ in range(20)} == {STABLE}
        (late,) = several(1, store)
        await asyncio.sleep(3)
        assert "another ingress" in state(late)
        for service in (one, other, late):
            service.ingress.roll_out(CONFIG)
        await asyncio.sleep(5)
        assert all("rolled back" in state(service) for service in (one, other, late))
        await close(one, other, late)

    play(scenario)


def test_a_new_rollout_is_a_new_trial_everywhere() -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        services = several(3, store)
        await take_back(services[0])
        await asyncio.sleep(3)
        for weight in (2, 1):  # and back to what was taken back
            for service in services:
                service.ingress.roll_out(CONFIG.model_copy(update={"weights": {STABLE: 1, CANARY: weight}}))
                await asyncio.sleep(1)
            await asyncio.sleep(5)
            assert [state(service) for service in services] == ["serving"] * 3
        assert not [key for key in store.redis.held() if b"rollback" in key]
        await close(*services)

    play(scenario)


@pytest.mark.parametrize("how", ["added anew", "opened with another digest"])
def test_another_version_is_a_new_trial_everywhere(how: str) -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        services = several(3, store)
        await take_back(services[0])
        await asyncio.sleep(3)
        for service in services:
            if how == "added anew":
                service.ingress.drop(CANARY)
                service.add(CANARY)
            else:
                service.open(CANARY, digest="another")
            await asyncio.sleep(1)
        await asyncio.sleep(5)
        assert [state(service) for service in services] == ["serving"] * 3
        await close(*services)

    play(scenario)


def test_without_the_store_each_judges_by_itself_and_tells_when_it_is_back() -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        one, other = several(2, store)
        store.down = True
        await take_back(one)
        await asyncio.sleep(5)
        assert state(other) == "serving"
        store.down = False
        await asyncio.sleep(3)
        assert "another ingress" in state(other)
        await close(one, other)

    play(scenario)


def test_who_lies_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        one, other = several(2, store)
        stranger = Service(CANARY, store=store, secret="x" * 32, resume_attempts=0)
        stranger.ingress.roll_out(CONFIG)
        await take_back(stranger)
        await asyncio.sleep(3)
        assert state(one) == state(other) == "serving"
        there = store.redis.get
        monkeypatch.setattr(store.redis, "get", lambda key: there(key) and b"<script>")
        await take_back(one)
        await asyncio.sleep(3)
        assert state(other) == "serving"
        await close(one, other, stranger)

    play(scenario)


def test_nothing_is_asked_while_nobody_is_on_trial() -> None:
    async def scenario() -> None:
        store = MemoryStore(redis())
        service = Service(CANARY, store=store)
        service.roll_out(weights={STABLE: 1, CANARY: 1})
        await asyncio.sleep(10)
        assert not store.calls
        service.ingress.roll_out(CONFIG)
        await asyncio.sleep(10)
        assert 5 <= store.calls["get"] <= 12
        service.roll_out(weights={STABLE: 1, CANARY: 1})
        await asyncio.sleep(3)
        store.calls.clear()
        await asyncio.sleep(10)
        assert not store.calls
        await close(service)

    play(scenario)


async def close(*services: Service) -> None:
    for service in services:
        await service.ingress.drain(0.0)


# Bugs that the tests above must catch


def _count_everything(self: Trial, *, is_timed: bool) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def log() -> Any:
        self._num_open += 1
        self._began = self._clock()
        try:
            yield
        except Exception:
            self._failed = True
            raise
        finally:
            self.close()

    return log()


def _forget_always(self: Court, config: RolloutConfig) -> None:
    self._verdicts.clear()
    self._charges = {}
    original_roll_out(self, config)


original_roll_out, original_fared, original_name = Court.roll_out, Court.fared, verdicts.Bulletin._name
BUGS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "4xx count": (
        Trial,
        "log",
        _count_everything,
        lambda: test_only_our_own_failures_count(lambda: InvalidRequest("a grammar"), {}, False),
    ),
    "the verdict is forgotten": (
        Court,
        "roll_out",
        _forget_always,
        lambda: test_what_a_verdict_outlives(CONFIG, True),
    ),
    "nothing is ever forgiven": (
        Court,
        "forget",
        lambda self, name: None,
        test_a_new_rollout_is_a_new_trial_everywhere,
    ),
    "who left has failed": (
        Court,
        "fared",
        lambda self, name, *, failed, ttft_s, waited_s=0.0: original_fared(
            self, name, failed=failed is not False or ttft_s is None or waited_s < 0.5, ttft_s=ttft_s
        ),
        test_clients_who_leave_prove_nothing,
    ),
    "old ones count for ever": (
        Window,
        "crossed",
        lambda self: ("error_rate", "") if self._num_failed > 0.2 * max(5, self._num_ended) else None,
        test_a_window_is_what_a_list_would_be,
    ),
    "stable is judged": (
        rollback,
        "STABLE",
        "nobody",
        test_stable_is_never_on_trial,
    ),
    "a verdict is on any rollout": (
        verdicts.Bulletin,
        "_name",
        lambda self, variant, charge: original_name(self, variant, charge._replace(weight=0.0)),
        test_a_new_rollout_is_a_new_trial_everywhere,
    ),
    "waking takes no time": (
        Model,
        "is_asleep",
        property(lambda self: False),
        test_what_it_takes_to_wake_is_not_held_against_it,
    ),
    "nobody is told": (
        verdicts.Bulletin,
        "watch",
        lambda self: None,
        test_all_ingresses_hear_within_seconds_also_those_that_come_later,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted, test = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises((AssertionError, ExceptionGroup)):
        test()


def test_a_backend_that_says_nothing_is_slow() -> None:
    """Its clients leave before the first token, each after more than the bound."""

    async def scenario() -> None:
        service = on_trial()
        service.backends[CANARY].delay_s = 1e6
        for _ in range(5):
            launch = await service.launch()
            async with launch.flight:
                await asyncio.sleep(2)
        assert "first tokens" in state(service)
        await close(service)

    play(scenario)
