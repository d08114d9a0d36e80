"""Weights change, a variant dies, is taken back, dropped and added anew, all under load: no request fails of it.

Through the whole application, on a virtual clock, over two fleets of real engines with a fake rank each (fleet.py); and
a test of that test.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp, Message

from shoal.router.api import create_app
from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.ingress import Ingress
from shoal.router.model import Model
from shoal.router.rollout_config import STABLE, RolloutConfig
from shoal.router.shadow import ACCOUNT
from shoal.router.variants import Variants

from . import virtual_time
from .fakes import INFO, MODEL, Reply, byte_level_text
from .fleet import RESTART_S, Fleet, undisturbed
from .rollouts import CANARY

PER_S = 8.0
BOUNDS = {"max_ttft_s": 1.0, "min_requests": 8, "window_s": 10.0}


def fleet_of(size: int, *, first: int) -> Fleet:
    """Its replicas' names are no other fleet's."""
    fleet = Fleet(0)
    fleet._num_made = first
    for _ in range(size):
        fleet.start()
    return fleet


class Failed(AssertionError):
    """A request has."""


class Service:
    """One ingress, its two fleets, and clients who ask for this and that."""

    def __init__(self, seed: int, *, digest: str = "other", shadow: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.digest = digest
        self.shadow = shadow
        self.stable = fleet_of(4, first=0)
        self.fleets = [self.stable]
        self.answers: Counter[str] = Counter()
        config = RouterConfig(served_model_name=(MODEL,), max_in_flight=32, secret="s" * 32)
        loop = asyncio.get_running_loop()
        self.ingress = Ingress(
            self.stable, config, balancer=self.balancer(self.stable), clock=loop.time, rng=random.Random(seed)
        )
        self.ingress.open(msgspec.structs.replace(INFO, digest="own"), byte_level_text())
        self.app = create_app(self.ingress)
        self._leaving: list[asyncio.Task[None]] = []

    def balancer(self, fleet: Fleet) -> LeastLoaded:
        return LeastLoaded(fleet.replicas, rng=self.rng)

    def add(self) -> Fleet:
        fleet = fleet_of(2, first=100 * len(self.fleets))
        self.fleets.append(fleet)
        model = self.ingress.add_variant(CANARY, fleet, balancer=self.balancer(fleet))
        model.open(msgspec.structs.replace(INFO, digest=self.digest), byte_level_text())
        return fleet

    def drop(self, fleet: Fleet) -> None:
        model = self.ingress.drop(CANARY)

        async def close() -> None:
            await model.unused()
            await fleet.check_at_rest()
            await fleet.close()

        self._leaving.append(asyncio.create_task(close()))

    def roll_out(self, stable: float, canary: float) -> None:
        given = {"weights": {STABLE: stable, CANARY: canary}, "rollback": BOUNDS}
        if self.shadow:
            given["shadow"] = {CANARY: self.shadow}
        self.ingress.roll_out(RolloutConfig.model_validate(given))

    async def load(self, seconds: float) -> None:
        """Requests for so long, and their answers."""
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as all:
            number = 0
            while asyncio.get_running_loop().time() < until:
                await asyncio.sleep(self.rng.expovariate(PER_S))
                number += 1
                all.create_task(self._ask(number))

    async def _ask(self, number: int) -> None:
        rng = self.rng
        body = {
            "model": MODEL,
            "prompt": [2 + number % 200, 2 + number // 200, *(rng.randrange(2, 200) for _ in range(10))],
            "max_tokens": rng.randrange(1, 80),
            "ignore_eos": True,
            "seed": number,
            "stream": rng.random() < 0.5,
        }
        headers = {"X-Shoal-Session": str(rng.randrange(50))} if rng.random() < 0.5 else {}
        reply = await post(self.app, body, headers)
        if reply.status != 200 or b'"error"' in reply.body:
            raise Failed(f"{asyncio.get_running_loop().time():.1f}: {reply.status} {reply.body[-200:]!r}")
        self.answers[reply.headers["x-shoal-variant"]] += 1
        self._check(body, reply)

    def _check(self, body: dict[str, Any], reply: Reply) -> None:
        """It is what the variant would have said undisturbed, and nobody else had a part in it."""
        made = [
            (fleet, request)
            for fleet in self.fleets
            for _, request in fleet.asked
            if request.prompt == body["prompt"] and request.account != ACCOUNT
        ]
        answered = made[-1][0]
        if self.digest != "own":
            parts = [(fleet, request) for fleet, request in made if request.tokens]
            assert all(fleet is answered for fleet, _ in parts), "a log has changed its variant"
        assert (reply.headers["x-shoal-variant"] == STABLE) is (made[0][0] is self.stable) or len(made) > 1
        request = msgspec.structs.replace(made[0][1], tokens=[])
        text, _ = self.ingress.model.text.output(request.params).push(undisturbed(request).tokens, True)
        assert _text_of(reply) == text, "an answer is another"

    async def close(self) -> None:
        await asyncio.gather(*self._leaving)
        await self.ingress.drain(0.0)
        for fleet in self.fleets:
            if fleet.up:
                await fleet.check_at_rest()
                await fleet.close()

    def num_asked(self, fleet: Fleet) -> int:
        """New requests that it was given, copies not counted."""
        return sum(not request.tokens and request.account != ACCOUNT for _, request in fleet.asked)


async def post(app: ASGIApp, body: dict[str, Any], headers: dict[str, str]) -> Reply:
    """One request, straight to the application; the client stays to the end."""
    sent = {"content-type": "application/json"} | headers
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
    }
    asked = [{"type": "http.request", "body": json.dumps(body).encode()}]
    told: list[Message] = []

    async def receive() -> Message:
        if not asked:
            await asyncio.Event().wait()
        return asked.pop()

    async def send(message: Message) -> None:
        told.append(message)

    await app(scope, receive, send)
    given = {name.decode().lower(): value.decode() for name, value in told[0]["headers"]}
    return Reply(told[0]["status"], given, b"".join(message["body"] for message in told[1:]))


def _text_of(reply: Reply) -> str:
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return str(reply.json["choices"][0]["text"])
    return "".join(str(chunk["choices"][0]["text"]) for chunk in reply.chunks)


async def at(second: float) -> None:
    await asyncio.sleep(second - asyncio.get_running_loop().time())


async def change(service: Service) -> None:
    """All that may happen to a variant, in half a minute."""
    canary = service.add()
    await at(1)
    service.roll_out(60, 40)
    await at(5)
    assert service.num_asked(canary) > 2
    for name in list(canary.up):  # it dies, and is back after a while
        canary.kill(name)
    asked = len(canary.asked)
    await at(5 + RESTART_S - 0.1)
    assert len(canary.asked) == asked
    await at(10)
    assert len(canary.asked) > asked
    service.roll_out(50, 50)
    service.stable.kill(next(iter(service.stable.up)))
    canary.drain(next(iter(canary.up)))
    await at(12)
    for replica in canary.up.values():  # it stands still for a while, and first tokens come late
        replica.stopped = True
    await at(14.5)
    for replica in canary.up.values():
        replica.stopped = False
    await at(17)
    assert "first tokens" in state(service)
    asked = service.num_asked(canary)
    service.roll_out(50, 50)
    await at(19)
    assert service.num_asked(canary) == asked
    service.roll_out(60, 40)
    await at(22)
    assert state(service) == "serving"
    assert service.num_asked(canary) > asked
    service.drop(canary)
    asked = service.num_asked(canary)
    await at(24)
    assert service.num_asked(canary) <= asked + 1  # one may have been on its way
    again = service.add()
    await at(27)
    assert service.num_asked(again) > 2
    service.roll_out(0, 100)
    await at(29)
    service.roll_out(100, 0)


def state(service: Service) -> str:
    return str(service.ingress.variants.describe()[1]["state"])


def roll(seed: int, **of: Any) -> Service:
    async def scenario() -> Service:
        before = asyncio.all_tasks()
        service = Service(seed, **of)
        async with asyncio.TaskGroup() as all:
            all.create_task(service.load(30))
            all.create_task(change(service))
        await service.close()
        assert not asyncio.all_tasks() - before, "a task is left"
        return service

    return virtual_time.run(scenario, timeout_s=120)


@pytest.mark.parametrize(("seed", "of"), [(0, {"shadow": 0.5}), (1, {"digest": "own"})])
def test_no_request_fails_of_a_change(seed: int, of: dict[str, Any]) -> None:
    service = roll(seed, **of)
    assert service.answers[STABLE] > 100
    assert service.answers[CANARY] > 50
    if "shadow" in of:
        family = service.ingress.metrics.variants.shadows.collect()[0]
        copies = {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}
        assert copies["same"] > 10
        assert "differs" not in copies


@pytest.mark.parametrize("digest", ["own", "other"])
def test_a_log_changes_its_variant_only_where_that_changes_nothing(digest: str) -> None:
    async def scenario() -> None:
        service = Service(0, digest=digest)
        canary = service.add()
        service.roll_out(0, 100)
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "seed": 1}
        asked = asyncio.create_task(post(service.app, body, {}))
        await at(0.5)
        for name in list(canary.up):
            canary.kill(name)
        reply = await asked
        assert reply.status == 200
        assert reply.headers["x-shoal-variant"] == CANARY
        ended = asyncio.get_running_loop().time()
        if digest == "own":
            assert ended < RESTART_S
            (resumed,) = [request for _, request in service.stable.asked]
            assert resumed.tokens
        else:
            assert ended > RESTART_S
            assert not service.stable.asked
        await service.close()

    virtual_time.run(scenario)


# Bugs that the test above must catch


async def _at_once(self: Model) -> None:
    return


BUGS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "who is not ready gets its share": (Variants, "_absence", lambda self, name: None),
    "a variant that was dropped is closed at once": (Model, "unused", _at_once),
    "a verdict falls and nothing follows": (
        Variants,
        "_absence",
        lambda self, name: None if name in self._members and self._members[name].is_ready else "not_ready",
    ),
    "logs go on anywhere": (
        Variants,
        "twin_of",
        lambda self, model: next(other for other in self._members.values() if other is not model),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, ExceptionGroup)):
        roll(0)
