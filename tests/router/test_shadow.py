"""Requests copied to a variant nobody hears: compared, bounded, first to go; and no client is any the worse for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from shoal.router import shadow
from shoal.router.backend import ReplicaLost, ReplicaState
from shoal.router.ingress import Ingress
from shoal.router.rollout_config import STABLE
from shoal.router.shadow import Copied, Shadows
from shoal.router.tenant import Tenant
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent
from shoal.runtime.stats import Stats

from .cache_fakes import play
from .fakes import FakeBackend
from .memory_store import MemoryStore
from .rollouts import CANARY, Service, redis, words_of

STEP_S = 0.1
LENGTH = len(words_of(STABLE)) + 1  # and the end of sequence


def shadowed(*, share: float = 1.0, step_s: float = STEP_S, config: dict[str, Any] | None = None, **of: Any) -> Service:
    """Stable answers, and the canary's copies say the same. config: of the router."""
    service = Service(CANARY, **(config or {}))
    service.roll_out(shadow={CANARY: share}, **of)
    for backend in service.backends.values():
        backend.answer, backend.delay_s = words_of(STABLE), step_s
    return service


def outcomes(service: Service) -> dict[str, int]:
    names = ("same", "differs", "failed", "late", "dropped")
    counts = {
        name: int(service.sample("shoal_shadow_generations_total", variant=CANARY, outcome=name)) for name in names
    }
    return {name: count for name, count in counts.items() if count}


async def settled(service: Service) -> None:
    await asyncio.sleep(100 * STEP_S)
    assert service.backends[CANARY].live == 0


def test_copies_that_say_the_same() -> None:
    async def scenario() -> None:
        service = shadowed()
        bodies: list[Any] = [{"temperature": 0}, {"temperature": 1}, {"n": 2}, {"stop": ["am"]}, {"max_tokens": 4}]
        for body in bodies:
            assert (await service.ask(**body)).variant == STABLE
        await settled(service)
        assert outcomes(service) == {"same": 6}
        asked, copied = (service.backends[name].requests for name in (STABLE, CANARY))
        assert [(r.prompt, r.seed, r.params) for r in copied] == [(r.prompt, r.seed, r.params) for r in asked]

    play(scenario)


@pytest.mark.parametrize(
    ("says", "position"), [("J am stable.", 0), ("I am stab1e.", 9), ("I am stable", 11), ("I am stable. Yes.", 12)]
)
@pytest.mark.parametrize("log_prompts", [True, False])
def test_copies_that_differ(says: str, position: int, log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        service = shadowed(config={"log_prompts": log_prompts})
        service.backends[CANARY].answer = says
        with caplog.at_level(logging.INFO):
            assert (await service.ask()).text == words_of(STABLE)
            await settled(service)
        assert outcomes(service) == {"differs": 1}
        name = "shoal_shadow_difference_position"
        assert service.sample(f"{name}_sum", variant=CANARY) == position
        assert service.sample(f"{name}_count", variant=CANARY) == 1
        assert f"from token {position} on" in caplog.text
        assert (says in caplog.text) is log_prompts

    play(scenario)


def test_the_share_is_what_it_is_said_to_be() -> None:
    async def scenario() -> None:
        service = shadowed(share=0.25, step_s=0.0)
        for _ in range(200):
            await service.ask()
            await asyncio.sleep(0.01)
        await settled(service)
        assert 30 < outcomes(service)["same"] < 70

    play(scenario)


def test_a_variant_is_not_its_own_shadow() -> None:
    async def scenario() -> None:
        service = shadowed(weights={CANARY: 1})
        assert (await service.ask()).variant == CANARY
        await settled(service)
        assert outcomes(service) == {}

    play(scenario)


def test_no_client_waits_for_a_slow_copy() -> None:
    async def scenario() -> None:
        service = shadowed(shadow_timeout_s=5.0)
        service.backends[CANARY].delay_s = 1.0
        began = asyncio.get_running_loop().time()
        assert (await service.ask()).text == words_of(STABLE)
        took_s = asyncio.get_running_loop().time() - began
        assert took_s == pytest.approx(LENGTH * STEP_S)
        await asyncio.sleep(2)
        assert service.backends[CANARY].live == 1
        await settled(service)
        assert outcomes(service) == {"late": 1}
        assert service.backends[CANARY].aborted == 1
        assert service.ingress.admission.in_flight == 0

    play(scenario)


def test_no_client_hears_of_a_copy_that_fails() -> None:
    async def scenario() -> None:
        service = shadowed(weights={STABLE: 1}, rollback={"min_requests": 1})

        def fail(request: GenerationRequest, event: int) -> None:
            if event:
                raise ReplicaLost("it is gone")

        service.backends[CANARY].before = fail
        for _ in range(3):
            assert (await service.ask()).text == words_of(STABLE)
        await settled(service)
        assert outcomes(service) == {"failed": 3}
        assert service.sample("shoal_generations_interrupted_total", cause="replica_lost") == 0
        await service.ingress.drain(0.0)

    play(scenario)


def test_copies_are_bounded() -> None:
    async def scenario() -> None:
        service = shadowed(max_shadows=2)
        await asyncio.gather(*(service.ask() for _ in range(5)))
        await settled(service)
        assert outcomes(service) == {"same": 2, "dropped": 3}
        await service.ask()
        await settled(service)
        assert outcomes(service) == {"same": 3, "dropped": 3}

    play(scenario)


def test_copies_go_first_when_requests_wait() -> None:
    async def scenario() -> None:
        service = shadowed(config={"max_in_flight": 2})
        asked = [asyncio.create_task(service.ask())]
        await asyncio.sleep(3 * STEP_S)
        assert service.backends[CANARY].live == 1
        asked += [asyncio.create_task(service.ask()) for _ in range(3)]  # more than there are places
        await asyncio.sleep(STEP_S)
        assert service.backends[CANARY].live == 0
        assert [each.text for each in await asyncio.gather(*asked)] == [words_of(STABLE)] * 4
        await settled(service)
        assert outcomes(service).keys() == {"dropped", "same"}
        assert outcomes(service)["same"] == 1  # of the last one, behind which nobody waited

    play(scenario)


def test_copies_give_way_at_the_variant_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        service = shadowed()
        waiting = 0

        def replicas() -> dict[str, ReplicaState]:
            stats = Stats(num_waiting=waiting)
            return {"r1": ReplicaState(problem=None, stats=stats, ranks=[], in_flight=0, tokens_sent=0)}

        monkeypatch.setattr(service.backends[CANARY], "replicas", replicas)
        asked = asyncio.create_task(service.ask())
        await asyncio.sleep(3 * STEP_S)
        assert service.backends[CANARY].live == 1
        waiting = 1
        await asyncio.sleep(2 * STEP_S)
        assert service.backends[CANARY].live == 0
        await asked
        await service.ask()
        await settled(service)
        assert outcomes(service) == {"dropped": 2}
        assert len(service.backends[CANARY].requests) == 1

    play(scenario)


def test_of_an_answer_that_was_cut_off_what_came_is_compared() -> None:
    async def scenario() -> None:
        service = shadowed()
        for leaves_after_s in (0.5 * STEP_S, 4.5 * STEP_S):
            launch = await service.launch()
            async with launch.flight:
                await asyncio.sleep(leaves_after_s)
            await settled(service)
        assert outcomes(service) == {"dropped": 1, "same": 1}
        assert service.backends[CANARY].aborted == 2

    play(scenario)


def test_a_copy_is_behind_everybody_and_costs_no_tenant_anything() -> None:
    async def scenario() -> None:
        tenant = Tenant(name="ann", salt="s", tokens_per_minute=1000, max_in_flight=1, priority=-5)
        headers = []
        for share in (1.0, 0.0):
            service = shadowed(share=share) if share else Service(CANARY)
            told = await service.ask(tenant=tenant)
            await settled(service)
            headers.append(told.headers["x-ratelimit-remaining-tokens"])
            if share:
                (copy,) = service.backends[CANARY].requests
                assert (copy.priority, copy.account) == (2**31 - 1, "shadow")
                assert service.backends[STABLE].requests[0].priority == -5
                assert service.sample("shoal_tenant_tokens_total", tenant="ann", kind="output") == LENGTH
        assert headers[0] == headers[1]

    play(scenario)


def test_what_comes_from_the_cache_is_not_copied() -> None:
    async def scenario() -> None:
        service = Service(CANARY, store=MemoryStore(redis()))
        service.roll_out(shadow={CANARY: 1.0})
        for _ in range(5):
            await service.ask(temperature=0)
        await settled(service)
        assert len(service.backends[CANARY].requests) == 1

    play(scenario)


def test_a_variant_that_goes_takes_its_copies_with_it() -> None:
    async def scenario() -> None:
        service = shadowed()
        asked = asyncio.create_task(service.ask())
        await asyncio.sleep(3 * STEP_S)
        model = service.ingress.drop(CANARY)
        await asyncio.wait_for(model.unused(), 3 * STEP_S)
        assert service.backends[CANARY].live == 0
        assert (await asked).text == words_of(STABLE)
        assert outcomes(service) == {"dropped": 1}

    play(scenario)


def test_who_shuts_down_leaves_no_copy() -> None:
    async def scenario() -> None:
        service = shadowed()
        service.backends[CANARY].delay_s = 1e6
        await service.ask()
        await service.ingress.drain(1.0)
        assert service.backends[CANARY].live == 0

    play(scenario)


@pytest.mark.parametrize(
    ("own", "other", "is_whole", "difference"),
    [
        ([1, 2, 3], [1, 2, 3], True, None),
        ([1, 2, 3], [1, 2, 3, 4], True, 3),
        ([1, 2, 3], [1, 2, 3, 4], False, None),
        ([1, 2, 3], [1, 2], True, 2),
        ([1, 2, 3], [1, 2], False, 2),
        ([1, 2, 3], [1, 5, 3], False, 1),
        ([1], [], True, 0),
    ],
)
def test_where_two_logs_part(own: list[int], other: list[int], is_whole: bool, difference: int | None) -> None:
    log = Copied()
    log.came([TokenEvent(id="x", start=0, tokens=own, finish_reason=FinishReason.STOP if is_whole else None)])
    assert log.difference(other) == difference


# Bugs that the tests above must catch


def _blocks(self: Ingress, request: GenerationRequest, **of: Any) -> Any:
    async def lead() -> Any:
        async for batch in original_lead(self, request, **of):
            if batch[-1].finish_reason is not None and self._shadows._running:
                await asyncio.wait(self._shadows._running)
            yield batch

    return lead()


def _fails_with_it(self: Shadows, request: GenerationRequest, *, of: str) -> Any:
    original = original_copy(self, request, of=of)
    if not isinstance(original, Copied):
        return original

    class Fragile(Copied):
        def came(self, events: Any) -> None:
            if any(task.done() and task.exception() for task in copies):
                raise ReplicaLost("the copy is gone")

    copies = list(self._running)
    return Fragile()


original_lead, original_copy = Ingress._lead, Shadows.copy
BUGS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "the client waits for the copy": (Ingress, "_lead", _blocks, test_no_client_waits_for_a_slow_copy),
    "the client fails with the copy": (Shadows, "copy", _fails_with_it, test_no_client_hears_of_a_copy_that_fails),
    "load does not matter": (Shadows, "shed", lambda self: None, test_copies_go_first_when_requests_wait),
    "nobody is ever busy": (Shadows, "_is_busy", lambda self, model: False, test_copies_go_first_when_requests_wait),
    "the tenant's priority is kept": (shadow, "LAST", -5, test_a_copy_is_behind_everybody_and_costs_no_tenant_anything),
    "only lengths are compared": (
        Copied,
        "difference",
        lambda self, tokens: None if len(tokens) == len(self.tokens) else 0,
        lambda: test_where_two_logs_part([1, 2, 3], [1, 5, 3], False, 1),
    ),
    "a cut answer is whole": (
        Copied,
        "has_had_enough",
        lambda self, num_tokens: False,
        test_of_an_answer_that_was_cut_off_what_came_is_compared,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted, test = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises((AssertionError, ReplicaLost)):
        test()


def test_without_a_rollout_nothing_is_copied() -> None:
    async def scenario() -> None:
        service = Service(CANARY)
        await service.ask()
        assert isinstance(service.backends[CANARY], FakeBackend)
        assert not service.backends[CANARY].requests

    play(scenario)
