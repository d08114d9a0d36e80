"""A generation survives its replica, on a virtual clock: what is continued, what is the client's, and who is blamed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from shoal.router.backend import ReplicaLost
from shoal.router.balance import LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.line_client import LineBackend
from shoal.router.meters import ResumeMeter
from shoal.router.resume import Resume
from shoal.runtime import errors as e
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, StructuredOutputs, TokenEvent

from . import virtual_time
from .fakes import SECRET
from .fleet import RESTART_S, STEP_S, Fleet, LinedFleet, undisturbed


class Station:
    """`Resume` over a fleet, and what it counted."""

    def __init__(self, fleet: Any, **config: Any) -> None:
        self.fleet = fleet
        self.registry = CollectorRegistry()
        loop = asyncio.get_running_loop()
        self.resume = Resume(
            fleet,
            LeastLoaded(fleet.replicas, rng=random.Random(0)),
            config=RouterConfig(**config),
            meter=ResumeMeter(self.registry),
            clock=loop.time,
        )

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"shoal_{name}", labels) or 0.0

    async def read(self, asked: GenerationRequest) -> Seen:
        """Follow a log to its end, and hold it to what a log may do."""
        seen = Seen(asked)
        async for batch in self.resume.follow(asked):
            seen.take(batch)
        assert seen.end is not None, "the log just stopped"
        return seen

    def start(self, asked: GenerationRequest) -> asyncio.Task[Seen]:
        return asyncio.get_running_loop().create_task(self.read(asked))


class Seen:
    def __init__(self, asked: GenerationRequest) -> None:
        self.asked = asked
        self.tokens = list(asked.tokens)
        self.events: list[TokenEvent] = []

    @property
    def end(self) -> FinishReason | None:
        return self.events[-1].finish_reason if self.events else None

    def take(self, batch: list[TokenEvent]) -> None:
        assert batch
        for event in batch:
            assert self.end is None, "an event after the terminal one"
            assert event.start == len(self.tokens)
            assert event.id == self.asked.id
            self.tokens += event.tokens
            self.events.append(event)

    def check(self) -> None:
        wanted = undisturbed(self.asked)
        assert (self.tokens, self.end) == (wanted.tokens, wanted.reason)


def request(name: str = "a", *, seed: int = 7, timeout_s: float | None = None, **params: Any) -> GenerationRequest:
    asked = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **params})
    return GenerationRequest(id=name, prompt=[5, 6, 7 + seed], params=asked, seed=seed, timeout_s=timeout_s)


def run(scenario: Callable[[], Any]) -> None:
    virtual_time.run(scenario, timeout_s=1000)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "frequency_penalty": 0.5},
        {"logprobs": 2},
        {"structured_outputs": StructuredOutputs(regex="x")},
        {"ignore_eos": False, "stop_token_ids": list(range(2, 12))},
    ],
)
@pytest.mark.parametrize("steps", [0.5, 1.5, 5.5, 20.5])
def test_a_log_goes_on_where_it_was(params: dict[str, Any], steps: float) -> None:
    async def scenario() -> None:
        station = Station(Fleet(2))
        reading = station.start(request(**params))
        await asyncio.sleep(steps * STEP_S)
        if not reading.done():
            station.fleet.kill(station.fleet.asked[0][0])
        seen = await reading
        seen.check()
        if params.get("logprobs") is not None:
            assert sum(len(event.logprobs or []) for event in seen.events) == len(seen.tokens)
        await station.fleet.check_at_rest()

    run(scenario)


def test_what_the_next_replica_is_asked() -> None:
    async def scenario() -> None:
        station = Station(Fleet(2))
        asked = request(prompt_logprobs=1, timeout_s=30.0)
        reading = station.start(asked)
        await asyncio.sleep(10.5 * STEP_S)
        first = station.fleet.asked[0][0]
        station.fleet.kill(first)
        seen = await reading
        seen.check()
        (_, before), (replica, after) = station.fleet.asked
        assert before == asked
        assert replica != first
        assert after.id != before.id
        assert len(after.tokens) > 5
        assert after.tokens == seen.tokens[: len(after.tokens)]
        assert (after.prompt, after.seed, after.params.max_tokens) == (asked.prompt, asked.seed, 40)
        assert (before.params.prompt_logprobs, after.params.prompt_logprobs) == (1, None)
        assert [event.prompt_logprobs is not None for event in seen.events].count(True) == 1
        assert after.timeout_s == pytest.approx(30.0 - 10.5 * STEP_S, abs=2 * STEP_S)
        assert station.count("generations_interrupted_total", cause="replica_lost") == 1
        assert station.count("generations_resumed_total") == 1

    run(scenario)


def test_the_prefix_hits_of_the_second_replica_are_not_the_log_s() -> None:
    async def scenario() -> None:
        station = Station(Fleet(2))
        asked = msgspec.structs.replace(request(), prompt=list(range(2, 50)))
        for name in station.fleet.up:  # both know the prompt
            async for _ in station.fleet.generate(msgspec.structs.replace(asked, id=f"warm-{name}"), name):
                pass
        reading = station.start(asked)
        await asyncio.sleep(10.5 * STEP_S)
        station.fleet.kill(station.fleet.asked[-1][0])
        hits = [event.num_cached_tokens for event in (await reading).events]
        assert hits[0] > 0
        assert not any(hits[1:])

    run(scenario)


def test_a_log_lost_before_its_first_token_still_has_its_prompt_s_logprobs() -> None:
    async def scenario() -> None:
        station = Station(Fleet(2))
        reading = station.start(request(prompt_logprobs=0))
        await asyncio.sleep(0.5 * STEP_S)
        station.fleet.kill(station.fleet.asked[0][0])
        seen = await reading
        seen.check()
        assert seen.events[0].prompt_logprobs is not None

    run(scenario)


def test_a_new_log_fails_at_once_where_no_replica_is() -> None:
    async def scenario() -> None:
        station = Station(Fleet(0))
        with pytest.raises(e.Unavailable):
            await station.read(request())
        assert asyncio.get_running_loop().time() == 0

    run(scenario)


def test_a_log_waits_for_a_replica() -> None:
    async def scenario() -> None:
        station = Station(Fleet(1))
        reading = station.start(request())
        await asyncio.sleep(5.5 * STEP_S)
        station.fleet.kill("r1")
        (await reading).check()
        assert station.fleet.asked[-1][0] == "r2"
        assert station.count("resume_pause_seconds_sum") >= RESTART_S

    run(scenario)


def test_it_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        station = Station(Fleet(1), resume_wait_s=RESTART_S / 2)
        reading = station.start(request())
        await asyncio.sleep(5.5 * STEP_S)
        station.fleet.kill("r1")
        with pytest.raises(e.Unavailable, match="resume_wait_s"):
            await reading
        assert asyncio.get_running_loop().time() < RESTART_S
        assert station.count("generations_given_up_total", reason="no_replica") == 1

    run(scenario)


@pytest.mark.parametrize("timeout_s", [1.0, RESTART_S + 0.2])
def test_the_deadline_runs_on(timeout_s: float) -> None:
    """It passes while the log waits, or on the second replica."""

    async def scenario() -> None:
        station = Station(Fleet(1))
        reading = station.start(request(timeout_s=timeout_s, max_tokens=400))
        await asyncio.sleep(5.5 * STEP_S)
        station.fleet.kill("r1")
        (outcome,) = await asyncio.gather(reading, return_exceptions=True)
        if isinstance(outcome, Seen):
            assert outcome.end is FinishReason.TIMEOUT
            outcome = e.RequestTimeout(outcome.events[-1].error or "")
        assert isinstance(outcome, e.RequestTimeout)
        assert f"not finished after {timeout_s:g} s (timeout)" in str(outcome)
        assert asyncio.get_running_loop().time() == pytest.approx(timeout_s, abs=0.1)

    run(scenario)


@pytest.mark.parametrize("attempts", [0, 1, 2])
def test_losses_have_a_budget(attempts: int) -> None:
    async def scenario() -> None:
        station = Station(Fleet(1), resume_attempts=attempts)
        reading = station.start(request(max_tokens=400))
        for _ in range(attempts + 1):
            assert not reading.done()
            await until(lambda: station.fleet.up)
            await asyncio.sleep(20 * STEP_S)  # past its place: no suspect any more
            station.fleet.kill(next(iter(station.fleet.up)))
        with pytest.raises(ReplicaLost):
            await reading
        assert len(station.fleet.asked) == attempts + 1

    run(scenario)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(STEP_S)


def test_a_log_is_refused_where_all_are_full_unless_it_was_taken_in() -> None:
    async def scenario() -> None:
        station = Station(Scripted([e.QueueFull("full")] * 2, num_replicas=2))
        with pytest.raises(e.QueueFull):
            await station.read(request())
        assert asyncio.get_running_loop().time() == 0
        lost_then_full = Scripted([ReplicaLost("x"), *[e.QueueFull("full")] * 5, None], num_replicas=2)
        station = Station(lost_then_full)
        (await station.read(request(max_tokens=3))).check()
        assert len(lost_then_full.asked) == 7
        station = Station(Scripted([ReplicaLost("x"), *[e.QueueFull("full")] * 5000], num_replicas=2))
        with pytest.raises(e.Unavailable, match=r"resume_wait_s.*full"):
            await station.read(request())

    run(scenario)


def test_one_that_gave_it_back_is_chosen_again_by_name() -> None:
    """Where no other is ready; a trial whose place nobody knows would make suspects of its neighbours."""

    async def scenario() -> None:
        station = Station(Scripted([ReplicaLost("x"), e.QueueFull("full"), None], num_replicas=1))
        (await station.read(request(max_tokens=3))).check()
        assert [replica for replica, _ in station.fleet.asked] == ["r1"] * 3

    run(scenario)


def test_a_refusal_by_one_is_not_one_by_all() -> None:
    async def scenario() -> None:
        for refusal in (e.QueueFull("full"), e.Unavailable("draining")):
            station = Station(Scripted([refusal, None], num_replicas=2))
            (await station.read(request(max_tokens=3))).check()
            assert len({name for name, _ in station.fleet.asked}) == 2
            assert station.count("generations_resumed_total") == 0

    run(scenario)


@pytest.mark.parametrize(
    "error", [e.InvalidRequest("x"), e.ContextTooLong("x"), e.RowFailed("x"), e.RequestTimeout("x"), e.EngineError("x")]
)
def test_what_is_the_client_s_is_not_tried_again(error: Exception) -> None:
    async def scenario() -> None:
        station = Station(Scripted([error, None], num_replicas=2))
        with pytest.raises(type(error)):
            await station.read(request())
        assert len(station.fleet.asked) == 1

    run(scenario)


def test_a_drain_hands_over_and_blames_nobody() -> None:
    async def scenario() -> None:
        station = Station(Fleet(2), resume_attempts=1)
        readings = [station.start(request(f"l{i}", seed=i, max_tokens=400)) for i in range(6)]
        await asyncio.sleep(3.5 * STEP_S)
        for name in list(station.fleet.up):
            station.fleet.drain(name)
            await asyncio.sleep(2 * RESTART_S)
        for reading in readings:
            (await reading).check()
        assert station.count("generations_interrupted_total", cause="handed_over") >= 6
        assert station.count("generations_interrupted_total", cause="replica_lost") == 0
        assert station.count("suspects") == 0

    run(scenario)


def test_a_client_that_leaves_aborts_everywhere() -> None:
    async def scenario() -> None:
        station = Station(Fleet(2))
        readings = [station.start(request(f"l{i}", seed=i, max_tokens=200)) for i in range(6)]
        await asyncio.sleep(3.5 * STEP_S)
        station.fleet.kill("r1")
        await asyncio.sleep(3.5 * STEP_S)
        for reading in readings:
            reading.cancel()
        await asyncio.wait(readings)
        await station.fleet.check_at_rest()
        assert station.count("suspects") == 0

    run(scenario)


def test_nothing_is_resumed_once_the_service_ends() -> None:
    async def scenario() -> None:
        station = Station(Fleet(1))
        waiting = station.start(request("a"))
        await asyncio.sleep(3.5 * STEP_S)
        station.fleet.kill("r1")
        await asyncio.sleep(STEP_S)
        station.resume.stop()
        with pytest.raises(ReplicaLost):
            await waiting
        assert asyncio.get_running_loop().time() < 1
        await until(lambda: station.fleet.up)
        running = station.start(request("b"))
        await asyncio.sleep(3.5 * STEP_S)
        station.fleet.kill("r2")
        with pytest.raises(ReplicaLost):
            await running

    run(scenario)


def test_a_replica_that_breaks_its_promise_is_an_error() -> None:
    async def scenario() -> None:
        station = Station(Scripted([None], num_replicas=1, start=3))
        with pytest.raises(e.EngineError, match="broke its promise"):
            await station.read(request())

    run(scenario)


# Who is blamed


@pytest.mark.parametrize("position", [1, 2, 10])
@pytest.mark.parametrize("size", [2, 3])
def test_a_poison_costs_two_replicas_and_no_other_request(position: int, size: int) -> None:
    async def scenario() -> None:
        fleet = Fleet(size, kills=lambda asked, length: asked.seed == 99 and length >= position)
        station = Station(fleet)
        readings = [station.start(request(f"l{i}", seed=i, max_tokens=60)) for i in range(20)]
        await asyncio.sleep(2.5 * STEP_S)
        poison = station.start(request("poison", seed=99))
        for reading in readings:
            (await reading).check()
        with pytest.raises(e.RowFailed, match="two replicas"):
            await poison
        assert fleet.num_deaths == 2
        assert station.count("generations_given_up_total", reason="guilty") == 1
        assert station.count("suspects") == 0

    run(scenario)


def test_a_poison_costs_no_request_of_another_ingress() -> None:
    """Both ingresses have suspects, and but one replica to try them on."""

    async def scenario() -> None:
        fleet = LinedFleet(2, kills=lambda asked, length: asked.seed == 99 and length >= 3)
        lines = [LineBackend(fleet._find, secret=SECRET, rng=random.Random(i)) for i in range(2)]
        stations = [Station(line) for line in lines]
        for line in lines:
            line.start()
        await until(lambda: all(len(line.replicas()) == 2 for line in lines))
        poison = stations[0].start(request("poison", seed=99))
        readings = [stations[i % 2].start(request(f"l{i}", seed=i)) for i in range(24)]
        for reading in readings:
            (await reading).check()
        with pytest.raises(e.RowFailed, match="two replicas"):
            await poison
        assert fleet.num_deaths == 2
        for line in lines:
            await line.close()
        await fleet.close()

    run(scenario)


def test_suspects_go_on_one_at_a_time() -> None:
    async def scenario() -> None:
        fleet = Fleet(2)
        station = Station(fleet)
        readings = [station.start(request(f"l{i}", seed=i, max_tokens=200)) for i in range(8)]
        await asyncio.sleep(5.5 * STEP_S)
        lost = next(iter(fleet.up))
        suspects = {asked.id for name, asked in fleet.asked if name == lost}
        assert len(suspects) == 4
        fleet.kill(lost)
        begun: list[float] = []
        while len(begun) < 4:
            await asyncio.sleep(STEP_S / 2)
            num = sum(asked.id.split("~")[0] in suspects and "~" in asked.id for _, asked in fleet.asked)
            begun += [asyncio.get_running_loop().time()] * (num - len(begun))
        gaps = [later - sooner for sooner, later in pairwise(begun)]
        assert min(gaps) >= 1.9 * STEP_S  # two tokens past its place each
        for reading in readings:
            (await reading).check()

    run(scenario)


class Scripted:
    """A backend whose attempts go as told: an error each, or None for the log as it should be."""

    def __init__(self, script: list[Exception | None], *, num_replicas: int, start: int = 0) -> None:
        self.script = script
        self.asked: list[tuple[str | None, GenerationRequest]] = []
        self._fleet = Fleet(num_replicas)
        self._start = start

    async def generate(
        self, request: GenerationRequest, replica: str | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        self.asked.append((replica, request))
        error = self.script[len(self.asked) - 1]
        if error is not None:
            raise error
        outcome = undisturbed(request)
        start, tokens = len(request.tokens) + self._start, outcome.tokens[len(request.tokens) :]
        yield [TokenEvent(id=request.id, start=start, tokens=tokens, finish_reason=outcome.reason)]

    def replicas(self) -> Any:
        return self._fleet.replicas()
