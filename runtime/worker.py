"""One rank: holds its share of the model and its KV cache, and executes plans in the order they come."""

import time

import torch

from .batch import SequenceTable, StepBatch
from .generation import TokenLogprob
from .plan import StepPlan, StepResult
from .runner import Runner
from .sampler import Sampler, token_logprobs

# Full rows of logits are wide: a whole chunk's at once would outgrow the memory plan.
PROMPT_LOGPROB_ROWS = 64


class ModelWorker:
    """A `parallel.group.Worker` around a real model. Built in `runtime/build.py`.

    On a CPU the thread that executes the first plan must be the only one that ever computes in parallel: OpenMP counts
    the threads of all teams, and once they outnumber the cores each of a step's thousand small operations sleeps and
    wakes instead of spinning, which costs half as much again as the model. So the number of threads is set there.
    """

    def __init__(
        self, *, table: SequenceTable, runner: Runner, sampler: Sampler, num_threads: int | None = None
    ) -> None:
        self._table = table
        self._runner = runner
        self._sampler = sampler
        self._num_threads = num_threads
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # slot -> (how many alternatives, prompt length)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        began = time.perf_counter()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            self._num_threads = None
        self._table.apply(plan)
        for admission in plan.admissions:
            self._sampler.admit(admission)
            self._prompt_logprobs.pop(admission.slot, None)
            if admission.params.prompt_logprobs is not None:
                self._prompt_logprobs[admission.slot] = (admission.params.prompt_logprobs, admission.prompt_len)
        if not plan.slices:
            return StepResult(plan.step, [])
        batch = self._table.batch(plan.slices)
        hidden_TD = self._runner.hidden(batch)
        prompt_logprobs = self._of_prompts(plan, hidden_TD) if self._prompt_logprobs else {}
        if not batch.slots:
            return StepResult(plan.step, [], None, prompt_logprobs, time.perf_counter() - began)
        sampled = self._sampler.sample(self._runner.logits(hidden_TD[batch.rows_R]), batch, plan)
        self._remember(batch, sampled.tokens)
        return StepResult(plan.step, sampled.tokens, sampled.logprobs, prompt_logprobs, time.perf_counter() - began)

    def _remember(self, batch: StepBatch, tokens: list[int]) -> None:
        # A failed row's -1 must not be read as a token id by a step that is planned already.
        drawn = torch.tensor(tokens, dtype=torch.int64).clamp_(min=0).numpy()
        self._table.append(batch.slots, batch.next_positions, drawn)

    def _of_prompts(self, plan: StepPlan, hidden_TD: torch.Tensor) -> dict[int, list[TokenLogprob]]:
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
