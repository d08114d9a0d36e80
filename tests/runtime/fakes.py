"""A model whose next token is a hash of everything before it, as a rank and as a group of ranks.

`FakeWorker` executes plans as a rank does, but keeps tags in place of keys and values: whose they are and what they
were made from. Each step reads all that its rows attend to, so content that is foreign, stale or missing is seen at
once. `isolated` says what a log must come to, without a scheduler.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from shoal.parallel.group import Begun, GroupFailure, GroupStartError, RankInfo
from shoal.runtime.errors import RowFailed
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenLogprob
from shoal.runtime.grammar import FREE, Constraint
from shoal.runtime.plan import Admission, Slice, StepPlan, StepResult
from shoal.runtime.sequence import Limits

EOS = 0
POISON = 1  # a row whose last token is this has no finite logits; the model never draws it
VOCAB = 24
_WORD = (1 << 64) - 1


def mix(state: int, value: int) -> int:
    """One step of a 64-bit hash chain (the finaliser of MurmurHash3 over a multiply-add)."""
    x = (state * 0x9E3779B97F4A7C15 + value + 1) & _WORD
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & _WORD
    return x ^ (x >> 33)


def draw(chain: int, *, seed: int, vocab: int, allows: Callable[[int], bool]) -> int:
    """The token after the tokens hashed in `chain`; -1 if nothing is allowed."""
    state = mix(chain, seed)
    for _ in range(64 * vocab):
        token = state % vocab
        if token != POISON and allows(token):
            return token
        state = mix(state, 7)
    return -1


def logprob_of(chain: int) -> TokenLogprob:
    return TokenLogprob(-(chain % 1000) / 100, 1, [])


def trap_of(params: SamplingParams) -> int | None:
    """The position at which a log kills the rank that computes it. Tests write it where nothing else reads it."""
    position = params.logit_bias.get(POISON)
    return None if position is None else int(position)


class Trapped(Exception):
    """A rank has computed a position that kills it, in this slot."""

    def __init__(self, slot: int) -> None:
        super().__init__("a trap")
        self.slot = slot


def bit(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> (token % 8) & 1)


@dataclass(slots=True)
class Row:
    """One slot of a rank: the log as the rank knows it, and a hash chain over it."""

    admission: Admission
    owner: Hashable
    tokens: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.chain.append(mix(self.chain[-1] if self.chain else 0, token))
        self.tokens.append(token)

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.chain[length:]


class FakeWorker:
    """One rank. `owner_of` tells whose content a sequence may read; `reads` False leaves the checks out."""

    def __init__(
        self,
        *,
        block_size: int,
        vocab: int = VOCAB,
        owner_of: Callable[[Admission], Hashable] = lambda admission: None,
        reads: bool = True,
    ) -> None:
        self.block_size = block_size
        self.vocab = vocab
        self.owner_of = owner_of
        self.reads = reads
        self.rows: dict[int, Row] = {}
        self.tags: dict[tuple[int, int], tuple[Hashable, int]] = {}  # (block, offset) -> (owner, chain)
        self.num_drawn = 0

    def restart(self) -> None:
        """A new process: it knows nothing."""
        self.rows.clear()
        self.tags.clear()

    def begin(self, plan: StepPlan) -> Begun[StepResult]:
        result = self.execute(plan)
        return Begun(lambda: result)

    def execute(self, plan: StepPlan) -> StepResult:
        for admission in plan.admissions:
            row = self.rows[admission.slot] = Row(admission, self.owner_of(admission))
            for token in admission.tokens:
                row.append(token)
        for slot, blocks in plan.blocks:
            self.rows[slot].table += blocks
        for part in plan.slices:
            trap = trap_of(self.rows[part.slot].admission.params)
            if trap is not None and part.start <= trap < part.start + part.count:
                raise Trapped(part.slot)
        for slot, drafts in plan.drafts.items():
            for token in drafts:
                self.rows[slot].append(token)
        if self.reads:  # a layer stores all its keys and values before it reads any
            for part in plan.slices:
                self._write(part)
            for part in plan.slices:
                self._read(part)
        drawing = [part for part in plan.slices if part.samples]
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for part in drawing:
            drafts = plan.drafts.get(part.slot, [])
            drawn = self._draw(part, len(drafts), plan.masks.get(part.slot))
            row = self.rows[part.slot]
            asks, end = row.admission.params.logprobs is not None, part.start + part.count
            tokens += drawn
            logprobs += [
                logprob_of(mix(row.chain[end - len(drawn) + i], max(token, 0))) if asks else None
                for i, token in enumerate(drawn)
            ]
            self._keep(row, end - len(drafts), drafts, drawn)
        asked = any(entry is not None for entry in logprobs)
        return StepResult(plan.step, tokens, logprobs if asked else None, self._prompt_logprobs(plan))

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.table[position // self.block_size], position % self.block_size

    def _write(self, part: Slice) -> None:
        row = self.rows[part.slot]
        for position in range(part.start, part.start + part.count):
            self.tags[self._place(row, position)] = (row.owner, row.chain[position])

    def _read(self, part: Slice) -> None:
        row = self.rows[part.slot]
        for position in range(part.start + part.count):
            tag = self.tags.get(self._place(row, position))
            assert tag is not None, f"position {position} was never written"
            assert tag[0] == row.owner, f"position {position} belongs to another owner"
            assert tag[1] == row.chain[position], f"position {position} holds the content of other tokens"

    def _draw(self, part: Slice, num_drafts: int, mask: bytes | None) -> list[int]:
        """The token behind the last known one, and behind each guess."""
        row, end = self.rows[part.slot], part.start + part.count
        assert end == len(row.tokens), "drawing at a place that is not the end of the log"
        words = 4 * -(-self.vocab // 32)
        assert mask is None or len(mask) == words * (1 + num_drafts), "not a mask for each token that is drawn"
        masks = [None if mask is None else mask[i * words : (i + 1) * words] for i in range(1 + num_drafts)]
        return [self._draw_at(row, end - num_drafts + i, masks[i]) for i in range(1 + num_drafts)]

    def _draw_at(self, row: Row, place: int, mask: bytes | None) -> int:
        params, prompt_len = row.admission.params, row.admission.prompt_len
        banned = row.admission.stop_token_ids if place - prompt_len < params.min_tokens else []
        self.num_drawn += 1
        if row.tokens[place - 1] == POISON:
            return -1
        return draw(
            row.chain[place - 1],
            seed=row.admission.seed,
            vocab=self.vocab,
            allows=lambda t: t not in banned and (mask is None or bit(mask, t)),
        )

    def _keep(self, row: Row, known: int, drafts: list[int], drawn: list[int]) -> None:
        """The log goes on with what was drawn, as far as the guesses before it were right."""
        row.cut(known)
        for token, guess in zip(drawn, [*drafts, None], strict=True):
            row.append(max(token, 0))
            if token != guess:
                return

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, list[TokenLogprob]]:
        found = {}
        for part in plan.slices:
            row = self.rows[part.slot]
            last = min(part.start + part.count, row.admission.prompt_len - 1)
            if row.admission.params.prompt_logprobs is not None and last > part.start:
                found[part.slot] = [logprob_of(row.chain[p + 1]) for p in range(part.start, last)]
        return found


@dataclass(slots=True)
class Stepwise:
    """A constraint: token i must be i modulo `period`. Ends the log after `length` tokens, or gives up there."""

    period: int = 3
    length: int = 1_000_000
    fails: bool = False
    vocab: int = VOCAB
    num_tokens: int = 0

    def after(self, tokens: list[int]) -> Stepwise:
        return Stepwise(self.period, self.length, self.fails, self.vocab, len(tokens))

    @property
    def finished(self) -> bool:
        return not self.fails and self.num_tokens >= self.length

    def mask(self) -> bytes:
        allowed = sum(1 << t for t in range(self.vocab) if t % self.period == self.num_tokens % self.period)
        return allowed.to_bytes(-(-self.vocab // 32) * 4, "little")

    def look_ahead(self, tokens: list[int]) -> list[bytes]:
        ahead, masks = replace(self), list[bytes]()
        for token in tokens:
            try:
                ahead.advance(token)
            except RowFailed:
                break
            if ahead.finished:
                break
            masks.append(ahead.mask())
        return masks

    def advance(self, token: int) -> None:
        if token % self.period != self.num_tokens % self.period:
            raise RowFailed("a token that the mask had not allowed")
        self.num_tokens += 1
        if self.fails and self.num_tokens >= self.length:
            raise RowFailed("the grammar gave up")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a log comes to in all: tokens and reason."""

    tokens: list[int]
    reason: FinishReason
    stop_reason: int | str | None = None


def isolated(request: GenerationRequest, constraint: Constraint = FREE, *, limits: Limits) -> Outcome:
    """The log run alone, from what it has to its end (deadlines, aborts and traps left out)."""
    params = request.params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else limits.eos_token_ids)
    row = Row(Admission(0, [], 0, params, 0, []), None)
    for token in [*request.prompt, *request.tokens]:
        row.append(token)
    output = list(request.tokens)
    while True:
        if output and output[-1] in stops:
            return Outcome(output, FinishReason.STOP, output[-1])
        if output and constraint.finished:
            return Outcome(output, FinishReason.STOP)
        if params.max_tokens is not None and len(output) >= params.max_tokens:
            return Outcome(output, FinishReason.LENGTH)
        if len(row.tokens) >= limits.max_model_len:
            return Outcome(output, FinishReason.LENGTH)
        if row.tokens[-1] == POISON:
            return Outcome(output, FinishReason.ERROR)
        mask = constraint.mask()
        banned = stops if len(output) < params.min_tokens else set()
        token = draw(
            row.chain[-1],
            seed=request.seed,
            vocab=limits.vocab_size,
            allows=lambda t: t not in banned and (mask is None or bit(mask, t)),  # noqa: B023 called at once
        )
        if token < 0:
            return Outcome(output, FinishReason.ERROR)
        row.append(token)
        output.append(token)
        if token not in stops:
            try:
                constraint.advance(token)
            except RowFailed:
                return Outcome(output, FinishReason.ERROR)


def tenant_in_seed(admission: Admission) -> Hashable:
    """Tests write the tenant's number into the seed's high half, where a rank can see it."""
    return admission.seed >> 32


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeGroup:
    """A `WorkerGroup` around one fake rank. Holds results back while `gate` is shut, and for `step_s` in any case.

    It ends with a `GroupFailure` when `fail` says so or a log's trap goes off (which names the row if `names_rows`),
    and with an error that is no such failure at step `breaks_at`. A restart waits for `restart_gate`.
    """

    def __init__(
        self, worker: FakeWorker, *, depth: int = 1, step_s: float = 0.0, breaks_at: int | None = None
    ) -> None:
        self.depth = depth
        self.worker = worker
        self.step_s = step_s
        self.breaks_at = breaks_at
        self.names_rows = False
        self.start_error: GroupStartError | GroupFailure | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.restart_gate = threading.Event()
        self.restart_gate.set()
        self.closed = False
        self.num_collected = 0
        self.num_restarts = 0
        self._failure: GroupFailure | None = None
        self._trap = 0  # the slot of the row that killed the rank
        self._results: deque[StepResult | None] = deque()  # None: the rank died in that step

    def fail(self, *, is_suspect: bool = False, slots: tuple[int, ...] = ()) -> None:
        """The rank dies; the next call sees it."""
        text = "rank 0 (stage 0, shard 0) " + ("raised ValueError" if is_suspect else "was killed")
        cause = "exception" if is_suspect else "killed"
        self._failure = GroupFailure(text, rank=0, station="step", cause=cause, slots=slots)

    def submit(self, plan: StepPlan) -> None:
        assert len(self._results) < self.depth, "more plans in flight than the group's depth"
        if None in self._results:
            self._results.append(None)
            return
        self._raise_failure()
        try:
            self._results.append(self.worker.execute(plan))
        except Trapped as trap:
            self._results.append(None)
            self._trap = trap.slot

    def collect(self) -> StepResult:
        time.sleep(self.step_s)
        self.gate.wait()
        self._raise_failure()
        result = self._results.popleft()
        if result is None:
            self.fail(is_suspect=True, slots=(self._trap,) if self.names_rows else ())
            self._raise_failure()
        assert result is not None
        self.num_collected += 1
        if result.step == self.breaks_at:
            raise RuntimeError("rank 0 is gone")
        return result

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def check(self) -> None:
        self._raise_failure()

    def restart(self) -> None:
        assert self._failure is not None, "a restart of ranks that live"
        self.restart_gate.wait()
        if self.start_error is not None:
            raise self.start_error
        self._failure = None
        self._results.clear()
        self.worker.restart()
        self.closed = False
        self.num_restarts += 1

    def ranks(self) -> list[RankInfo]:
        return [RankInfo(rank=0, stage=0, shard=0)]

    def close(self) -> None:
        self.closed = True
        self.gate.set()
        self.restart_gate.set()


class FakePipeline(FakeGroup):
    """Several stages on a virtual clock: every stage takes one tick a plan, the host none.

    now: ticks, as the host sees them. idle: for each stage, ticks it had nothing to do since its first plan.
    """

    def __init__(self, worker: FakeWorker, *, num_stages: int) -> None:
        super().__init__(worker, depth=num_stages + 1)
        self.now = 0
        self.idle = [0] * num_stages
        self.num_plans = 0
        self._ends: list[int | None] = [None] * num_stages  # of the last plan, for each stage
        self._tokens: dict[int, int] = {}  # slot -> when its last drawn token is back at the first stage
        self._done: deque[int] = deque()

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        admitted = {admission.slot for admission in plan.admissions}
        at = max([self.now, *(self._tokens.get(part.slot, 0) for part in plan.slices if part.slot not in admitted)])
        for stage, free in enumerate(self._ends):
            if free is not None:
                self.idle[stage] += max(0, at - free)
                at = max(at, free)
            at += 1
            self._ends[stage] = at
        self._tokens.update((part.slot, at) for part in plan.slices if part.samples)
        self._done.append(at)
        self.num_plans += 1

    def collect(self) -> StepResult:
        self.now = max(self.now, self._done.popleft())
        return super().collect()
