"""A replica behind the real line, and how an ingress finds it, without Ray: engine and handle are fakes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import count
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shoal.parallel.group import RankInfo
from shoal.router.backend import Failure, ModelInfo, ReplicaLost, ReplicaState, error_of, failure_of
from shoal.router.balance import AnyReplica, LeastLoaded
from shoal.router.config import RouterConfig
from shoal.router.line_client import Address, LineBackend
from shoal.router.meters import ResumeMeter
from shoal.router.metrics import ReplicaBook
from shoal.router.replica import Parts, Replica, ServeDirectory
from shoal.router.resume import Resume
from shoal.runtime import errors as e
from shoal.runtime.generation import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StructuredOutputs,
    TokenEvent,
    TokenLogprob,
)
from shoal.runtime.grammar import FREE, Constraint
from shoal.runtime.stats import Stats

from .fakes import LINE_LIMITS, SECRET, line_to

INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260, eos_token_ids=[257])


class FakeEngine:
    def __init__(self) -> None:
        self.healthy = True
        self.ready = True
        self.ended = 0
        self.closed = False
        self.constraints: list[Constraint] = []
        self.batches: Iterable[list[TokenEvent] | Exception] = []

    async def generate(
        self, request: GenerationRequest, constraint: Constraint = FREE
    ) -> AsyncGenerator[list[TokenEvent], None]:
        self.constraints.append(constraint)
        try:
            for batch in self.batches:
                await asyncio.sleep(0)
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            self.ended += 1

    def stats(self) -> Stats:
        return Stats(num_running=3, steps=5, finished={"stop": 2})

    @property
    def state(self) -> str:
        return "the engine is draining" if self.healthy else "the engine has stopped making steps"

    def ranks(self) -> list[RankInfo]:
        return [RankInfo(rank=0, stage=0, shard=0, pid=77)]

    async def drain(self, timeout_s: float) -> None:
        self.ready = False

    def close(self) -> None:
        self.closed = True


class FakeGrammars:
    async def acheck(self, spec: StructuredOutputs) -> None:
        await asyncio.sleep(0)
        if spec.regex == "(":
            raise e.InvalidRequest("regex is '(': unbalanced", param="structured_outputs.regex")

    def constraint(self, spec: StructuredOutputs, tokens: list[int] | None = None) -> Constraint:
        return FREE

    def close(self) -> None: ...


def build(engine: FakeEngine, **parts: Any) -> Replica:
    return Replica(lambda: Parts(engine, FakeGrammars(), INFO, **parts), SECRET, limits=LINE_LIMITS)


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(id="a-0", prompt=[1, 2], params=SamplingParams(**fields), seed=1)


def token(start: int, *, end: FinishReason | None = None, error: str | None = None) -> TokenEvent:
    logprobs = [TokenLogprob(-0.25, 1, [(65, -0.25)])]
    return TokenEvent(id="a-0", start=start, tokens=[65], logprobs=logprobs, finish_reason=end, error=error)


async def collect(backend: LineBackend, asked: GenerationRequest) -> list[TokenEvent]:
    config = RouterConfig(resume_attempts=0)
    resume = Resume(backend, AnyReplica(), config=config, meter=ResumeMeter(CollectorRegistry()))
    return [event async for batch in resume.follow(asked) for event in batch]


def run(engine: FakeEngine, asked: GenerationRequest | None = None) -> list[TokenEvent]:
    async def main() -> list[TokenEvent]:
        replica = build(engine)
        async with line_to(replica) as backend:
            events = await collect(backend, asked or request())
        await replica.shutdown()
        return events

    return asyncio.run(asyncio.wait_for(main(), 20))


def test_events_cross_the_line_as_they_are() -> None:
    engine = FakeEngine()
    events = [token(0), token(1), token(2, end=FinishReason.LENGTH)]
    engine.batches = [events[:2], events[2:]]
    assert run(engine) == events
    assert engine.ended == 1


@pytest.mark.parametrize(
    "error",
    [
        e.InvalidRequest("n is 5", param="n", code="x"),
        e.ContextTooLong("too long", param="prompt"),
        e.QueueFull("full", retry_after=2.5),
        e.Unavailable("draining", retry_after=3),
        e.EngineDead("dead"),
        e.RowFailed("NaN"),
        e.RequestTimeout("late"),
    ],
)
def test_errors_cross_the_line_as_they_are(error: e.ShoalError) -> None:
    engine = FakeEngine()
    engine.batches = [error]
    with pytest.raises(type(error), match=str(error)) as caught:
        run(engine)
    assert vars(caught.value) == vars(error)


def test_a_bug_in_the_replica_stays_in_its_log() -> None:
    engine = FakeEngine()
    engine.batches = [RuntimeError("secret")]
    with pytest.raises(e.EngineError, match="internal error") as caught:
        run(engine)
    assert "secret" not in str(caught.value)


def test_kinds_that_errors_py_does_not_know_arrive_as_their_base() -> None:
    assert isinstance(error_of(failure_of(ReplicaLost("gone"))), e.EngineDead)
    assert type(error_of(Failure(kind="Nonsense", message="x"))) is e.EngineError


def test_a_bad_grammar_never_reaches_the_engine() -> None:
    engine = FakeEngine()
    engine.batches = [[token(0, end=FinishReason.STOP)]]
    with pytest.raises(e.InvalidRequest, match="unbalanced"):
        run(engine, request(structured_outputs=StructuredOutputs(regex="(")))
    assert engine.constraints == []
    run(engine, request(structured_outputs=StructuredOutputs(regex="a")))
    assert len(engine.constraints) == 1


def test_an_engine_that_dies_is_not_the_log_s_fault() -> None:
    engine = FakeEngine()

    def die() -> Iterator[list[TokenEvent]]:
        yield [token(0)]
        engine.healthy = False
        yield [token(1), token(2, end=FinishReason.ERROR, error="a rank died")]

    engine.batches = die()
    with pytest.raises(e.EngineDead, match="a rank died"):
        run(engine)


def test_an_engine_that_was_dead_before_takes_no_log() -> None:
    engine = FakeEngine()
    engine.healthy = False
    with pytest.raises(e.Unavailable, match="takes no more"):
        run(engine)
    assert engine.constraints == []


def test_a_row_that_fails_alone_is_an_event() -> None:
    engine = FakeEngine()
    engine.batches = [[token(0, end=FinishReason.ERROR, error="NaN")]]
    assert run(engine)[-1].finish_reason is FinishReason.ERROR


def test_leaving_a_stream_aborts_the_generation() -> None:
    engine = FakeEngine()
    engine.batches = ([token(i)] for i in count())

    async def main() -> None:
        async with line_to(build(engine)) as backend:
            stream = backend.generate(request())
            await anext(stream)
            await stream.aclose()
            while not engine.ended:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_info_ready_and_health() -> None:
    engine = FakeEngine()

    async def main() -> None:
        replica = build(engine)
        async with line_to(replica) as backend:
            assert await backend.info() == INFO
            await backend.ready()
            assert await backend.stats() == {"r1": engine.stats()}
            engine.ready = False
            await not_ready(backend, "draining")
            await replica.check_health()
            engine.healthy = False
            await not_ready(backend, "stopped making steps")
            with pytest.raises(e.EngineDead):
                await replica.check_health()

    asyncio.run(asyncio.wait_for(main(), 10))


async def not_ready(backend: LineBackend, reason: str) -> None:
    while True:
        try:
            await backend.ready()
        except e.Unavailable as error:
            if reason in str(error):
                return
        await asyncio.sleep(0.001)


def test_a_replica_that_is_shut_down_drains_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last events arrive."""
    monkeypatch.setattr("shoal.router.replica.TURN_S", 0.0)
    engine = FakeEngine()
    engine.batches = [[token(i)] for i in range(20)] + [[token(20, end=FinishReason.ABORT)]]

    async def main() -> None:
        replica = build(engine, drain_timeout_s=0.1)
        async with line_to(replica) as backend:
            stream = backend.generate(request())
            await anext(stream)
            await replica.__del__()
            rest = [event async for batch in stream for event in batch]
            assert rest[-1].finish_reason is FinishReason.ABORT
            await not_ready(backend, "no replica")

    asyncio.run(asyncio.wait_for(main(), 10))
    assert not engine.ready
    assert engine.closed


def test_listens_once_whoever_asks() -> None:
    async def main() -> None:
        replica = build(FakeEngine())
        first, *others = await asyncio.gather(*(replica.listen("r1", "127.0.0.1") for _ in range(5)))
        assert others == [first] * 4
        await replica.shutdown()

    asyncio.run(main())


class FakeHandle:
    """A DeploymentHandle. answers: of all replicas, None where one of them hangs."""

    def __init__(self, answers: list[Any] | None) -> None:
        self._answers = answers
        self.address = self

    def broadcast(self, method: str) -> FakeHandle:
        assert method == "address"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if self._answers is None:
            raise TimeoutError
        return self._answers

    async def remote(self) -> Address:
        return HERE


HERE = Address("r1", "127.0.0.1", 1)


@pytest.mark.parametrize("answers", [[HERE, RuntimeError("died")], None])
def test_the_directory_lists_who_answers(answers: list[Any] | None) -> None:
    assert asyncio.run(ServeDirectory(FakeHandle(answers))()) == [HERE]


def test_the_least_loaded_replica_is_chosen() -> None:
    def state(owed: int, sent: int = 0, problem: str | None = None) -> ReplicaState:
        return ReplicaState(problem=problem, stats=Stats(tokens_owed=owed), ranks=[], in_flight=0, tokens_sent=sent)

    states: dict[str, ReplicaState] = {}
    balancer = LeastLoaded(lambda: states, rng=random.Random(0))

    def choices(*lost: str) -> set[str | None]:
        return {balancer.choose(request(), lost=frozenset(lost)) for _ in range(50)}

    assert choices() == {None}
    states.update(a=state(100), b=state(10, 50), c=state(60), d=state(0, problem="draining"))
    assert choices() == {"b", "c"}
    assert choices("b", "c") == {"a"}
    assert choices("a", "b", "c") == {None}
    states["b"] = state(10, 51)
    assert choices() == {"c"}


def test_totals_never_fall() -> None:
    book = ReplicaBook()

    def total(name: str = "shoal_generation_tokens") -> float:
        family = next(metric for metric in book.collect() if metric.name == name)
        return sum(sample.value for sample in family.samples)

    def stats(tokens: int, steps: int) -> Stats:
        return Stats(generation_tokens=tokens, steps=steps, finished={"stop": steps})

    book.update({"a": stats(10, 1), "b": stats(20, 2)})
    assert total() == 30
    book.update({"a": stats(15, 2)})  # b is late, or gone
    assert total() == 35
    book.update({"a": stats(15, 2), "b": stats(25, 3)})  # it was late
    assert total() == 40
    book.update({"b": stats(25, 3)})
    book.update({"b": stats(1, 1), "c": stats(0, 0)})  # b started again from zero
    assert total() == 41
    assert total("shoal_request_success") == 2 + 3 + 1


def test_failures_of_ranks_are_counted_by_cause_rank_and_station() -> None:
    book = ReplicaBook()
    book.update({"a": Stats(steps=1, rank_failures={"killed,3,all_reduce": 2, "hang,0,layer": 1})})
    family = next(metric for metric in book.collect() if metric.name == "shoal_rank_failures")
    found = {tuple(sample.labels.values()): sample.value for sample in family.samples}
    assert found == {("a", "killed", "3", "all_reduce"): 2, ("a", "hang", "0", "layer"): 1}
