"""A scheduler on a virtual clock against a fake rank; asserts whatever an observer of the two could see."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from shoal.runtime.blocks import BlockPool
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from shoal.runtime.grammar import FREE
from shoal.runtime.plan import Admission, Slice, StepPlan, StepResult
from shoal.runtime.policy import FirstCome, Policy
from shoal.runtime.propose import Ask
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.speculation import Speculation

from .fakes import (
    POISON,
    VOCAB,
    Clock,
    FakeWorker,
    Outcome,
    Row,
    Stepwise,
    Trapped,
    isolated,
    logprob_of,
    mix,
    tenant_in_seed,
)

BEYOND = [5, POISON, 9, 2, 3, 7]  # guesses where the log has ended


@dataclass(slots=True)
class Log:
    """One log as its client sees it; refuses whatever a log may not do."""

    request: GenerationRequest
    constraint: Stepwise | None
    tokens: list[int]
    deadline: float = float("inf")
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    last: TokenEvent | None = None

    def append(self, event: TokenEvent) -> None:
        assert not self.ended, "an event after the terminal one"
        assert event.start == len(self.tokens), "the event does not go on where the log ended"
        assert event.tokens or event.finish_reason is not None, "an event that says nothing"
        if self.last is None:
            self.prompt_logprobs = event.prompt_logprobs
            self.num_cached_tokens = event.num_cached_tokens
        else:
            assert event.prompt_logprobs is None, "the prompt's logprobs come with the first event alone"
        self.tokens += event.tokens
        self.logprobs += event.logprobs or []
        self.last = event

    def check_logprobs(self) -> None:
        """What was asked for is there, at the right tokens."""
        request, row = self.request, Row(Admission(0, [], 0, self.request.params, 0, []), None)
        for token in [*request.prompt, *self.tokens]:
            row.append(token)
        expected = [logprob_of(chain) for chain in row.chain]
        num_given, num_prompt = len(request.tokens), len(request.prompt)
        if request.params.logprobs is not None:
            assert self.logprobs == expected[num_prompt + num_given :], "logprobs of other tokens"
        if request.params.prompt_logprobs is not None and not num_given and len(self.tokens) > 0:
            assert self.prompt_logprobs == [None, *expected[1:num_prompt]], "the prompt's logprobs are not its own"

    @property
    def ended(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None


class Jury:
    """Says by itself who is a suspect and who is guilty; `Harness.fail` holds the scheduler to it.

    names_rows, sees_at_once: the rank's manner when a trap goes off: whether it names the row, and whether its death is
    seen by the next call or only when the plan's result is due.
    """

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.names_rows = False
        self.sees_at_once = False
        self.trap: int | None = None  # the slot of the row that has killed the rank
        self.guilty: set[str] = set()
        self.num_traps: Counter[str] = Counter()  # how often a log has killed the rank
        self._places: dict[str, int] = {}  # suspect -> the tokens it must have to be past its place

    @property
    def suspects(self) -> set[str]:
        logs = self.harness.logs
        self._places = {
            name: place
            for name, place in self._places.items()
            if not logs[name].ended and len(logs[name].request.prompt) + len(logs[name].tokens) < place
        }
        return set(self._places)

    def _in_flight(self) -> list[tuple[Slice, str]]:
        flights = self.harness.scheduler._flights
        return [
            (part, seq.request.id)
            for flight in flights
            for part, (seq, _) in zip(flight.plan.slices, flight.rows, strict=True)
        ]

    def check_alone(self) -> None:
        """Whoever is under suspicion runs alone, and all others wait."""
        names = {name for _, name in self._in_flight()}
        assert not self.suspects or (len(names) == 1 and names <= self.suspects), "a suspect is not alone"

    def count_trap(self, index: int) -> tuple[int, ...]:
        """A trap has gone off in that plan in flight: the slots that the rank names."""
        assert self.trap is not None
        flight = self.harness.scheduler._flights[index]
        (row,) = (row for part, row in zip(flight.plan.slices, flight.rows, strict=True) if part.slot == self.trap)
        name = row[0].request.id
        self.num_traps[name] += 1
        assert self.num_traps[name] <= 2, "a poison cost more than two restarts"
        return (self.trap,) if self.names_rows else ()

    def blame(self, *, is_suspect: bool, slots: tuple[int, ...]) -> set[str]:
        """Who must end with this failure."""
        parts, self.trap = self._in_flight(), None
        named = {name for part, name in parts if part.slot in slots}
        if slots and len(named) == 1:
            blamed = named
        elif is_suspect and self.suspects:
            blamed = {name for _, name in parts}
        else:
            blamed = set()
            for part, name in parts if is_suspect else ():
                if not self.harness.logs[name].ended and (not named or name in named):
                    log = self.harness.logs[name]
                    place = max(part.start + part.count + part.samples, len(log.request.prompt) + len(log.tokens) + 1)
                    self._places[name] = max(place, self._places.get(name, 0))
        self.guilty |= blamed
        return blamed


class Guesser:
    """A proposer that knows what the logs will say, and is wrong now and then."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    def propose(self, asks: list[Ask]) -> list[list[int]]:
        return [self._guess(ask) for ask in asks]

    def follow(self, plan: StepPlan, result: StepResult) -> None:
        pass

    def _guess(self, ask: Ask) -> list[int]:
        (seq,) = [seq for seq in self.harness.scheduler._running if seq.slot == ask.slot]
        log = self.harness.logs[seq.request.id]
        assert ask.tokens == [*log.request.prompt, *log.tokens], "a guess is wanted behind tokens that are not known"
        assert len(ask.blocks) * self.harness.pool.block_size >= len(ask.tokens) + ask.most, "no room for the guesses"
        luck = mix(len(ask.tokens), log.request.seed)
        future = self.harness.outcome(log).tokens[len(log.tokens) :]
        guesses = [*future, *BEYOND][: luck % (ask.most + 1)]
        wrong = luck // 8 % 8
        if wrong < len(guesses):
            guesses[wrong] = luck // 64 % VOCAB
        return guesses


class Harness:
    """A scheduler, a fake rank and the plans in flight between them; asserts what any observer could."""

    def __init__(
        self,
        limits: Limits,
        *,
        num_blocks: int,
        block_size: int,
        depth: int = 1,
        policy: Policy | None = None,
        num_guesses: int = 0,
        max_guessed: int = 8,
    ) -> None:
        """num_guesses: a row at most; at no row while more than `max_guessed` sequences run."""
        self.limits = limits
        self.num_guesses = num_guesses
        self.clock = Clock()
        self.depth = depth
        self.pool = BlockPool(num_blocks, block_size=block_size)
        self.policy = policy or FirstCome()
        self.scheduler = Scheduler(
            limits,
            pool=self.pool,
            policy=self.policy,
            clock=self.clock,
            secret=b"secret",
            speculation=Speculation(Guesser(self), num_tokens=num_guesses, max_batch=max_guessed if num_guesses else 0),
        )
        self.worker = FakeWorker(block_size=block_size, vocab=limits.vocab_size, owner_of=tenant_in_seed)
        self.in_flight: deque[tuple[StepPlan, StepResult | None]] = deque()  # None: the rank was dead by then
        self.logs: dict[str, Log] = {}
        self.fill = 0  # plans since nothing was in flight
        self.jury = Jury(self)

    def add(self, request: GenerationRequest, constraint: Stepwise | None = None) -> None:
        """Raises what the scheduler raises."""
        self.scheduler.add(request, FREE if constraint is None else constraint.after(request.tokens))
        log = self.logs[request.id] = Log(request, constraint, list(request.tokens))
        if request.timeout_s is not None:
            log.deadline = self.clock.now + request.timeout_s
        self._take(self.scheduler.take_events())  # a log that had ended before it came

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        if event is not None:
            self.logs[request_id].append(event)

    def submit(self) -> StepPlan | None:
        """Plan a step and let the rank execute it; its result stays in flight."""
        plan = self.scheduler.schedule()
        self._take(self.scheduler.take_events())
        late = [log for log in self.logs.values() if not log.ended and log.deadline <= self.clock.now]
        assert not late, "a log lives on behind its deadline"
        if plan is None:
            return None
        self._check_plan(plan)
        self.in_flight.append((plan, None if self.jury.trap is not None else self._execute(plan)))
        if self.jury.trap is not None and self.jury.sees_at_once:
            self._spring()
        return plan

    def _execute(self, plan: StepPlan) -> StepResult | None:
        try:
            return self.worker.execute(plan)
        except Trapped as trap:
            self.jury.trap = trap.slot
            return None

    def collect(self) -> None:
        """Let the oldest result come back, or the news that the rank has died."""
        plan, result = self.in_flight[0]
        if result is None:
            self._spring()
            return
        self.in_flight.popleft()
        self._take(self.scheduler.update(plan, result))

    def _spring(self) -> None:
        dead = next(index for index, (_, result) in enumerate(self.in_flight) if result is None)
        self.fail(is_suspect=True, slots=self.jury.count_trap(dead))

    def fail(self, *, is_suspect: bool, slots: tuple[int, ...] = ()) -> None:
        """The rank dies with all it knows, and a new one takes its place."""
        blamed = self.jury.blame(is_suspect=is_suspect, slots=slots)
        live = {name for name, log in self.logs.items() if not log.ended}
        self.in_flight.clear()
        self.worker.restart()
        self.scheduler.recover(is_suspect=is_suspect, slots=slots)
        self._take(self.scheduler.take_events())
        ended = {name for name in live if self.logs[name].ended}
        assert ended == blamed & live, "the wrong ones were found guilty"
        assert self.pool.num_free == self.pool.num_blocks, "blocks are held over a restart"

    def step(self) -> StepPlan | None:
        """What an engine does in a step; gives the last plan it made."""
        last = None
        while len(self.in_flight) < self.depth:
            plan = self.submit()
            if plan is None:
                break
            last = plan
        if self.in_flight:
            self.collect()
        return last

    def run(self, *, max_steps: int = 5000) -> None:
        """Until all logs have ended, and nothing is in flight."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"not at rest after {max_steps} steps")

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.logs[event.id].append(event)

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.limits
        self.fill = self.fill + 1 if self.in_flight else 1
        assert limits.schedule == "ring" or self.fill <= limits.num_microbatches, "a plan came before the drain's end"
        self.jury.check_alone()
        slots = [part.slot for part in plan.slices]
        assert 0 < plan.num_tokens <= limits.max_num_batched_tokens, "the token budget is exceeded"
        assert len(set(slots)) == len(slots), "a sequence has two slices"
        assert all(0 <= slot < limits.max_num_seqs for slot in slots), "a slot that is not there"
        singles = [part.count == 1 or part.slot in plan.drafts for part in plan.slices]
        self._check_drafts(plan)
        assert singles == sorted(singles, reverse=True), "rows of one token do not go first"
        admitted = [admission.slot for admission in plan.admissions]
        assert len(set(admitted)) == len(admitted), "a slot is given twice"
        assert set(admitted) <= set(slots), "admitted and not planned"
        fresh = [block for _, blocks in plan.blocks for block in blocks]
        assert all(0 <= block < self.pool.num_blocks for block in fresh), "a block that is not there"
        pipelined = limits.num_microbatches > 1
        assert not pipelined or not self._waits_for(plan), "a row is planned before its token can be there"

    def _check_drafts(self, plan: StepPlan) -> None:
        parts = {part.slot: part for part in plan.slices}
        limits = {seq.slot: seq.limit for seq in self.scheduler._running}
        in_flight: set[int] = set()
        guessed: set[int] = set()
        for other in [*(other for other, _ in self.in_flight), plan]:
            in_flight -= {admission.slot for admission in other.admissions}  # of whoever had the slot before
            guessed -= {admission.slot for admission in other.admissions}
            if other is not plan:
                in_flight |= {part.slot for part in other.slices}
                guessed |= set(other.drafts)
        assert not guessed & set(parts), "a row goes on while guesses at it are out"
        for slot, drafts in plan.drafts.items():
            part = parts[slot]
            assert 0 < len(drafts) <= self.num_guesses, "too many guesses, or none"
            assert (part.count, part.samples) == (1 + len(drafts), True), "more is computed than the guesses"
            assert part.start + part.count < limits[slot], "a guess at what is behind the log's end"
            assert slot not in in_flight, "a guess before the sequence's last result is back"

    def _waits_for(self, plan: StepPlan) -> set[int]:
        recent = list(self.in_flight)[-(self.limits.num_microbatches - 1) :]
        drawn: set[int] = set()
        for other in [*(other for other, _ in recent), plan]:
            drawn -= {admission.slot for admission in other.admissions}  # of whoever had the slot before
            waits = drawn & {part.slot for part in other.slices}
            drawn |= {part.slot for part in other.slices if part.samples}
        return waits

    def check(self) -> None:
        """What holds between any two calls."""
        self.scheduler.check()
        for seq in self.scheduler._running:
            for index, block in enumerate(seq.blocks):
                names = [None, seq.names[index]] if index < seq.num_published else [None]
                assert self.pool._digests[block] in names, "a block's name is not that of its known tokens"
        assert self.scheduler.num_running <= self.limits.max_num_seqs
        live = {log.request.id for log in self.logs.values() if not log.ended}
        if isinstance(self.policy, FirstCome) and not self.jury.suspects:
            arrivals = {request_id: number for number, request_id in enumerate(self.logs)}
            running = [arrivals[seq.request.id] for seq in self.scheduler._running]
            waiting = [arrivals[seq.request.id] for seq in self.scheduler._waiting]
            assert not running or not waiting or max(running) < min(waiting), "one who came later goes before"
        queued = self.scheduler.num_running + self.scheduler.num_waiting
        assert queued == len(live), "a live log is in no queue, or an ended one is"

    def outcome(self, log: Log) -> Outcome:
        """What the log comes to alone."""
        constraint = FREE if log.constraint is None else log.constraint.after(log.request.tokens)
        longest = min(self.limits.max_model_len, self.pool.num_blocks * self.pool.block_size)
        return isolated(log.request, constraint, limits=replace(self.limits, max_model_len=longest))

    def check_log(self, log: Log) -> None:
        """An ended log is what it would have been alone, or a beginning of that if it was cut off."""
        assert log.ended
        assert log.last is not None
        log.check_logprobs()
        wanted = self.outcome(log)
        reason = log.last.finish_reason
        if reason in (FinishReason.ABORT, FinishReason.TIMEOUT):
            assert log.tokens == wanted.tokens[: len(log.tokens)], "a cut-off log says something else"
        elif log.request.id in self.jury.guilty:
            assert log.tokens == wanted.tokens[: len(log.tokens)], "a guilty log says something else"
            assert (reason, log.last.error) == (FinishReason.ERROR, "this request made a rank of the engine fail")
        else:
            assert (log.tokens, reason) == (wanted.tokens, wanted.reason), "not what the log says alone"
            assert log.last.stop_reason == wanted.stop_reason

    def check_at_rest(self) -> None:
        """After `run`: every log has ended as it should, and nothing is held."""
        self.check()
        assert not self.in_flight
        assert self.pool.num_free == self.pool.num_blocks, "blocks are held at rest"
        for log in self.logs.values():
            self.check_log(log)
