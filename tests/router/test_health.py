"""What `/ready` and `/v1/cluster` say of a service that is well, stuck, dead, draining or starting anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from shoal.router.backend import ReplicaState, Status, check_ready
from shoal.router.config import RouterConfig
from shoal.router.line import LineLimits, Welcome
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import LineServer
from shoal.runtime.errors import Unavailable
from shoal.runtime.generation import GenerationRequest, TokenEvent
from shoal.runtime.stats import Stats

from .fakes import INFO, MODEL, SECRET, Server, wait_for

LIMITS = LineLimits(beat_s=0.05)
HI = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Replicas:
    """Replicas that say what they are told to, behind the real line."""

    def __init__(self, *names: str) -> None:
        self.problems: dict[str, str | None] = dict.fromkeys(names)
        self.lines: dict[str, LineServer] = {}
        self.found: dict[str, Address] = {}
        self.silent = False

    async def find(self) -> list[Address]:
        for name in self.problems.keys() - self.found.keys():
            self.found[name] = await self._address(name)
        return [self.found[name] for name in self.problems]

    async def _address(self, name: str) -> Address:
        def status() -> Status:
            if self.silent:
                raise RuntimeError("no more beats")  # ends the task that sends them
            return Status(self.problems[name], Stats(num_running=1, num_blocks=4, num_blocks_held=2))

        self.lines[name] = line = LineServer(
            self.generate, secret=SECRET, welcome=Welcome(name, INFO), status=status, limits=LIMITS
        )
        return Address(name, "127.0.0.1", await line.start("127.0.0.1"))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
        await asyncio.sleep(60)
        yield []


@pytest.fixture
def service() -> Iterator[tuple[Server, Replicas]]:
    replicas = Replicas("r1", "r2")
    backend = LineBackend(replicas.find, secret=SECRET, limits=LIMITS)
    with Server(RouterConfig(served_model_name=(MODEL,)), backend) as server:
        server.loop.call_soon_threadsafe(backend.start)
        wait_for(lambda: len(backend.replicas()) == 2, "both replicas")
        yield server, replicas
        asyncio.run_coroutine_threadsafe(backend.close(), server.loop).result(5)
        for line in replicas.lines.values():
            asyncio.run_coroutine_threadsafe(line.close(), server.loop).result(5)


def problem(server: Server) -> str:
    """What `/ready` complains of; empty where it does not."""
    reply = server.get("/ready")
    assert server.get("/health").status == 200  # whatever there is, the process lives
    return "" if reply.status == 200 else str(reply.json["error"]["message"])


@pytest.mark.parametrize("said", ["the engine has stopped making steps", "the ranks restart: rank 1 was killed"])
def test_what_replicas_say_of_themselves(service: tuple[Server, Replicas], said: str) -> None:
    server, replicas = service
    assert problem(server) == ""
    replicas.problems["r1"] = said
    wait_for(lambda: cluster(server)["r1"]["state"] == said, "the beat")
    assert not cluster(server)["r1"]["ready"]
    assert problem(server) == ""  # the other one is well
    replicas.problems["r2"] = "the engine is draining"
    wait_for(lambda: problem(server), "the beat")
    assert problem(server) == f"not ready: r1: {said}; r2: the engine is draining"
    replicas.problems["r2"] = said
    wait_for(lambda: problem(server) == f"not ready: {said} (all 2 replicas)", "the beat")
    replicas.problems["r1"] = None
    wait_for(lambda: not problem(server), "its recovery")


def test_replicas_that_fall_silent(service: tuple[Server, Replicas]) -> None:
    """They are connected, but no more beats come: seen after four of them, two seconds as deployed."""
    server, replicas = service
    replicas.silent = True
    wait_for(lambda: problem(server) == "not ready: the replica does not answer (all 2 replicas)", "it to be noticed")
    before = cluster(server)["r1"]["heard_s"]
    assert before > 4 * LIMITS.beat_s
    wait_for(lambda: cluster(server)["r1"]["heard_s"] > before, "the clock")


def test_replicas_that_leave(service: tuple[Server, Replicas]) -> None:
    """One leaves what is new to the other; the last one takes it until it is gone."""
    server, replicas = service
    server.loop.call_soon_threadsafe(replicas.lines["r1"].goodbye)
    wait_for(lambda: cluster(server)["r1"]["state"] == "the replica is draining", "its release")
    assert problem(server) == ""
    server.loop.call_soon_threadsafe(replicas.lines["r2"].goodbye)
    wait_for(lambda: cluster(server)["r2"]["leaving"], "the goodbye")
    assert problem(server) == ""
    replicas.problems.clear()
    for line in replicas.lines.values():
        asyncio.run_coroutine_threadsafe(line.close(), server.loop).result(5)
    wait_for(lambda: problem(server) == "not ready: no replica is connected", "the end of the lines")
    assert cluster(server) == {}


def test_a_router_that_drains(service: tuple[Server, Replicas]) -> None:
    server, _ = service
    asyncio.run_coroutine_threadsafe(server.ingress.drain(0.0), server.loop).result(5)
    assert "draining" in problem(server)
    assert server.get("/v1/cluster").json["router"]["draining"] is True


def test_cluster_in_numbers(service: tuple[Server, Replicas]) -> None:
    server, _ = service
    told = server.get("/v1/cluster").json
    replica = told["replicas"][0]
    assert (replica["ready"], replica["state"], replica["running"], replica["kv_usage"]) == (True, "ready", 1, 0.5)
    assert 0 <= replica["heard_s"] < 5
    router = told["router"]
    assert (router["draining"], router["in_flight"], router["queued"]) == (False, 0, 0)
    assert (router["redis_available"], router["cache"]) == (False, {})


def test_the_words_of_each_or_of_all() -> None:
    def state(problem: str | None) -> ReplicaState:
        return ReplicaState(problem=problem, stats=Stats(), ranks=[], in_flight=0, tokens_sent=0)

    check_ready({"a": state("it hangs"), "b": state(None)})
    for replicas, text in (
        ({}, "not ready: no replica is connected"),
        ({"a": state("it hangs")}, "not ready: it hangs"),
    ):
        with pytest.raises(Unavailable, match=f"^{text}$"):
            check_ready(replicas)


def cluster(server: Server) -> dict[str, dict[str, object]]:
    return {replica["id"]: replica for replica in server.get("/v1/cluster").json["replicas"]}
