"""A replica and the ingress's side of the line to it, without Ray: the handle is a fake, the frames are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from shoal.router import replica as line
from shoal.router.backend import Failure, ModelInfo, ReplicaLost, error_of, failure_of
from shoal.router.balance import AnyReplica
from shoal.router.metrics import ReplicaBook
from shoal.router.replica import HandleBackend, Parts, Replica
from shoal.router.resume import follow
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

from .fakes import FakeHandle

INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260, eos_token_ids=[257])


class FakeEngine:
    def __init__(self) -> None:
        self.healthy = True
        self.ready = True
        self.ended = 0
        self.closed = False
        self.constraints: list[Constraint] = []
        self.batches: list[list[TokenEvent] | Exception] = []

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


def build(engine: FakeEngine) -> tuple[HandleBackend, FakeHandle]:
    handle = FakeHandle(Replica(lambda: Parts(engine, FakeGrammars(), INFO)))
    return HandleBackend(handle, timeout_s=0.1), handle


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(id="a-0", prompt=[1, 2], params=SamplingParams(**fields), seed=1)


def token(start: int, *, end: FinishReason | None = None, error: str | None = None) -> TokenEvent:
    logprobs = [TokenLogprob(-0.25, 1, [(65, -0.25)])]
    return TokenEvent(id="a-0", start=start, tokens=[65], logprobs=logprobs, finish_reason=end, error=error)


async def collect(backend: HandleBackend, asked: GenerationRequest) -> list[TokenEvent]:
    return [event async for batch in follow(asked, backend=backend, balancer=AnyReplica()) for event in batch]


def run(engine: FakeEngine, asked: GenerationRequest | None = None) -> list[TokenEvent]:
    return asyncio.run(collect(build(engine)[0], asked or request()))


def test_events_cross_the_line_as_they_are() -> None:
    engine = FakeEngine()
    events = [token(0), token(1), token(2, end=FinishReason.LENGTH)]
    engine.batches = [events[:2], events[2:]]
    backend, handle = build(engine)
    assert asyncio.run(collect(backend, request())) == events
    assert engine.ended == 1
    assert handle.cancelled == 0


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
    engine.healthy = False
    engine.batches = [[token(0), token(1, end=FinishReason.ERROR, error="a rank died")]]
    with pytest.raises(e.EngineDead, match="a rank died"):
        run(engine)


def test_a_row_that_fails_alone_is_an_event() -> None:
    engine = FakeEngine()
    engine.batches = [[token(0, end=FinishReason.ERROR, error="NaN")]]
    assert run(engine)[-1].finish_reason is FinishReason.ERROR


def test_a_broken_line_is_a_lost_replica() -> None:
    engine = FakeEngine()
    engine.batches = [[token(0)], [token(1)]]

    async def main() -> None:
        backend, handle = build(engine)
        handle.breaks = ConnectionError("actor died")
        with pytest.raises(ReplicaLost):
            await collect(backend, request())
        assert handle.cancelled == 1

    asyncio.run(main())


def test_leaving_a_stream_cancels_it() -> None:
    engine = FakeEngine()
    engine.batches = [[token(i)] for i in range(100)]

    async def main() -> None:
        backend, handle = build(engine)
        stream = backend.generate(request())
        await anext(stream)
        await stream.aclose()
        assert handle.cancelled == 1

    asyncio.run(main())


def test_closing_the_replica_s_stream_aborts_the_generation() -> None:
    engine = FakeEngine()
    engine.batches = [[token(i)] for i in range(100)]

    async def main() -> None:
        stream = Replica(lambda: Parts(engine, FakeGrammars(), INFO)).generate(line._encode(request()))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.ended == 1

    asyncio.run(main())


def test_info_ready_and_health() -> None:
    engine = FakeEngine()
    backend, handle = build(engine)

    async def main() -> None:
        assert await backend.info() == INFO
        await backend.ready()
        engine.ready = False
        with pytest.raises(e.Unavailable, match="draining"):
            await backend.ready()
        await handle._replica.check_health()
        engine.healthy = False
        with pytest.raises(e.Unavailable, match="stopped making steps"):
            await backend.ready()
        with pytest.raises(e.EngineDead):
            await handle._replica.check_health()

    asyncio.run(main())


def test_a_replica_that_is_shut_down_drains_and_closes() -> None:
    engine = FakeEngine()
    asyncio.run(Replica(lambda: Parts(engine, FakeGrammars(), INFO)).shutdown())
    assert not engine.ready
    assert engine.closed


def test_a_replica_that_does_not_answer_is_not_ready() -> None:
    backend, handle = build(FakeEngine())

    async def never() -> None:
        await asyncio.sleep(30)

    handle._replica.ready = never  # type: ignore[method-assign,assignment]
    with pytest.raises(e.Unavailable, match=r"within 0\.1 s"):
        asyncio.run(backend.ready())


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
