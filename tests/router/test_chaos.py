"""The router over replicas that are killed, stopped and drained, on a virtual clock; and a test of that test.

All stations of the ingress but HTTP are the real ones, and so is each replica's engine. The model is a hash of all that
was before (tests/runtime/fakes.py), so every answer can be held against the one that nothing happened to.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from shoal.router import resume as station
from shoal.router.backend import ReplicaLost
from shoal.router.balance import LeastLoaded
from shoal.router.cache import Caching, Events, Lead, Led, NoCache, Reading
from shoal.router.config import RouterConfig
from shoal.router.flight import GRACE_S
from shoal.router.headers import Asks
from shoal.router.ingress import Ingress
from shoal.router.probation import Probation
from shoal.router.resume import Resume
from shoal.router.schema import CompletionRequest
from shoal.router.tenant import Tenant
from shoal.router.text import Choice, Piece
from shoal.runtime.errors import QueueFull, RequestTimeout, RowFailed, ShoalError, Unavailable
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent
from shoal.runtime.plan import Admission

from ..runtime.fakes import Row, logprob_of
from . import virtual_time
from .fakes import INFO, MODEL, byte_level_text
from .fleet import Fleet, LinedFleet, undisturbed

pytestmark = pytest.mark.slow

TENANT = Tenant(name="t", salt="salt")
LATE_S = 0.5  # behind its deadline a request has ended by then, where no replica stands still
PER_S = 16.0  # requests


class Violation(AssertionError):
    """A promise was broken."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


class Watched(NoCache):
    """Between the log's maker and its reader: holds every log to what a log may do."""

    def open(self, request: GenerationRequest, lead: Lead, caching: Caching) -> Reading:
        return Led(self._watch(request, lead(request)))

    async def _watch(self, request: GenerationRequest, events: Events) -> Events:
        length, ended, begun = len(request.tokens), False, False
        async with aclosing(events) as batches:  # type: ignore[type-var]
            async for batch in batches:
                for event in batch:
                    must(not ended, "an event behind the terminal one")
                    must(event.start == length, "a token is repeated or missing")
                    must(event.id == request.id, "an event of another log")
                    must(not begun or not event.num_cached_tokens, "prefix hits are counted twice")
                    length += len(event.tokens)
                    ended, begun = event.finish_reason is not None, True
                yield batch
        must(ended, "the log just stopped")


@dataclass
class Ask:
    """One client: what it asks, and after how many pieces it leaves."""

    body: dict[str, Any]
    leaves_after: int | None = None


@dataclass
class Answer:
    """What one client has seen."""

    pieces: list[Piece] = field(default_factory=list)
    error: Exception | None = None
    left: bool = False


def ask(rng: random.Random) -> Ask:
    """Any kind of request: greedy, seeded, penalised, constrained, with logprobs, stops, deadlines, several choices."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": [rng.randrange(2, 200) for _ in range(rng.randrange(1, 40))],
        "max_tokens": rng.randrange(1, 50),
        "seed": rng.randrange(1000),
        "temperature": rng.choice([0, 0.8]),
        "ignore_eos": rng.random() < 0.5,
    }
    options: list[dict[str, Any]] = [
        {"frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"logprobs": 2},
        {"n": rng.randrange(2, 4)},
        {"stop": ["e", "Q", "xy"]},
        {"structured_outputs": {"regex": "[a-z]+"}, "ignore_eos": False},
        {"timeout": rng.uniform(0.2, 4.0)},
    ]
    for option in options:
        if rng.random() < 0.25:
            body |= option
    if "timeout" in body and rng.random() < 0.3:
        body |= {"max_tokens": 300, "ignore_eos": True}  # longer than there is time
    return Ask(body, rng.randrange(1, 10) if rng.random() < 0.1 else None)


class Chaos:
    """One ingress over a fleet, its clients, and one kill a second."""

    def __init__(self, fleet: Fleet, seed: int, *, num_requests: int, **config: Any) -> None:
        loop = asyncio.get_running_loop()
        self.rng = random.Random(seed)
        self.fleet = fleet
        backend = fleet.backend
        self.config = RouterConfig(served_model_name=(MODEL,), **config)
        self.ingress = Ingress(backend, self.config, cache=Watched(), clock=loop.time)
        self.ingress.model.resume = Resume(
            backend,
            LeastLoaded(backend.replicas, rng=self.rng),
            config=self.config,
            meter=self.ingress.metrics.resume,
            clock=loop.time,
        )
        self.ingress.open(INFO, byte_level_text())
        self.num_requests = num_requests
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        clients = asyncio.create_task(self._clients())
        while not clients.done():
            await asyncio.wait([clients], timeout=1.0)
            self._strike()
        await clients
        await self.fleet.check_at_rest()
        must(self.ingress.admission.in_flight == 0, "a place is held at rest")
        must(self.sample("shoal_suspects") == 0, "a suspect is left")
        await self.fleet.close()

    def _strike(self) -> None:
        """One kill a second, and now and then a replica that stops or drains."""
        what = [self.fleet.kill, *([self.fleet.stop] * (self.rng.random() < 0.1))]
        what += [self.fleet.drain] * (self.rng.random() < 0.1)
        for strike in what:
            victims = [name for name, replica in self.fleet.up.items() if replica.problem is None]
            if victims:
                strike(self.rng.choice(victims))

    async def _clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.num_requests):
                await asyncio.sleep(self.rng.expovariate(PER_S))
                group.create_task(self._client(ask(self.rng)))

    async def _client(self, asked: Ask) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            launch = await self.ingress.completion(CompletionRequest.model_validate(asked.body), TENANT, Asks())
        except (QueueFull, Unavailable):
            self.outcomes["not admitted"] += 1
            return
        answer, requests = Answer(), launch.asked.job.requests
        async with launch.flight as flight:
            await self._read(flight, asked, answer)
            if answer.error is None and not answer.left:
                again = [piece async for piece in flight]
                must(not again, "pieces behind the end")
        replicas = {name for request in requests for name in self.fleet.went_to[request.id]}
        stood_still = replicas & self.fleet.stopped
        late_s = loop.time() - began - asked.body.get("timeout", math.inf)
        must(late_s < (GRACE_S + LATE_S if stood_still else LATE_S), "a deadline was lost")
        self._check(flight.choices, requests, answer)

    async def _read(self, flight: Any, asked: Ask, answer: Answer) -> None:
        try:
            async for pieces in flight:
                answer.pieces += pieces
                if asked.leaves_after is not None and len(answer.pieces) >= asked.leaves_after:
                    answer.left = True
                    return
        except Exception as error:  # noqa: BLE001 - judged below
            answer.error = error

    def _check(self, choices: list[Choice], requests: list[GenerationRequest], answer: Answer) -> None:
        for choice, request in zip(choices, requests, strict=True):
            pieces = [piece for piece in answer.pieces if piece.index == choice.index]
            ends = [piece.finish_reason for piece in pieces if piece.finish_reason is not None]
            must(len(ends) <= 1 and (not ends or pieces[-1].finish_reason), "a choice has two ends")
            must(ends or answer.error or answer.left, "a choice has no end")
            self._check_tokens(request, pieces, ended=bool(ends))
        self.outcomes[self._judge(requests, answer)] += 1

    def _check_tokens(self, request: GenerationRequest, pieces: list[Piece], *, ended: bool) -> None:
        wanted, output = undisturbed(request), self.ingress.model.text.output(request.params)
        text, stop = output.push(wanted.tokens, True)
        expected = wanted.tokens[: output.num_tokens]
        tokens = [token for piece in pieces for token in piece.tokens]
        must(tokens == expected[: len(tokens)], "a token has changed")
        if ended:
            must(len(tokens) == len(expected), "a token is missing at the end")
            must("".join(piece.text for piece in pieces) == text, "the text is another")
            reason = FinishReason.STOP if stop is not None else wanted.reason
            must(pieces[-1].finish_reason == reason.value, "the end is another")
        if request.params.logprobs is not None:
            row = Row(Admission(0, [], 0, request.params, 0, []), None)
            for token in [*request.prompt, *tokens]:
                row.append(token)
            scored = [entry for piece in pieces for entry in piece.logprobs or ()]
            expected_scores = [logprob_of(chain) for chain in row.chain[len(request.prompt) :]]
            must(scored == expected_scores, "log-probabilities of other tokens")

    def _judge(self, requests: list[GenerationRequest], answer: Answer) -> str:
        """What became of it, if that was allowed."""
        error = answer.error
        if error is None:
            return "left" if answer.left else "answered"
        most = max(len(self.fleet.went_to[request.id]) for request in requests)
        match error:
            case RequestTimeout():
                must(requests[0].timeout_s != self.config.default_timeout_s, "a deadline that nobody set")
                return "timeout"
            case RowFailed():
                must("two replicas" in str(error) and most >= 2, f"a row failed: {error}")
                return "failed on trial"
            case ReplicaLost():
                must(most > self.config.resume_attempts, "given up before its time")
                return "out of attempts"
            case _:
                raise Violation(f"ended with {error!r}") from error

    def sample(self, name: str, **labels: str) -> float:
        return self.ingress.metrics.registry.get_sample_value(name, labels) or 0.0


def chaos(seed: int, *, num_requests: int, of: type[Fleet] = Fleet, **config: Any) -> Chaos:
    async def scenario() -> Chaos:
        before = asyncio.all_tasks()
        fleet = of(8)
        await fleet.open()
        made = Chaos(fleet, seed, num_requests=num_requests, **config)
        await made.run()
        must(not asyncio.all_tasks() - before, "a task is left")
        return made

    return virtual_time.run(scenario, timeout_s=num_requests / PER_S + 120)


@pytest.mark.parametrize(
    ("of", "seed", "num_requests"), [(Fleet, 0, 2000), (Fleet, 1, 300), (Fleet, 2, 300), (LinedFleet, 3, 400)]
)
def test_every_request_ends_once_and_as_it_would_have(of: type[Fleet], seed: int, num_requests: int) -> None:
    made = chaos(seed, num_requests=num_requests, of=of)
    outcomes = made.outcomes
    assert outcomes.total() == num_requests
    assert made.fleet.num_deaths >= num_requests / PER_S / 2
    assert made.sample("shoal_generations_resumed_total") > num_requests / 20
    could = num_requests - outcomes["left"] - outcomes["timeout"]
    assert outcomes["answered"] >= 0.97 * could, outcomes


# Bugs that the test above must catch: a few lines of the station each, put in place of what is there.

Log = station._Log
Batch = list[TokenEvent]
replace = msgspec.structs.replace


def _asks(change: Callable[[GenerationRequest], GenerationRequest]) -> Callable[..., GenerationRequest]:
    original = Log.attempt
    return lambda self, now: change(original(self, now))


def _is_told(change: Callable[[Any, Batch], Batch]) -> Callable[..., Batch]:
    """Changes what comes of a later attempt."""
    original = Log.append
    return lambda self, batch: original(self, batch if self.error is None else change(self, batch))


def _gives(change: Callable[[Any, Batch], Batch]) -> Callable[..., Batch]:
    """Changes what is passed on of a later attempt."""
    original = Log.append
    return lambda self, batch: original(self, batch) if self.error is None else change(self, original(self, batch))


def _gives_up_at_once(self: Resume, log: Any, replica: str | None, error: ShoalError) -> None:
    raise error


BUGS: dict[str, list[tuple[Any, str, Callable[[], Any]]]] = {
    "a token is computed again": [
        (Log, "attempt", lambda: _asks(lambda asked: replace(asked, tokens=asked.tokens[:-1]))),
        (Log, "append", lambda: _is_told(lambda log, batch: [replace(e, start=e.start + 1) for e in batch])),
    ],
    "a token is left out": [
        (
            Log,
            "append",
            lambda: _gives(lambda log, batch: batch if len(batch[0].tokens) != 1 or batch[0].finish_reason else []),
        ),
    ],
    "the seed is another": [(Log, "attempt", lambda: _asks(lambda asked: replace(asked, seed=asked.seed + 1)))],
    "the deadline is forgotten": [
        (Log, "attempt", lambda: _asks(lambda asked: replace(asked, timeout_s=None))),
        (station.Resume, "_check", lambda: lambda self, log, error, now: None),
    ],
    "the tokens so far are not counted": [
        (
            Log,
            "attempt",
            lambda: _asks(
                lambda asked: replace(
                    asked, params=replace(asked.params, max_tokens=(asked.params.max_tokens or 0) + len(asked.tokens))
                )
            ),
        ),
    ],
    "it ends twice": [
        (Log, "append", lambda: _gives(lambda log, batch: batch + batch[-1:] if log.ended else batch)),
    ],
    "prefix hits of every attempt are told": [
        (Log, "_own", lambda: lambda self, event: replace(event, id=self.request.id, num_cached_tokens=8)),
    ],
    "nothing is resumed": [(station.Resume, "_interrupt", lambda: _gives_up_at_once)],
    "suspects stay suspects": [(Probation, "clear", lambda: lambda self, log, length=None: False)],
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, make in BUGS[bug]:
        monkeypatch.setattr(owner, name, make())
    with pytest.raises((Violation, ExceptionGroup, TimeoutError)) as caught:
        chaos(1, num_requests=200)
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Violation | TimeoutError), error
