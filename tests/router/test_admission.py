"""The door: waiting, deadlines, draining and accounts, on a virtual clock. The order: `test_admission_queue.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from shoal.router.admission import Admission, Place
from shoal.router.body import ClientGone
from shoal.router.config import RouterConfig, Rung
from shoal.router.meters import AdmissionMeter
from shoal.router.rates import RateLimited, Rates
from shoal.router.store import NoStore
from shoal.router.tenant import Tenant
from shoal.runtime.errors import QueueFull, RequestTimeout, ShoalError, Unavailable

from .virtual_time import run

ANN, BOB = Tenant(name="ann", salt="a"), Tenant(name="bob", salt="b")


class Door:
    """An admission and its registry. Made inside the loop, whose time is its clock."""

    def __init__(self, **config: object) -> None:
        self.registry = CollectorRegistry()
        clock = asyncio.get_running_loop().time
        self.admission = Admission(
            RouterConfig(**config),  # type: ignore[arg-type]
            rates=Rates(NoStore(), clock=clock),
            meter=AdmissionMeter(self.registry),
            clock=clock,
        )

    async def enter(self, tenant: Tenant = ANN, weight: int = 1, **more: object) -> Place:
        return await self.admission.place(tenant, weight=weight, **more)  # type: ignore[arg-type]

    def waits(self, tenant: Tenant = ANN, weight: int = 1, **more: object) -> asyncio.Task[Place]:
        return asyncio.create_task(self.enter(tenant, weight, **more))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"shoal_{name}", labels)


async def refusal(work: Awaitable[object]) -> ShoalError:
    with pytest.raises(ShoalError) as caught:
        await work
    return caught.value


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """The test as a scenario on virtual time."""

    def runs() -> None:
        run(test)  # type: ignore[arg-type]

    runs.__name__, runs.__doc__ = test.__name__, test.__doc__
    return runs


@virtual
async def test_who_does_not_fit_waits_for_a_place() -> None:
    door = Door(max_in_flight=2)
    first = await door.enter(weight=2)
    second = door.waits()
    await asyncio.sleep(3)
    assert not second.done()
    assert door.value("router_queued", tenant="ann") == 1
    assert door.value("router_load") == 1.5
    first.close()
    ticket = await second
    assert ticket.waited_s == 3
    assert door.value("router_queued", tenant="ann") == 0
    assert door.admission.in_flight == 1


@virtual
async def test_a_ticket_closes_once() -> None:
    door = Door()
    ticket, other = await door.enter(weight=2), await door.enter()
    ticket.close()
    ticket.close()
    assert door.admission.in_flight == other.weight == 1


@virtual
async def test_the_longest_wait() -> None:
    door = Door(max_in_flight=1, max_wait_s=7)
    await door.enter()
    error = await refusal(door.enter())
    assert isinstance(error, Unavailable)
    assert "7 s (max_wait_s)" in str(error)
    assert asyncio.get_running_loop().time() == 7


@virtual
async def test_a_deadline_passes_in_the_queue() -> None:
    door = Door(max_in_flight=1, max_wait_s=7)
    ticket = await door.enter()
    assert isinstance(await refusal(door.enter(timeout_s=2.5)), RequestTimeout)
    assert asyncio.get_running_loop().time() == 2.5
    assert isinstance(await refusal(door.enter(timeout_s=0)), RequestTimeout)
    ticket.close()
    assert door.admission.in_flight == 0, "who has left the queue got a place"


@virtual
async def test_leaving_the_queue_leaves_nothing_behind() -> None:
    door = Door(max_in_flight=2)
    first = await door.enter()
    heavy, light = door.waits(BOB, 2), door.waits()
    await asyncio.sleep(1)
    assert not light.done(), "overtook one who waits for more"
    heavy.cancel()
    assert isinstance(await light, Place)
    assert door.value("router_queued", tenant="bob") == 0
    first.close()
    (await light).close()
    assert door.admission.in_flight == 0


@virtual
async def test_leaving_at_the_very_moment_of_ones_turn() -> None:
    door = Door(max_in_flight=1)
    first = await door.enter()
    leaving, staying = door.waits(), door.waits()
    await asyncio.sleep(1)
    first.close()
    leaving.cancel()
    (await staying).close()
    assert leaving.cancelled()
    assert door.admission.in_flight == 0


@virtual
async def test_draining_refuses_who_waits_and_lets_the_rest_end() -> None:
    door = Door(max_in_flight=2)
    ticket = await door.enter()
    waiting = [door.waits(BOB, 2), door.waits(ANN), door.waits(BOB)]
    await asyncio.sleep(1)
    door.admission.drain()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    tickets: list[Place] = [end for end in ends if isinstance(end, Place)]
    refused = [end for end in ends if isinstance(end, Unavailable)]
    assert len(tickets) + len(refused) == 3
    assert isinstance(ends[0], Unavailable)
    assert isinstance(await refusal(door.enter()), Unavailable)
    with pytest.raises(Unavailable, match="draining"):
        door.admission.check(ANN)
    for open_ in (ticket, *tickets):
        open_.close()
    assert door.admission.in_flight == 0


@virtual
async def test_a_full_queue_puts_out_whoever_has_most_in_it() -> None:
    door = Door(max_in_flight=1, max_waiting=2)
    await door.enter()
    first, last = door.waits(), door.waits()
    await asyncio.sleep(1)
    bob = door.waits(BOB)
    await asyncio.sleep(0)
    error = await refusal(last)
    assert isinstance(error, QueueFull)
    assert not first.done()
    assert not bob.done()
    assert isinstance(await refusal(door.enter()), QueueFull)
    for task in (first, bob):
        task.cancel()


@virtual
async def test_nobody_is_let_in_to_wait_in_vain() -> None:
    door = Door(max_in_flight=1, max_wait_s=60)
    for _ in range(5):  # one ends every ten seconds
        ticket = await door.enter()
        await asyncio.sleep(10)
        ticket.close()
    await door.enter()
    waiting = [door.waits(timeout_s=25), door.waits(timeout_s=25)]
    await asyncio.sleep(0)
    error = await refusal(door.enter(timeout_s=25))
    assert isinstance(error, QueueFull)
    assert "30.0 s" in str(error)
    assert asyncio.get_running_loop().time() == 50, "it was refused only later"
    for task in waiting:
        task.cancel()


@virtual
async def test_rates_are_charged_with_the_most_and_settled_with_what_it_was() -> None:
    door = Door()
    tenant = Tenant(name="t", salt="", tokens_per_minute=600)
    grant = await door.admission.grant(tenant, tokens=500)
    assert grant.headers["x-ratelimit-remaining-tokens"] == "100"
    error = await refusal(door.admission.grant(tenant, tokens=500))
    assert isinstance(error, RateLimited)
    assert error.retry_after == pytest.approx(40)  # 400 more, at 10 a second
    grant.use(150)
    grant.close()
    grant.close()
    await door.admission.close()
    assert (await door.admission.grant(tenant, tokens=450)).headers["x-ratelimit-remaining-tokens"] == "0"
    assert door.value("tenant_requests_total", tenant="t", outcome="rate_limited") == 1
    assert door.value("tenant_requests_total", tenant="t", outcome="served") == 1


@virtual
async def test_more_than_was_charged_is_not_taken() -> None:
    """What the limits have no room for any more could not be settled at all."""
    door = Door()
    tenant = Tenant(name="t", salt="", token_budget=1000)
    grant, last = await door.admission.grant(tenant, tokens=100), await door.admission.grant(tenant, tokens=900)
    grant.use(400)
    grant.close()
    last.close()
    await door.admission.close()
    assert (await door.admission.grant(tenant, tokens=0)).headers["x-ratelimit-remaining-budget"] == "900"


@virtual
async def test_metrics_name_the_configs_tenants_and_not_any_number_of_others() -> None:
    door = Door(tenants=({"name": "late"},))
    (await door.admission.grant(ANN, tokens=1)).close(ClientGone())
    assert door.value("tenant_requests_total", tenant="ann", outcome="client_gone") == 1
    for number in range(600):
        (await door.admission.grant(Tenant(name=f"stored-{number}", salt=""), tokens=1)).close()
    (await door.admission.grant(Tenant(name="late", salt=""), tokens=1)).close()
    shown = {s.labels["tenant"] for f in door.registry.collect() for s in f.samples if "tenant" in s.labels}
    assert {"late", "stored-0", "other"} <= shown
    assert len(shown) < 300
    assert door.value("tenant_requests_total", tenant="late", outcome="served") == 1


@virtual
async def test_who_is_not_served_pays_nothing_and_a_cached_answer_is_one_request() -> None:
    door = Door(max_in_flight=1, max_wait_s=1)
    tenant = Tenant(name="t", salt="", requests_per_minute=3, token_budget=1000)
    refused = await door.admission.grant(tenant, tokens=900)
    refused.close(QueueFull("no room"))
    await door.admission.close()
    cached = await door.admission.grant(tenant, tokens=900)
    cached.close()
    await door.admission.close()
    grant = await door.admission.grant(tenant, tokens=0)
    assert grant.headers["x-ratelimit-remaining-requests"] == "1"
    assert grant.headers["x-ratelimit-remaining-budget"] == "1000"


@virtual
async def test_shedding_spares_those_who_go_first() -> None:
    ladder = Rung(load=1.0, max_tokens=8), Rung(load=1.5, shed=True)
    door = Door(max_in_flight=2, max_wait_s=100, ladder=ladder)
    first = await door.enter(weight=2)
    assert door.admission.check(ANN).max_tokens == 8
    waiting = door.waits()
    await asyncio.sleep(1)
    with pytest.raises(Unavailable, match="shed") as shed:
        door.admission.check(ANN)
    assert shed.value.retry_after == pytest.approx(0.3), "3 generations are to become 2.7, and no pace is known"
    assert door.admission.check(Tenant(name="vip", salt="", priority=-1)).max_tokens == 8
    assert door.value("degraded_requests_total", rung="shed") == 1
    await asyncio.sleep(79)
    first.close()
    place = await waiting
    assert door.admission.check(ANN).max_tokens is None
    await door.enter()
    waiting = door.waits()
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as shed:
        door.admission.check(ANN)
    assert shed.value.retry_after == pytest.approx(0.3 * 80 / 2, rel=0.02), "each of two places is held for 80 s"
    place.close()
    await waiting


@virtual
async def test_overload_times_four_keeps_goodput_and_refuses_at_once() -> None:
    """100 places of 10 s each: ten a second can be served, forty a second come, for five minutes."""
    door = Door(max_in_flight=100, max_waiting=100, max_wait_s=15)
    loop = asyncio.get_running_loop()
    served: list[float] = []
    refused: list[tuple[float, float]] = []

    async def client() -> None:
        came = loop.time()
        try:
            ticket = await door.enter(timeout_s=60)
        except (QueueFull, Unavailable) as error:
            refused.append((error.retry_after, loop.time() - came))
            return
        await asyncio.sleep(10)
        ticket.close()
        served.append(loop.time())

    clients = []
    for _ in range(300 * 40):
        clients.append(asyncio.create_task(client()))
        await asyncio.sleep(1 / 40)
    await asyncio.gather(*clients)
    good = sum(20 < at <= 300 for at in served)
    assert good >= 0.95 * 280 * 10
    assert len(served) + len(refused) == len(clients)
    assert min(retry_after for retry_after, _ in refused) >= 0.1
    late = [waited for _, waited in refused if waited > 0.05]
    assert len(late) <= 0.01 * len(refused), f"{len(late)} of {len(refused)} refusals had waited first"
    assert door.admission.in_flight == 0
