"""One rank: holds its share of the model and its KV cache, and executes plans in the order they come.

All ranks are told the same and keep the same table; what a rank does with a step depends on its stage alone, and that
is settled in the two ends it is given: what comes in (`Entry`), and what goes out (`Exit`).
"""

import time
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..parallel.group import Begun
from ..parallel.ring import Ring
from ..parallel.station import Station
from .ahead import AllKnown, Recall, fetch, reached
from .batch import Drawing, SequenceTable, StepBatch
from .generation import TokenLogprob
from .plan import Admission, StepPlan, StepResult
from .runner import Runner
from .sampler import Sampled, Sampler, token_logprobs

# Full rows of logits are wide: a whole chunk's at once would outgrow the memory plan.
PROMPT_LOGPROB_ROWS = 64


class Entry(Protocol):
    """A stage's input."""

    def prepare(self, plan: StepPlan) -> None:
        """See that the table holds every token that the plan reads. Called before the batch is made."""
        ...

    def hidden(self, batch: StepBatch) -> Tensor:
        """[T, D] float32, fresh: what enters the stage's first layer."""
        ...


class Exit(Protocol):
    """A stage's output."""

    def conclude(self) -> None:
        """Do what is left of the step before. Called before the next plan is taken in."""
        ...

    def admit(self, admission: Admission) -> None:
        """A slot has a new sequence."""
        ...

    def finish(self, hidden_TD: Tensor, batch: StepBatch, plan: StepPlan) -> Begun[StepResult]:
        """What the step comes to. Of the ranks that do not draw it is an empty result, which nobody reads."""
        ...


class ModelWorker:
    """A `parallel.group.Worker` around a real model. Built in `runtime/rank.py`.

    On a CPU the thread that executes the first plan must be the only one that ever computes in parallel: OpenMP counts
    the threads of all teams, and once they outnumber the cores each of a step's thousand small operations sleeps and
    wakes instead of spinning, which costs half as much again as the model. So the number of threads is set there.
    """

    def __init__(
        self,
        *,
        table: SequenceTable,
        runner: Runner,
        entry: Entry,
        exit: Exit,
        station: Station | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._table = table
        self._runner = runner
        self._entry = entry
        self._exit = exit
        self._station = station or Station()
        self._num_threads = num_threads
        self._last_done = 0.0

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Begun[StepResult]:
        """Launch one step; see `Worker` for what is returned."""
        began = time.perf_counter()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            self._num_threads = None
        self._exit.conclude()
        self._table.apply(plan)
        for admission in plan.admissions:
            self._exit.admit(admission)
        self._entry.prepare(plan)
        batch = self._runner.upload(self._table.batch(plan.slices, plan.drafts))
        residual_TD = self._entry.hidden(batch)
        hidden_TD = self._runner.layers(residual_TD, batch)
        self._station.at("exit")

        def timed(result: StepResult) -> StepResult:
            before, self._last_done = self._last_done, time.perf_counter()
            # A step that was launched early has waited for the one before it.
            return msgspec.structs.replace(result, device_s=self._last_done - max(began, before))

        return self._exit.finish(hidden_TD, batch, plan).then(timed)


# Entries


class Known:
    """The entry of a stage that is first and last: what it drew it has."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def prepare(self, plan: StepPlan) -> None:
        pass

    def hidden(self, batch: StepBatch) -> Tensor:
        return self._runner.embed(batch)


class _Coming(NamedTuple):
    """Tokens that a later stage draws: whose, for the host and for the device, and whether guesses are among them."""

    drawing: Drawing
    slots_R: Tensor
    has_guesses: bool


class Returned:
    """The entry of a first stage with others behind it: the tokens they draw come back on the ring.

    They are taken off it as late as possible, when a plan first reads one of them, so that the stage computes prompt
    chunks and other rows meanwhile; and they stay on the device, so that the host does not wait for what it launched
    before. A slot may have got a new holder since: nobody reads what was drawn for the old one.
    """

    def __init__(self, runner: Runner, table: SequenceTable, ring: Ring, recall: Recall, *, depth: int) -> None:
        """recall: the runner's. depth: plans in flight at most; what older ones drew must not fill the line."""
        self._runner = runner
        self._table = table
        self._ring = ring
        self._recall = recall
        self._depth = depth
        self._has_guesses = False  # the plan that was prepared
        self._under_way: deque[_Coming] = deque()
        self._waits_for: dict[int, int] = {}  # slot -> tokens on their way to its present holder

    def prepare(self, plan: StepPlan) -> None:
        self._has_guesses = bool(plan.drafts)
        for admission in plan.admissions:
            self._waits_for.pop(admission.slot, None)
        while len(self._under_way) > self._depth or any(part.slot in self._waits_for for part in plan.slices):
            self._take()

    def _take(self) -> None:
        drawing, slots_R, has_guesses = self._under_way.popleft()
        tokens_R = self._ring.receive((len(drawing.slots),), torch.int64)
        if has_guesses:  # several of a slot, of which the device does not know the last one that counts
            self._table.settle(drawing, tokens_R.cpu().numpy())
        else:
            self._recall.store(slots_R, tokens_R)
        for row in self._table.current(drawing):
            slot = drawing.slots[row]
            self._waits_for[slot] -= 1
            if not self._waits_for[slot]:
                del self._waits_for[slot]

    def hidden(self, batch: StepBatch) -> Tensor:
        if batch.slots:
            slots_R = batch.seq_slots_T[batch.rows_R]
            self._under_way.append(_Coming(self._table.expect(batch), slots_R, self._has_guesses))
            for slot in batch.slots:
                self._waits_for[slot] = self._waits_for.get(slot, 0) + 1
        return self._runner.embed(batch)


class Received:
    """The entry of a later stage: hidden states from the one before. Its table need not know any token."""

    def __init__(self, ring: Ring, *, hidden_size: int) -> None:
        self._ring = ring
        self._hidden_size = hidden_size

    def prepare(self, plan: StepPlan) -> None:
        pass

    def hidden(self, batch: StepBatch) -> Tensor:
        return self._ring.receive((batch.token_ids_T.shape[0], self._hidden_size), torch.float32)


# Exits


class Sent:
    """The exit of a stage with another one behind it."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def conclude(self) -> None:
        pass

    def admit(self, admission: Admission) -> None:
        pass

    def finish(self, hidden_TD: Tensor, batch: StepBatch, plan: StepPlan) -> Begun[StepResult]:
        self._ring.send(hidden_TD)
        return Begun(partial(StepResult, plan.step, []))


class Drawn:
    """The exit of the last stage: logits, and the tokens drawn from them, for whoever embeds them and for the driver.

    It waits for no token that nobody has to look at before the next step, which reads it from the device (`ahead.py`).
    Rows that somebody has to look at (penalties, masks, guesses, log-probabilities) are drawn when their step's result
    is asked for, or the next step is to begin. All shards of the stage come to the same tokens; those of the output
    rank are the ones that are read.
    """

    def __init__(self, runner: Runner, table: SequenceTable, sampler: Sampler, recall: Recall | None = None) -> None:
        """recall: the runner's; default: every step's result is asked for before the next one begins, or embedded
        elsewhere."""
        self._runner = runner
        self._table = table
        self._sampler = sampler
        self._recall: Recall = recall or AllKnown()
        self._left: Callable[[], object] = _nothing
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # slot -> (how many alternatives, prompt length)

    def conclude(self) -> None:
        self._left()
        self._left = _nothing

    def admit(self, admission: Admission) -> None:
        self._sampler.admit(admission)
        self._prompt_logprobs.pop(admission.slot, None)
        if admission.params.prompt_logprobs is not None:
            self._prompt_logprobs[admission.slot] = (admission.params.prompt_logprobs, admission.prompt_len)

    def finish(self, hidden_TD: Tensor, batch: StepBatch, plan: StepPlan) -> Begun[StepResult]:
        prompt_logprobs = self._of_prompts(plan, hidden_TD) if self._prompt_logprobs else {}
        if not batch.slots:
            return Begun(partial(StepResult, plan.step, [], None, prompt_logprobs))
        is_plain = not plan.drafts and self._sampler.is_plain(batch, plan)
        drawn = self._draw(hidden_TD, batch) if is_plain else self._look(hidden_TD, batch, plan)
        return drawn.then(lambda sampled: StepResult(plan.step, sampled.tokens, sampled.logprobs, prompt_logprobs))

    def _draw(self, hidden_TD: Tensor, batch: StepBatch) -> Begun[Sampled]:
        """Rows that are drawn from their logits as they are."""
        tokens_R = self._runner.drawn(batch)
        if tokens_R is None:
            tokens_R = self._sampler.ops.sample(self._runner.row_logits(hidden_TD, batch), batch.sampling)
            self._recall.store(batch.seq_slots_T[batch.rows_R], tokens_R)
        self._return(tokens_R)
        drawing = self._table.expect(batch)

        def settle(tokens: list[int]) -> Sampled:
            self._table.settle(drawing, np.maximum(tokens, 0))  # a failed row's -1 is no token id
            return Sampled(tokens)

        return fetch(tokens_R).then(settle)

    def _look(self, hidden_TD: Tensor, batch: StepBatch, plan: StepPlan) -> Begun[Sampled]:
        """Rows that the host has a hand in."""
        # Let go of once they are looked at: the next step's need their memory, and this result may be asked for late.
        held = [self._runner.row_logits(hidden_TD, batch)]
        device = held[0].device

        @cache
        @torch.inference_mode()
        def look() -> Sampled:
            sampled = self._sampler.sample(held.pop(), batch, plan)
            self._table.append(batch.slots, batch.next_positions, np.maximum(sampled.tokens, 0))
            self._return(torch.tensor(sampled.tokens, device=device))
            return sampled

        self._left = look
        return Begun(look, reached(device))

    def _return(self, tokens_R: Tensor) -> None:
        """They are drawn: tell those who embed them elsewhere."""

    def _of_prompts(self, plan: StepPlan, hidden_TD: Tensor) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that follow this step's, for the slots that asked."""
        found: dict[int, list[TokenLogprob]] = {}
        first = 0
        for part in plan.slices:
            rows, first = first, first + part.count
            if part.slot not in self._prompt_logprobs:
                continue
            num, prompt_len = self._prompt_logprobs[part.slot]
            count = min(part.count, prompt_len - 1 - part.start)
            if count <= 0:
                continue
            following = self._table.tokens[part.slot, part.start + 1 : part.start + 1 + count]
            tokens_Q = torch.from_numpy(following).to(hidden_TD.device, torch.int64)
            found[part.slot] = []
            for at in range(0, count, PROMPT_LOGPROB_ROWS):
                end = min(at + PROMPT_LOGPROB_ROWS, count)
                logits_QV = self._runner.logits(hidden_TD[rows + at : rows + end])
                found[part.slot] += token_logprobs(self._sampler.ops, logits_QV, tokens_Q[at:end], num)
        return found


class DrawnAndReturned(Drawn):
    """The exit of a last stage with others before it: the first one is told the tokens, without the driver."""

    def __init__(self, runner: Runner, table: SequenceTable, sampler: Sampler, ring: Ring) -> None:
        super().__init__(runner, table, sampler)
        self._ring = ring

    def _return(self, tokens_R: Tensor) -> None:
        self._ring.send(tokens_R.clamp(min=0))


def _nothing() -> None:
    """What is left of a step that waits for nobody."""
