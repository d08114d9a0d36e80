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
from dataclasses import dataclass, field

from shoal.runtime.errors import RowFailed
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenLogprob
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

    def execute(self, plan: StepPlan) -> StepResult:
        for admission in plan.admissions:
            row = self.rows[admission.slot] = Row(admission, self.owner_of(admission))
            for token in admission.tokens:
                row.append(token)
        for slot, blocks in plan.blocks:
            self.rows[slot].table += blocks
        if self.reads:  # a layer stores all its keys and values before it reads any
            for part in plan.slices:
                self._write(part)
            for part in plan.slices:
                self._read(part)
        drawing = [part for part in plan.slices if part.samples]
        tokens = [self._draw(part, plan.masks.get(part.slot)) for part in drawing]
        asked = [self.rows[part.slot].admission.params.logprobs is not None for part in drawing]
        logprobs = [
            logprob_of(self.rows[part.slot].chain[-1]) if asks else None
            for part, asks in zip(drawing, asked, strict=True)
        ]
        return StepResult(plan.step, tokens, logprobs if any(asked) else None, self._prompt_logprobs(plan))

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

    def _draw(self, part: Slice, mask: bytes | None) -> int:
        row, end = self.rows[part.slot], part.start + part.count
        assert end == len(row.tokens), "drawing at a place that is not the end of the log"
        params, prompt_len = row.admission.params, row.admission.prompt_len
        banned = row.admission.stop_token_ids if end - prompt_len < params.min_tokens else []
        token = -1
        if row.tokens[-1] != POISON:
            token = draw(
                row.chain[-1],
                seed=row.admission.seed,
                vocab=self.vocab,
                allows=lambda t: t not in banned and (mask is None or bit(mask, t)),
            )
        row.append(max(token, 0))
        self.num_drawn += 1
        return token

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

    def mask(self) -> bytes | None:
        allowed = sum(1 << t for t in range(self.vocab) if t % self.period == self.num_tokens % self.period)
        return allowed.to_bytes(-(-self.vocab // 32) * 4, "little")

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
    """The log run alone, from what it has to its end (deadlines and aborts left out)."""
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
    """A `WorkerGroup` around one fake rank. Holds results back while `gate` is shut, and for `step_s` in any case."""

    def __init__(
        self, worker: FakeWorker, *, depth: int = 1, step_s: float = 0.0, breaks_at: int | None = None
    ) -> None:
        self.depth = depth
        self.worker = worker
        self.step_s = step_s
        self.breaks_at = breaks_at
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self.num_collected = 0
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        assert len(self._results) < self.depth, "more plans in flight than the group's depth"
        self._results.append(self.worker.execute(plan))

    def collect(self) -> StepResult:
        time.sleep(self.step_s)
        self.gate.wait()
        result = self._results.popleft()
        self.num_collected += 1
        if result.step == self.breaks_at:
            raise RuntimeError("rank 0 is gone")
        return result

    def close(self) -> None:
        self.closed = True
        self.gate.set()
