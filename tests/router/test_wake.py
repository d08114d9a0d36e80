"""A part that sleeps, on a virtual clock: who asks is held and not refused, and one who waits alone wakes it.

The whole ingress, from ASGI to the resume station, over a fleet of real engines with no replica in it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from shoal.router.api import create_app
from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.ingress import Ingress
from shoal.router.stream import KEEP_ALIVE, KEEP_ALIVE_S, PATIENCE_S
from shoal.router.wake import RETRY_S, Sleep

from . import virtual_time
from .fakes import INFO, MODEL, byte_level_text
from .fleet import DRAIN_S, STEP_S, Fleet

HI = {"role": "user", "content": "hi"}
CHAT = {"model": MODEL, "messages": [HI], "seed": 1, "max_tokens": 20, "ignore_eos": True}
SOON_S = 0.2  # behind the moment at which something is due


@dataclass
class Got:
    """One client's answer: its status, headers and parts, each with when it came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    began_at: float = 0.0
    ended_at: float = 0.0
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @property
    def events(self) -> list[Any]:
        data = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ") and line != b"data: [DONE]"]
        return [json.loads(each) for each in data]

    @property
    def text(self) -> str:
        if self.body.startswith(b"{"):
            said = json.loads(self.body)["choices"][0]["message"]["content"]
            assert isinstance(said, str)
            return said
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in self.events)

    @property
    def num_comments(self) -> int:
        return self.body.count(KEEP_ALIVE)


class Sleepy(Fleet):
    """What goes is not replaced."""

    async def _come_back(self) -> None:
        return


class Town:
    """An ingress over a fleet that sleeps. `wake` starts a replica `start_s` after it is first asked for."""

    def __init__(self, *, start_s: float | None = 4.0, asleep: bool = True, **config: Any) -> None:
        self.fleet = Sleepy(0 if asleep else 1)
        self.start_s = start_s
        self.num_wakes = self.num_cut = self.num_failures = 0
        loop = asyncio.get_running_loop()
        balancer = LeastLoaded(self.fleet.replicas, rng=random.Random(0))
        router = RouterConfig(served_model_name=(MODEL,), **config)
        self.ingress = Ingress(self.fleet, router, balancer=balancer, clock=loop.time)
        self.ingress.open(INFO, byte_level_text())
        self.ingress.model.sleep.allow(self.wake)
        self.app: Callable[..., Coroutine[Any, Any, None]] = create_app(self.ingress)

    async def wake(self) -> None:
        """As a Serve handle's call: it waits for a replica, and counts as demand meanwhile."""
        self.num_wakes += 1
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("the controller is away")
        try:
            await asyncio.sleep(1e9 if self.start_s is None else self.start_s)
        except asyncio.CancelledError:
            self.num_cut += 1
            raise
        self.fleet.start()

    async def ask(self, *, leaves_after: float | None = None, **fields: Any) -> Got:
        loop = asyncio.get_running_loop()
        got, begun = Got(), False
        body = json.dumps(CHAT | fields).encode()

        async def receive() -> dict[str, Any]:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.sleep(1e9 if leaves_after is None else leaves_after)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                got.status, got.began_at = message["status"], loop.time()
                got.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message["body"]:
                got.parts.append((loop.time(), message["body"]))

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.app(_scope("POST", "/v1/chat/completions", headers), receive, send)
        got.ended_at = loop.time()
        return got

    async def get(self, path: str) -> Got:
        got = Got()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                got.status = message["status"]
            else:
                got.parts.append((0.0, message["body"]))

        await self.app(_scope("GET", path, []), receive, send)
        return got


def _scope(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(scenario, timeout_s=2000)


async def undisturbed(**fields: Any) -> str:
    return (await Town(asleep=False).ask(**fields)).text


def test_all_who_come_are_held_and_one_replica_is_woken() -> None:
    async def scenario() -> None:
        town = Town(start_s=40.0)
        wanted = [await undisturbed(seed=seed) for seed in range(6)]
        came_at = asyncio.get_running_loop().time()
        asked = [asyncio.create_task(town.ask(seed=seed, stream=bool(seed % 2))) for seed in range(6)]
        answers = [await each for each in asked]
        assert [answer.status for answer in answers] == [200] * 6
        assert [answer.text for answer in answers] == wanted
        assert all(came_at + 40 < answer.ended_at < came_at + 45 for answer in answers)
        assert (town.num_wakes, len(town.ingress.model.sleep.held)) == (1, 0)
        await town.fleet.check_at_rest()

    run(scenario)


def test_a_quick_wake_is_not_told_of() -> None:
    async def scenario() -> None:
        got = await Town(start_s=PATIENCE_S - 1).ask(stream=True)
        assert (got.status, got.num_comments) == (200, 0)
        assert PATIENCE_S - 1 < got.began_at < PATIENCE_S
        assert got.body.endswith(b"data: [DONE]\n\n")

    run(scenario)


def test_a_slow_wake_is_bridged_with_comments() -> None:
    async def scenario() -> None:
        got = await Town(start_s=31.0).ask(stream=True)
        assert got.status == 200
        assert got.began_at == pytest.approx(PATIENCE_S, abs=SOON_S)
        moments = [at_s for at_s, part in got.parts if part == KEEP_ALIVE]
        due = [PATIENCE_S + KEEP_ALIVE_S * number for number in range(len(moments))]
        assert moments == pytest.approx(due, abs=SOON_S)
        assert moments[-1] > 31.0 - KEEP_ALIVE_S - SOON_S
        assert got.text == await undisturbed()
        assert got.body.count(b"[DONE]") == 1
        assert got.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}

    run(scenario)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_replica_by_the_deadline_is_a_503_with_a_moment_to_come_back(streamed: bool) -> None:
    async def scenario() -> None:
        town = Town(start_s=None)
        got = await town.ask(timeout=PATIENCE_S - 2, stream=streamed)
        assert (got.status, got.headers["retry-after"]) == (503, str(int(RETRY_S)))
        assert got.ended_at == pytest.approx(PATIENCE_S - 2, abs=SOON_S)
        assert "no replica could be started in 8 s" in json.loads(got.body)["error"]["message"]
        assert town.num_cut == 1, "nobody waits any more"

    run(scenario)


def test_behind_the_headers_it_is_an_error_event() -> None:
    async def scenario() -> None:
        got = await Town(start_s=None).ask(timeout=28, stream=True)
        assert (got.status, got.num_comments) == (200, 4)
        assert got.ended_at == pytest.approx(28, abs=SOON_S)
        assert [event["error"]["code"] for event in got.events] == ["unavailable"]
        assert got.body.endswith(b"data: [DONE]\n\n")

    run(scenario)


def test_the_time_that_it_waited_is_the_request_s_own() -> None:
    async def scenario() -> None:
        town = Town(start_s=20.0)
        got = await town.ask(timeout=20.3, max_tokens=400)
        assert got.status == 408
        assert got.ended_at == pytest.approx(20.3, abs=SOON_S)
        ((_, asked),) = town.fleet.asked
        assert asked.timeout_s == pytest.approx(0.3, abs=SOON_S)

    run(scenario)


def test_demand_lasts_while_anybody_waits() -> None:
    async def scenario() -> None:
        town = Town(start_s=100.0)
        leaving = [asyncio.create_task(town.ask(leaves_after=leaves)) for leaves in (5.0, 15.0)]
        await asyncio.sleep(10)
        assert (town.num_cut, len(town.ingress.model.sleep.held)) == (0, 1)
        await asyncio.wait(leaving)
        await asyncio.sleep(SOON_S)
        assert (town.num_cut, len(town.ingress.model.sleep.held)) == (1, 0)
        assert not town.fleet.up

    run(scenario)


async def metric(town: Town, name: str) -> float:
    """Of stable."""
    (line,) = [line for line in (await town.get("/metrics")).body.decode().splitlines() if line.startswith(name + "{")]
    series, value = line.rsplit(" ", 1)
    assert series == name + '{variant="stable"}'
    return float(value)


async def part(town: Town) -> Any:
    (told,) = json.loads((await town.get("/v1/cluster")).body)["parts"]
    return told


def test_who_is_held_shows() -> None:
    async def scenario() -> None:
        town = Town(start_s=30.0)
        assert (await metric(town, "shoal_held_requests"), await metric(town, "shoal_held_seconds")) == (0, 0)
        first = asyncio.create_task(town.ask(seed=1))
        await asyncio.sleep(10)
        second = asyncio.create_task(town.ask(seed=2))
        await asyncio.sleep(10)
        assert await metric(town, "shoal_held_requests") == 2
        assert await metric(town, "shoal_held_seconds") == pytest.approx(20, abs=SOON_S)
        told = await part(town)
        assert (told["name"], told["ready"], told["held"]) == ("stable", 0, 2)
        assert await metric(town, "shoal_replicas_ready") == 0
        await asyncio.gather(first, second)
        assert (await metric(town, "shoal_held_requests"), await metric(town, "shoal_held_seconds")) == (0, 0)
        assert await metric(town, "shoal_replicas_ready") == 1

    run(scenario)


def test_who_waits_for_a_place_is_known_by_part() -> None:
    async def scenario() -> None:
        town = Town(asleep=False, max_in_flight=1)
        asked = [asyncio.create_task(town.ask(seed=seed)) for seed in range(4)]
        await asyncio.sleep(STEP_S)
        queue = town.ingress.model.queue
        assert (len(queue), (await part(town))["queued"]) == (3, 3)
        waited = queue.longest_s
        await asyncio.sleep(STEP_S)
        assert queue.longest_s == pytest.approx(waited + STEP_S)
        await asyncio.gather(*asked)
        assert (len(queue), queue.longest_s) == (0, 0.0)

    run(scenario)


def test_a_wake_that_fails_is_tried_again() -> None:
    async def scenario() -> None:
        town = Town(start_s=2.0)
        town.num_failures = 3
        got = await town.ask()
        assert (got.status, town.num_wakes) == (200, 4)

    run(scenario)


def test_without_leave_to_sleep_it_is_refused_at_once() -> None:
    async def scenario() -> None:
        town = Town()
        town.ingress.model.sleep.allow(None)
        got = await town.ask()
        assert (got.status, got.ended_at, town.num_wakes) == (503, 0.0, 0)

    run(scenario)


def test_who_waits_is_refused_when_the_part_may_sleep_no_more() -> None:
    async def scenario() -> None:
        town = Town(start_s=None)
        waiting = asyncio.create_task(town.ask())
        await asyncio.sleep(3)
        town.ingress.model.sleep.allow(None)
        assert (await waiting).status == 503

    run(scenario)


def test_an_answer_whose_last_replica_goes_to_sleep_goes_on_when_it_is_woken() -> None:
    async def scenario() -> None:
        town = Town(start_s=60.0, asleep=False)
        wanted = await undisturbed(max_tokens=120)
        reading = asyncio.create_task(town.ask(stream=True, max_tokens=120))
        await asyncio.sleep(5 * STEP_S)
        (name,) = town.fleet.up
        town.fleet.drain(name)
        await asyncio.sleep(DRAIN_S + SOON_S)
        assert not town.fleet.up
        got = await reading
        assert (got.text, got.body.count(b"[DONE]")) == (wanted, 1)
        assert town.num_wakes == 1

    run(scenario)


def test_asleep_is_ready_and_says_so() -> None:
    async def scenario() -> None:
        town = Town(start_s=5.0)
        assert (await town.get("/ready")).status == 200
        assert await state(town) == "asleep"
        asked = asyncio.create_task(town.ask())
        await asyncio.sleep(1)
        assert (await town.get("/ready")).status == 200
        assert await state(town) == "waking"
        await asked
        assert await state(town) == "serving"

    async def state(town: Town) -> str:
        (variant,) = json.loads((await town.get("/v1/cluster")).body)["variants"]
        assert isinstance(variant["state"], str)
        return variant["state"]

    run(scenario)


def test_the_service_that_ends_does_not_wait() -> None:
    async def scenario() -> None:
        town = Town(start_s=None)
        waiting = asyncio.create_task(town.ask())
        await asyncio.sleep(2)
        await town.ingress.drain(0.0)
        got = await waiting
        assert (got.status, got.headers["retry-after"]) == (503, "1")

    run(scenario)


def test_demand_is_made_by_the_first_and_kept_for_the_last() -> None:
    async def scenario() -> None:
        begun = ended = 0

        async def wake() -> None:
            nonlocal begun, ended
            begun += 1
            try:
                await asyncio.sleep(1e9)
            finally:
                ended += 1

        sleep = Sleep(wake)
        with sleep.waiting():
            with sleep.waiting():
                await asyncio.sleep(1)
            await asyncio.sleep(1)
            assert (begun, ended) == (1, 0)
        await asyncio.sleep(0)
        assert (begun, ended) == (1, 1)

    run(scenario)
