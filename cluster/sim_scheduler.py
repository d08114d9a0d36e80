"""The scheduler under simulation: the real one, which can be taken over a stretch of steps that decide nothing.

While nobody waits, every running sequence lacks one token, none of them ends and there are blocks for all to grow into,
a step gives each of them its next token, and the step behind it will do the same. So such steps are applied together,
at a cost for each sequence and not for each of its tokens. Whatever is a decision (who is admitted, who is preempted,
how long a chunk is, what the cache finds and forgets) stays where it is made in production.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..runtime.blocks import BlockPool
from ..runtime.generation import GenerationRequest
from ..runtime.grammar import FREE, Constraint
from ..runtime.plan import StepPlan, StepResult
from ..runtime.policy import Policy
from ..runtime.scheduler import Scheduler
from ..runtime.sequence import Limits, Sequence
from .sim_load import Script

_LONGEST = 64  # steps; a stretch is often cut short, and each step in it costs a little


class Stretch(NamedTuple):
    """Steps that are alike. context: tokens that the rows of the first one read; each step later reads `rows` more."""

    steps: int
    rows: int
    context: int


class LeapingScheduler(Scheduler):
    """One engine's scheduler, and the model behind it: it draws what the script says."""

    def __init__(
        self, limits: Limits, *, pool: BlockPool, policy: Policy, clock: Callable[[], float], secret: bytes
    ) -> None:
        assert limits.num_microbatches == 1 and limits.schedule == "ring", "a row goes into every plan"  # noqa: PT018
        super().__init__(limits, pool=pool, policy=policy, clock=clock, secret=secret)
        self.preempted: list[str] = []
        self._scripts: dict[str, Script] = {}

    def take(self, request: GenerationRequest, script: Script) -> None:
        """`add` a log whose every token is known. Raises as `add` does."""
        self._scripts[request.id] = script
        try:
            self.add(request)
        except Exception:
            del self._scripts[request.id]
            raise

    def draw(self, plan: StepPlan) -> StepResult:
        """What the newest plan's step brings."""
        scripts = self._scripts
        rows = zip(plan.slices, self._flights[-1].rows, strict=True)
        return StepResult(
            plan.step,
            [scripts[seq.request.id].tokens[part.start + part.count] for part, (seq, _) in rows if part.samples],
        )

    def drop(self, request_id: str) -> None:
        """A log that was taken has ended."""
        del self._scripts[request_id]

    def logs(self) -> dict[str, list[int]]:
        """What every live log has come to: the tokens of its answer."""
        return {name: seq.tokens[seq.prompt_len :] for name, seq in self._live.items()}

    def stretch(self) -> Stretch | None:
        """The steps that can be taken together from here; None if the next one has to be planned."""
        running, pool = self._running, self.pool
        if self._waiting or self._flights or self._events or not running or self.quarantine.num_suspects:
            return None
        assert self._next_deadline == float("inf"), "simulated requests have no deadlines"
        if len(running) > self.limits.max_num_batched_tokens:
            return None
        steps, context, size = _LONGEST, 0, pool.block_size
        for seq in running:
            known = len(seq.tokens)
            if seq.num_computed != known - 1 or not seq.has_spoken:  # a first token is an event of its own
                return None
            steps = min(steps, seq.limit - known - 1)
            context += known
        if steps < 1:
            return None
        # Each takes a new block for every `size` steps, and at most one more.
        if pool.num_free < len(running) * (1 + steps // size):
            return None
        return Stretch(steps, len(running), context)

    def leap(self, steps: int) -> None:
        """Take so many steps of the stretch that begins here. Leaves everything as `schedule` and `update` would."""
        size = self.pool.block_size
        edges: list[
            tuple[int, int, int, Sequence]
        ] = []  # step, then blocks are taken (0) or named (1), in order of rows
        for place, seq in enumerate(self._running):
            tokens, computed = seq.tokens, seq.num_computed
            known = len(tokens)
            tokens += self._scripts[seq.request.id].tokens[known : known + steps]
            first = -computed % size  # the step that fills a block's first slot; `size` steps later comes the next
            if first < steps:
                full = len(seq.blocks) * size
                edges += [(step, 0, place, seq) for step in range(first, steps, size) if computed + step >= full]
            first = -(computed + 1) % size
            if first < steps:
                edges += [(step, 1, place, seq) for step in range(first, steps, size)]
            seq.num_computed = computed + steps
            seq.last_drawn = self._num_steps + steps - 1
        edges.sort()
        for _, is_full, _, seq in edges:
            if is_full:
                self._name_next(seq)
            else:
                seq.blocks += self.pool.allocate(1)
        self._num_steps += steps
        self.counters.generation_tokens += steps * len(self._running)

    def _name_next(self, seq: Sequence) -> None:
        if self.limits.prefix_caching:
            self.pool.publish(seq.blocks[seq.num_published], seq.names[seq.num_published])
        seq.num_published += 1

    def _preempt(self, seq: Sequence) -> None:
        super()._preempt(seq)
        self.preempted.append(seq.request.id)

    def _sequence(self, request: GenerationRequest, constraint: Constraint, limit: int) -> Sequence:
        assert constraint is FREE, "simulated requests have no grammar"
        seq = super()._sequence(request, constraint, limit)
        seq.names = self._scripts[request.id].names
        return seq
