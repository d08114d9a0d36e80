"""A replica whose part goes to sleep: it goes at once when nothing is on it, and who comes meanwhile is held."""

from __future__ import annotations

import asyncio
import random

from prometheus_client import CollectorRegistry

from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.meters import ResumeMeter
from shoal.router.resume import Resume
from shoal.router.wake import Sleep

from .test_drain import DRAIN_S, TOKEN_S, Service, run, service


def may_sleep(at: Service) -> Sleep:
    """Its replicas go without a successor; who asks then wakes `b`."""
    for replica in at.replicas.values():
        replica.sleeps = True

    async def wake() -> None:
        await asyncio.sleep(5)
        await at.bring("b")

    sleep = Sleep(wake, clock=at.clock)
    balancer = LeastLoaded(at.backend.replicas, rng=random.Random(0))
    meter = ResumeMeter(CollectorRegistry())
    at.resume = Resume(at.backend, balancer, config=RouterConfig(), meter=meter, sleep=sleep, clock=at.clock)
    return sleep


def test_one_that_has_nothing_goes_to_sleep_at_once() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            may_sleep(at)
            began = at.clock()
            await at.shut_down("a")
            assert at.clock() - began < 1.0
            assert at.engines["a"].closed

    run(scenario)


def test_one_that_is_to_be_replaced_waits_for_the_other() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            began = at.clock()
            await at.shut_down("a")
            assert at.clock() - began > 0.9 * DRAIN_S

    run(scenario)


def test_what_runs_there_ends_first() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            may_sleep(at)
            answer = at.start("r", 10)
            await asyncio.sleep(3 * TOKEN_S)
            began = at.clock()
            await at.shut_down("a")
            assert 6 * TOKEN_S < at.clock() - began < 8 * TOKEN_S
            assert await answer == list(range(10))

    run(scenario)


def test_nobody_is_refused_while_it_goes() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            sleep = may_sleep(at)
            at.shut_down("a")
            asked = []
            for i in range(40):
                asked.append(at.start(f"r{i}", 1))
                await asyncio.sleep(0.01)
            await asyncio.sleep(2 * TOKEN_S)
            assert len(sleep.held) > 30
            assert [await answer for answer in asked] == [[0]] * 40
            assert len(sleep.held) == 0

    run(scenario)
