"""`shoal bench serve`: what a running server gives its clients. One event loop sends and reads everything.

Open loop: requests come at a rate, whatever becomes of those before them. Closed loop: so many clients send their next
request when they have their answer. A turn of a conversation waits for the answer before it, in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import random
import secrets
import sys
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import msgspec

from ..runtime.errors import ConfigError, EngineError
from .bench_ask import Endpoint, Record, Target, settle
from .bench_http import HttpClient
from .bench_load import Ask, Load, arrivals, asks
from .bench_report import ClientSide, Slo, Spread, Summary, summarise
from .bench_words import Words, measure_words
from .client import Origin
from .progress import Progress

PULSE_S = 0.02
CONVERSATIONS = 16  # that take turns, at least; twice as many as clients in a closed loop
WARM_TOKENS = 16
LINE_S, REDRAW_S = 10.0, 0.2  # between two words of progress, into a file and on a terminal


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast requests are sent: so many a second, or by so many clients."""

    kind: Literal["rate", "concurrency"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} requests/s" if self.kind == "rate" else f"{self.value:g} at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """What is to be measured. Each pace is a run of its own, over prompts of its own.

    requests: of a run, at most. duration_s: after which nothing more is sent. tokenize: ask the server's `/tokenize`.
    """

    url: str
    load: Load
    paces: tuple[Pace, ...]
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    model: str | None = None
    requests: int | None = 100
    duration_s: float | None = None
    burstiness: float = 1.0
    temperature: float = 0.0
    seed: int = 0
    warmup: int = 8
    tokenize: bool = True
    slo: Slo | None = None
    timeout_s: float = 600.0


class ServeBench:
    """Carries a plan out. What it has found so far can be read at any time, also after an interruption."""

    def __init__(self, plan: ServePlan, progress: Progress) -> None:
        self.plan = plan
        self.server: dict[str, Any] = {}
        self.notes: list[str] = []
        self.runs: list[Run] = []
        self._progress = progress

    async def run(self) -> None:
        """Measure.

        Raises:
            ConfigError: the load and the server do not fit. RequestError, EngineError: the first request fails.
        """
        plan = self.plan
        http = HttpClient(Origin.parse(plan.url), api_key=plan.api_key, timeout_s=plan.timeout_s)
        try:
            self._progress.phase(f"asking {plan.url}")
            card = await _card(http, plan.model)
            self.server = {"model": card["id"], "version": await _version(http), "card": card}
            _check_length(plan.load, card)
            target, words = await self._prepare(Target(http, plan.endpoint, card["id"], plan.temperature))
            for pace in plan.paces:
                self.runs.append(Run(plan, pace, target, words))
                gc.collect()
                gc.freeze()
                async with self._telling(self.runs[-1]):
                    await self.runs[-1].execute()
        finally:
            gc.unfreeze()
            http.close()

    async def _prepare(self, target: Target) -> tuple[Target, Words]:
        """Find out what the server takes, how it counts, and warm it up."""
        plan, words = self.plan, Words()
        first = Ask(0, 0, (words.text(random.Random(plan.seed), 8),), None, 4)
        target, refused = await settle(replace(target, salt=secrets.token_hex(8)), first)
        if refused:
            self.notes.append(f"the server refuses {refused}")
        if plan.tokenize:
            try:
                words = await measure_words(target.count)
            except EngineError as error:
                self.notes.append(f"{error}; the lengths of prompts are in common words")
        self._progress.phase("warming up")
        warm = islice(asks(plan.load, words, f"{plan.seed}/warm-up", at_once=CONVERSATIONS), plan.warmup)
        records = [Record(replace(ask, output_tokens=min(WARM_TOKENS, ask.output_tokens)), 0.0) for ask in warm]
        await asyncio.gather(*(target.run(record) for record in records))
        return target, words

    @contextlib.asynccontextmanager
    async def _telling(self, run: Run) -> AsyncIterator[None]:
        """Within: how far the run is."""

        async def tell() -> None:
            period_s = REDRAW_S if sys.stderr.isatty() else LINE_S
            while True:
                self._progress.phase(run.words())
                await asyncio.sleep(period_s)

        teller = asyncio.create_task(tell())
        try:
            yield
        finally:
            teller.cancel()


class Run:
    """One pace: everything that was sent, and how it went."""

    def __init__(self, plan: ServePlan, pace: Pace, target: Target, words: Words) -> None:
        self.pace = pace
        self.records: list[Record] = []  # those that have ended
        self._plan = plan
        self._target = replace(target, salt=secrets.token_hex(8)) if target.dialect.salt else target
        self._seed = f"{plan.seed}/{pace}"
        at_once = CONVERSATIONS if pace.kind == "rate" else max(CONVERSATIONS, 2 * int(pace.value))
        source = asks(plan.load, words, self._seed, at_once=at_once)
        # Made ahead where there is an end to it: that takes the client's time.
        self._asks: Iterator[Ask] = source if plan.requests is None else iter(list(islice(source, plan.requests)))
        self._answered: dict[int, asyncio.Future[None]] = {}  # of each conversation, its latest turn
        self._digest = hashlib.sha256()
        self._begin = 0.0
        self._num_sent = self._peak = self._held = self._num_tokens = 0
        self._lags = array("d")
        self._cpu_s = 0.0

    async def execute(self) -> None:
        """Send everything and wait for it."""
        pulse = asyncio.create_task(self._pulse())
        self._begin, cpu = time.perf_counter(), time.process_time()
        try:
            await (self._open() if self.pace.kind == "rate" else self._closed())
        finally:
            pulse.cancel()
            self._cpu_s = time.process_time() - cpu

    def words(self) -> str:
        """How far it is."""
        now = self._now()
        done, plan = len(self.records), self._plan
        of = f" of {plan.requests}" if plan.requests is not None else ""
        failed = sum(not record.is_ok for record in self.records)
        problems = f", {failed} failed" if failed else ""
        until = f" of {plan.duration_s:g}" if plan.duration_s is not None else ""
        return f"{self.pace}: {done}{of} done, {self._num_sent - done} in flight{problems}, {now:.0f}{until} s"

    def summary(self) -> Summary:
        wall_s = max(self._now() if not self.records else max(r.end_s for r in self.records), 1e-9)
        client = ClientSide(Spread.of(self._lags), self._cpu_s / wall_s, self._held)
        return summarise(
            self.records,
            pace=(str(self.pace), self.pace.kind, self.pace.value),
            slo=self._plan.slo,
            unended=self._num_sent - len(self.records),
            peak=self._peak,
            client=client,
        )

    @property
    def digest(self) -> str:
        """Of all prompts in the order they were due: equal where two servers were asked the same."""
        return self._digest.hexdigest()[:16]

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            moments = arrivals(self.pace.value, self._plan.burstiness, self._seed)
            for due_s, ask in zip(moments, self._asks, strict=False):
                if self._plan.duration_s is not None and due_s > self._plan.duration_s:
                    return
                while (wait_s := due_s - self._now()) > 0:
                    await asyncio.sleep(wait_s)
                self._lags.append(self._now() - due_s)
                group.create_task(self._one(ask, due_s))

    async def _closed(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(int(self.pace.value)):
                group.create_task(self._client())

    async def _client(self) -> None:
        for ask in self._asks:
            if self._plan.duration_s is not None and self._now() > self._plan.duration_s:
                return
            await self._one(ask, self._now())

    async def _one(self, ask: Ask, due_s: float) -> None:
        """One request, behind the answer to the turn before it."""
        self._digest.update("\0".join(ask.texts).encode())
        before = self._answered.get(ask.conversation)
        mine = self._answered[ask.conversation] = asyncio.get_running_loop().create_future()
        if before is not None and not before.done():
            self._held += 1
            await before
        self._num_sent += 1
        self._peak = max(self._peak, self._num_sent - len(self.records))
        record = Record(ask, due_s)
        try:
            await self._target.run(record, self._now)
            self.records.append(record)
        finally:
            mine.set_result(None)

    async def _pulse(self) -> None:
        """Notes how late the loop wakes up."""
        while True:
            before = self._now()
            await asyncio.sleep(PULSE_S)
            self._lags.append(max(0.0, self._now() - before - PULSE_S))


async def _card(http: HttpClient, name: str | None) -> dict[str, Any]:
    """What the server says of the model of this name, or of its first. Raises EngineError, ConfigError."""
    status, body = await http.call("GET", "/v1/models")
    try:
        cards: dict[str, dict[str, Any]] = {str(card["id"]): card for card in msgspec.json.decode(body)["data"]}
    except (msgspec.DecodeError, LookupError, TypeError):
        cards = {}
    if status in (401, 403):
        raise ConfigError(f"GET /v1/models: status {status}: the server wants a key (--api-key)")
    if name is None and not cards:
        raise EngineError(f"GET /v1/models: status {status}, no model in it: is it OpenAI's API? (--model names one)")
    if name is None:
        return next(iter(cards.values()))
    if cards and name not in cards:
        raise ConfigError(f"--model {name}: the server has {', '.join(cards)}")
    return cards.get(name, {"id": name})


async def _version(http: HttpClient) -> str | None:
    status, body = await http.call("GET", "/version")
    try:
        return str(msgspec.json.decode(body)["version"]) if status == 200 else None
    except (msgspec.DecodeError, LookupError, TypeError):
        return None


def _check_length(load: Load, card: dict[str, Any]) -> None:
    limit = card.get("max_model_len")
    if isinstance(limit, int) and load.longest is not None and load.longest > limit:
        raise ConfigError(
            f"the load's longest requests have {load.longest} tokens, prompt and answer; the server takes {limit}: "
            "lower --input-tokens, --output-tokens, --prefix-tokens, --turns or --max-context"
        )
