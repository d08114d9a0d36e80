"""Replicas that are replaced, scaled down or taken away: who takes what is new, and where the rest goes on.

The real replica, line and station 7 over an engine that counts, on a virtual clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from shoal.parallel.group import RankInfo
from shoal.router import line_client
from shoal.router.backend import ModelInfo
from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.line_client import Address, LineBackend
from shoal.router.line_server import LineServer
from shoal.router.meters import ResumeMeter
from shoal.router.replica import MARGIN_S, Depart, Parts, Replica, no_notice
from shoal.router.resume import Resume
from shoal.runtime.errors import EngineDead, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from shoal.runtime.grammar import FREE, Constraint
from shoal.runtime.stats import Stats

from . import virtual_time
from .fakes import SECRET

TOKEN_S = 0.5
DRAIN_S = 20.0
MODEL, OTHER = "weights 1", "weights 2"


class Counting:
    """An engine whose logs say 0, 1, 2, ... and an offset that is its model's."""

    def __init__(self, digest: str) -> None:
        self.healthy = True
        self.state = "ready"
        self.closed = False
        self.taken: list[str] = []
        self._offset = 100 * (digest == OTHER)
        self._draining = False
        self._live: set[str] = set()
        self._ended = asyncio.Event()  # by the drain

    @property
    def ready(self) -> bool:
        return not self._draining

    async def generate(
        self, request: GenerationRequest, constraint: Constraint = FREE
    ) -> AsyncGenerator[list[TokenEvent], None]:
        if self._draining:
            raise Unavailable("the engine is draining")
        self.taken.append(request.id)
        self._live.add(request.id)
        try:
            for i in range(len(request.tokens), request.params.max_tokens or 0):
                try:
                    async with asyncio.timeout(TOKEN_S):
                        await self._ended.wait()
                    yield [TokenEvent(id=request.id, start=i, tokens=[], finish_reason=FinishReason.ABORT)]
                    return
                except TimeoutError:
                    end = FinishReason.LENGTH if i + 1 == request.params.max_tokens else None
                    yield [TokenEvent(id=request.id, start=i, tokens=[i + self._offset], finish_reason=end)]
        finally:
            self._live.discard(request.id)

    def stats(self) -> Stats:
        return Stats(num_running=len(self._live))

    def ranks(self) -> list[RankInfo]:
        return []

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self._ended.set()

    def close(self) -> None:
        self.closed = True


class NoGrammars:
    async def acheck(self, spec: Any) -> None: ...

    def constraint(self, spec: Any, tokens: list[int] | None = None) -> Constraint:
        return FREE

    def close(self) -> None: ...


class Service:
    """One ingress's way to replicas, which are found as they come."""

    def __init__(self) -> None:
        self.engines: dict[str, Counting] = {}
        self.replicas: dict[str, Replica] = {}
        self.leaving: list[asyncio.Task[None]] = []
        self.asked: list[asyncio.Task[list[int]]] = []
        self.found: list[Address] = []
        self.backend = LineBackend(self._find, secret=SECRET, rng=random.Random(0))
        self.registry = CollectorRegistry()
        self.clock = asyncio.get_running_loop().time
        self.resume = Resume(
            self.backend,
            LeastLoaded(self.backend.replicas, rng=random.Random(0)),
            config=RouterConfig(),
            meter=ResumeMeter(self.registry),
            clock=self.clock,
        )
        self.backend.start()

    async def _find(self) -> list[Address]:
        return self.found

    async def bring(
        self,
        name: str,
        digest: str = MODEL,
        *,
        watch: Callable[[Depart], Coroutine[Any, Any, None]] = no_notice,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.engines[name] = engine = Counting(digest)
        info = ModelInfo(model="m", digest=digest, max_model_len=512, vocab_size=260, created=len(self.engines))
        parts = Parts(engine, NoGrammars(), info, drain_timeout_s=drain_s, watch=watch)
        self.replicas[name] = Replica(lambda: parts, SECRET)
        self.found.append(await self.replicas[name].listen(name, "127.0.0.1"))

    async def connected(self, *names: str) -> None:
        while not set(names) <= set(self.backend.replicas()):
            await asyncio.sleep(0.1)

    def shut_down(self, name: str) -> asyncio.Task[None]:
        """As Serve does when it replaces a replica or scales down: no new ingress finds it."""
        self.found = [address for address in self.found if address.replica != name]
        self.leaving.append(asyncio.create_task(self.replicas[name].shutdown()))
        return self.leaving[-1]

    async def ask(self, name: str, num_tokens: int = 4, *, digest: str = MODEL) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens)
        request = GenerationRequest(id=name, prompt=[1, 2], params=params, seed=1, digest=digest)
        return [token async for batch in self.resume.follow(request) for event in batch for token in event.tokens]

    def start(self, name: str, num_tokens: int, *, digest: str = MODEL) -> asyncio.Task[list[int]]:
        self.asked.append(asyncio.create_task(self.ask(name, num_tokens, digest=digest)))
        return self.asked[-1]

    def interrupted(self) -> dict[str, float]:
        return {
            sample.labels["cause"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "shoal_generations_interrupted_total"
        }


@asynccontextmanager
async def service(*names: str) -> AsyncIterator[Service]:
    service = Service()
    for name in names:
        await service.bring(name)
    await service.connected(*names)
    try:
        yield service
    finally:
        await service.backend.close()
        for task in (*service.asked, *service.leaving):
            task.cancel()
        await asyncio.gather(*service.asked, *service.leaving, return_exceptions=True)
        for replica in service.replicas.values():
            await replica.shutdown()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(scenario, timeout_s=1000)


def test_nobody_is_refused_while_one_replaces_the_only_one() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            asked = []
            num_taken = 0
            for i in range(100):
                asked.append(at.start(f"r{i}", 4))
                await asyncio.sleep(0.1)
                if i == 30:
                    at.shut_down("a")
                if i == 60:
                    await at.bring("b")
                    await at.connected("b")
                    num_taken = len(at.engines["a"].taken)
            assert [await answer for answer in asked] == [[0, 1, 2, 3]] * 100
            await at.leaving[0]
            assert at.engines["a"].closed
            assert len(at.engines["a"].taken) == num_taken, "the old one took what the new one could"
            assert at.interrupted() == {}, "nothing had to move"

    run(scenario)


def test_one_that_leaves_goes_as_soon_as_it_may() -> None:
    """Others are there, and nothing runs on it; or no ingress is left to ask."""

    async def scenario() -> None:
        async with service("a", "b") as at:
            began = at.clock()
            await at.shut_down("a")
            assert at.clock() - began < 1.0
            await at.backend.close()
            began = at.clock()
            await at.shut_down("b")
            assert at.clock() - began < 1.0

    run(scenario)


def test_a_dead_one_makes_nobody_wait() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            at.engines["a"].healthy = False
            began = at.clock()
            await at.shut_down("a")
            assert at.clock() - began < 1.0

    run(scenario)


def test_what_runs_ends_where_it_is_in_the_time_there_is() -> None:
    async def scenario() -> None:
        async with service("a", "b") as at:
            running = [at.start(f"r{i}", int(0.9 * DRAIN_S / TOKEN_S)) for i in range(4)]
            await asyncio.sleep(1.0)
            assert at.engines["a"].taken, "of four one is there"
            await at.shut_down("a")
            assert [len(await answer) for answer in running] == [int(0.9 * DRAIN_S / TOKEN_S)] * 4
            assert at.interrupted() == {}

    run(scenario)


def test_the_rest_is_handed_over_at_the_deadline() -> None:
    async def scenario() -> None:
        async with service("a", "b") as at:
            num = int(3 * DRAIN_S / TOKEN_S)
            running = [at.start(f"r{i}", num) for i in range(4)]
            await asyncio.sleep(1.0)
            num_moved, began = len(at.engines["a"].taken), at.clock()
            assert num_moved
            await at.shut_down("a")
            assert DRAIN_S <= at.clock() - began < DRAIN_S + 2.0
            assert [await answer for answer in running] == [list(range(num))] * 4
            assert at.interrupted() == {"handed_over": num_moved}

    run(scenario)


def test_a_log_waits_for_who_goes_on_with_it() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            num = int(3 * DRAIN_S / TOKEN_S)
            running = at.start("r", num)
            await asyncio.sleep(1.0)
            await at.shut_down("a")
            await asyncio.sleep(RouterConfig().resume_wait_s / 2)
            await at.bring("b")
            assert await running == list(range(num))

    run(scenario)


def test_only_where_nobody_goes_on_with_it_the_client_is_told() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            running = at.start("r", int(3 * DRAIN_S / TOKEN_S))
            await asyncio.sleep(1.0)
            began = at.clock()
            await at.shut_down("a")
            with pytest.raises(Unavailable, match="resume_wait_s"):
                await running
            waited = at.clock() - began - DRAIN_S
            assert RouterConfig().resume_wait_s <= waited < RouterConfig().resume_wait_s + 2.0

    run(scenario)


class Notices:
    """A machine's word. `told`: the seconds that are left."""

    def __init__(self, *told: float | None) -> None:
        self._told = told
        self.go = asyncio.Event()

    async def watch(self, depart: Depart) -> None:
        await self.go.wait()
        await asyncio.gather(*(depart(left_s) for left_s in self._told))


def test_a_notice_moves_what_runs_before_the_machine_goes() -> None:
    async def scenario() -> None:
        async with service("b") as at:
            notices = Notices(15.0)
            await at.bring("a", watch=notices.watch)
            await at.connected("a")
            running = [at.start(f"r{i}", 100) for i in range(4)]
            await asyncio.sleep(1.0)
            began, num_moved = at.clock(), len(at.engines["a"].taken)
            assert num_moved
            notices.go.set()
            await asyncio.sleep(1.0)
            await asyncio.gather(*(at.ask(f"new {i}", 1) for i in range(4)))
            assert len(at.engines["a"].taken) == num_moved, "what is new goes elsewhere at once"
            await at.replicas["a"].check_health()
            while not at.interrupted():
                await asyncio.sleep(0.1)
            assert 15.0 - MARGIN_S <= at.clock() - began < 15.0
            assert [await answer for answer in running] == [list(range(100))] * 4
            assert at.interrupted() == {"handed_over": num_moved}
            with pytest.raises(EngineDead, match="taken away"):
                await at.replicas["a"].check_health()

    run(scenario)


@pytest.mark.parametrize("told", [(6.0,), (60.0, 6.0)])
def test_the_sooner_end_counts(told: tuple[float, ...]) -> None:
    """Serve shuts it down, too, since a replacement runs; and the cloud may correct itself."""

    async def scenario() -> None:
        async with service("b") as at:
            notices = Notices(*told)
            await at.bring("a", watch=notices.watch)
            await at.connected("a")
            running = [at.start(f"r{i}", 100) for i in range(4)]
            await asyncio.sleep(1.0)
            notices.go.set()
            began = at.clock()
            await at.shut_down("a")
            assert at.clock() - began < 6.0
            assert [await answer for answer in running] == [list(range(100))] * 4

    run(scenario)


def test_a_notice_without_a_time_moves_only_what_is_new() -> None:
    async def scenario() -> None:
        async with service("b") as at:
            notices = Notices(None)
            await at.bring("a", watch=notices.watch)
            await at.connected("a")
            running = [at.start(f"r{i}", 100) for i in range(4)]
            await asyncio.sleep(1.0)
            notices.go.set()
            await asyncio.sleep(1.0)
            num_taken = len(at.engines["a"].taken)
            await asyncio.gather(*(at.ask(f"new {i}", 1) for i in range(4)))
            assert len(at.engines["a"].taken) == num_taken
            assert [await answer for answer in running] == [list(range(100))] * 4
            assert at.interrupted() == {}
            await at.replicas["a"].check_health()

    run(scenario)


def test_no_answer_changes_its_weights() -> None:
    """It waits for a replica of its own model, however many there are of another."""

    async def scenario() -> None:
        async with service("a") as at:
            num = int(3 * DRAIN_S / TOKEN_S)
            running = at.start("r", num)
            await asyncio.sleep(1.0)
            await at.bring("b", OTHER)
            await at.connected("b")
            at.backend.use(OTHER)
            assert await at.ask("new", 2, digest=OTHER) == [100, 101]
            await at.replicas["a"].depart(MARGIN_S)
            await asyncio.sleep(RouterConfig().resume_wait_s / 2)
            assert not running.done()
            await at.bring("c", MODEL)
            assert await running == list(range(num))
            assert at.engines["b"].taken == ["new"]

    run(scenario)


def test_an_answer_whose_weights_are_gone_ends_with_an_error() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            running = at.start("r", int(3 * DRAIN_S / TOKEN_S))
            await asyncio.sleep(1.0)
            await at.bring("b", OTHER)
            await at.connected("b")
            at.backend.use(OTHER)
            await at.replicas["a"].depart(MARGIN_S)
            await at.shut_down("a")
            with pytest.raises(Unavailable, match="resume_wait_s"):
                await running
            with pytest.raises(Unavailable, match="version"):
                await at.ask("late", 1, digest=MODEL)
            assert at.engines["b"].taken == []

    run(scenario)


def test_the_last_of_its_weights_ends_what_runs_there() -> None:
    """However long it takes: there were two of it, and neither may count on the other."""

    async def scenario() -> None:
        async with service("a", "b") as at:
            num = int(3 * DRAIN_S / TOKEN_S)
            running = [at.start(f"r{i}", num) for i in range(6)]
            await asyncio.sleep(1.0)
            assert at.engines["a"].taken
            assert at.engines["b"].taken
            await at.bring("c", OTHER)
            await at.connected("c")
            at.backend.use(OTHER)
            at.shut_down("a")
            await asyncio.sleep(1.0)
            at.shut_down("b")
            await asyncio.sleep(1.0)
            assert await at.ask("new", 2, digest=OTHER) == [100, 101]
            assert [await answer for answer in running] == [list(range(num))] * 6
            assert at.interrupted() == {}
            began = at.clock()
            await asyncio.gather(*at.leaving)
            assert at.clock() - began < 1.0

    run(scenario)


def test_a_short_drain_refuses_nobody_while_ingresses_turn() -> None:
    async def scenario() -> None:
        async with service() as at:
            await at.bring("a", drain_s=0.0)
            await at.connected("a")
            at.backend.use(MODEL)
            running = at.start("r", 20)
            await asyncio.sleep(1.0)
            await at.bring("b", OTHER)
            await at.connected("b")
            left = at.shut_down("a")
            await asyncio.sleep(2.0)
            assert await at.ask("old", 2) == [0, 1]
            at.backend.use(OTHER)
            assert await at.ask("new", 2, digest=OTHER) == [100, 101]
            assert await running == list(range(20))
            await left
            assert at.interrupted() == {}

    run(scenario)


def test_of_a_part_that_is_removed_what_runs_ends() -> None:
    async def scenario() -> None:
        async with service("a") as at:
            num = int(3 * DRAIN_S / TOKEN_S)
            running = at.start("r", num)
            await asyncio.sleep(1.0)
            left = at.shut_down("a")
            at.backend.retire()
            assert await running == list(range(num))
            began = at.clock()
            await left
            assert at.clock() - began < 1.0

    run(scenario)


def test_new_weights_take_over_when_the_ingress_has_them() -> None:
    """Until it asks for the new ones the old ones stay, though they are to go."""

    async def scenario() -> None:
        async with service("a") as at:
            at.backend.use(MODEL)
            await at.bring("b", OTHER)
            await at.connected("b")
            left = at.shut_down("a")
            await asyncio.sleep(2.0)
            assert (await at.backend.info()).digest == OTHER, "which is what stays"
            assert await at.ask("old", 2) == [0, 1]
            assert not left.done()
            at.backend.use(OTHER)
            await left
            assert await at.ask("new", 2, digest=OTHER) == [100, 101]

    run(scenario)


def test_the_model_is_what_most_of_those_serve_that_stay() -> None:
    async def scenario() -> None:
        async with service("a", "b", "c") as at:
            await at.bring("d", OTHER)
            await at.connected("d")
            assert (await at.backend.info()).digest == MODEL
            for name in "ab":
                at.shut_down(name)
            await asyncio.sleep(1.0)
            info = await at.backend.info()
            assert info.digest == OTHER, "of two the newer"
            assert msgspec.structs.replace(info, created=0).model == "m"

    run(scenario)


def _go_without_leave(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LineServer, "released", lambda server: asyncio.sleep(0))


def _never_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LineBackend, "_release", lambda backend: None)


def _release_for_any_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(line_client._Link, "digest", "")


def _leave_the_last_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LineServer, "holds_last", False)


def _say_it_once(patch: pytest.MonkeyPatch) -> None:
    release = line_client._Link.release
    patch.setattr(
        line_client._Link, "release", lambda link, *, is_last: link.is_released or release(link, is_last=is_last)
    )


def _go_on_with_any_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resume, "_foreign", lambda resume, log: frozenset())


def _hand_over_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("shoal.router.replica.MARGIN_S", -1.0)


def _say_no_goodbye(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LineServer, "goodbye", lambda server: server.release())


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (_go_without_leave, test_new_weights_take_over_when_the_ingress_has_them),
        (_never_release, test_one_that_leaves_goes_as_soon_as_it_may),
        (_never_release, test_nobody_is_refused_while_one_replaces_the_only_one),
        (_release_for_any_weights, test_new_weights_take_over_when_the_ingress_has_them),
        (_go_on_with_any_weights, test_no_answer_changes_its_weights),
        (_go_on_with_any_weights, test_an_answer_whose_weights_are_gone_ends_with_an_error),
        (_leave_the_last_too, test_the_last_of_its_weights_ends_what_runs_there),
        (_say_it_once, test_the_last_of_its_weights_ends_what_runs_there),
        (_hand_over_late, test_a_notice_moves_what_runs_before_the_machine_goes),
        (_say_no_goodbye, test_a_notice_without_a_time_moves_only_what_is_new),
    ],
)
def test_planted_bugs_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], scenario: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, Unavailable, TimeoutError, pytest.fail.Exception)):
        scenario()
