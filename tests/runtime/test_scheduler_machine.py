"""The scheduler under every order of calls that hypothesis can think of, against logs run alone.

The machine submits and collects as it likes within the depth, adds, aborts, resumes and lets time pass. The harness
asserts after every call; `test_planted_bugs.py` shows that it would notice.
"""

from __future__ import annotations

import sys

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from shoal.runtime.errors import RequestError
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.policy import FairShare, FirstCome, Priority
from shoal.runtime.sequence import Limits

from .fakes import EOS, POISON, VOCAB, Stepwise
from .harness import Harness

BASES = [[2, 3, 4, 5] * 8, [2, 3, 4, 5, 2, 3, 4, 6] * 4, [7] * 32]

small = st.integers(0, 3)


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Beginnings of a few texts with a short tail: many share a prefix."""
    base = draw(st.sampled_from(BASES))
    tail = draw(st.lists(st.integers(2, VOCAB - 1), max_size=2))
    last = [POISON] if draw(st.integers(0, 15)) == 15 else []
    return [*base[: draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 23]))], *tail, *last]


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.sampled_from([None, None, 0, 1, 5, 14, 25]))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(draw(small), max_tokens or 0),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        stop_token_ids=draw(st.sampled_from([[], [], [], [9, 10, 11]])),
        logprobs=draw(st.sampled_from([None, None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
    )


@st.composite
def requests(draw: st.DrawFn) -> GenerationRequest:
    tenant = draw(st.integers(0, 1))
    return GenerationRequest(
        id="",
        prompt=draw(prompts()),
        params=draw(params()),
        seed=tenant << 32,
        tenant=f"tenant {tenant}",
        priority=draw(st.integers(0, 2)),
        timeout_s=draw(st.sampled_from([None, None, None, 1.0, 20.0])),
    )


constraints = st.one_of(
    st.none(),
    st.none(),
    st.builds(Stepwise, period=st.integers(1, 3), length=st.integers(1, 9), fails=st.booleans()),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Each rule is one call that an engine or a client could make."""

    harness: Harness

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from([1, 3, 6, 12, 40]),
        depth=st.integers(1, 3),
        microbatches=st.integers(1, 2),
        policy=st.one_of(st.builds(FirstCome), st.builds(Priority), st.builds(FairShare)),
        caching=st.sampled_from([True, True, True, False]),
        schedule=st.sampled_from(["ring", "ring", "gpipe"]),
        guesses=st.sampled_from([(0, 0), (2, 1), (2, 2), (4, 8)]),
    )
    def start(self, num_blocks: int, block_size: int, depth: int, microbatches: int, **rest: object) -> None:
        limits = Limits(
            max_model_len=40,
            max_num_seqs=rest["max_num_seqs"],
            max_num_batched_tokens=rest["budget"],
            max_queued=6,
            vocab_size=VOCAB,
            eos_token_ids=frozenset([EOS]),
            num_microbatches=min(microbatches, depth) if rest["schedule"] == "ring" else 2 * microbatches,
            schedule=rest["schedule"],
            prefix_caching=rest["caching"],
        )
        self.num_added = 0
        num_guesses, max_guessed = rest.get("guesses", (0, 0))
        self.harness = Harness(
            limits,
            num_blocks=num_blocks,
            block_size=block_size,
            depth=depth,
            policy=rest["policy"],
            num_guesses=num_guesses,
            max_guessed=max_guessed,
        )

    @rule(
        request=requests(),
        constraint=constraints,
        copies=st.sampled_from([1, 2, 3, 4]),
    )
    def add(self, request: GenerationRequest, constraint: Stepwise | None, copies: int) -> None:
        for _ in range(copies):
            self._add(replace(request, seed=request.seed + self.num_added), constraint)

    @rule(data=st.data())
    @precondition(lambda self: any(log.ended for log in self.harness.logs.values()))
    def resume(self, data: st.DataObject) -> None:
        """An ended log comes again as it was at some moment: the rest must be the same."""
        log = data.draw(st.sampled_from([log for log in self.harness.logs.values() if log.ended]))
        tokens = log.tokens[: data.draw(st.integers(0, len(log.tokens)))]
        self._add(replace(log.request, tokens=tokens, timeout_s=None), log.constraint)

    def _add(self, request: GenerationRequest, constraint: Stepwise | None) -> None:
        request = replace(request, id=f"{self.num_added}")
        self.num_added += 1
        try:
            self.harness.add(request, constraint)
        except RequestError:
            assert request.id not in self.harness.logs

    @rule(data=st.data())
    @precondition(lambda self: self.harness.logs)
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.logs))))

    @rule()
    @precondition(lambda self: len(self.harness.in_flight) < self.harness.depth)
    def submit(self) -> None:
        self.harness.submit()

    @rule()
    @precondition(lambda self: self.harness.in_flight)
    def collect(self) -> None:
        self.harness.collect()

    @rule(num_steps=st.integers(1, 20))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.harness.step()
            self.harness.check()

    @rule(seconds=st.sampled_from([0.5, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.harness.clock.now += seconds

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness") and sys.exc_info()[0] is None:  # or it would hide what went wrong
            self.harness.run()
            self.harness.check_at_rest()


class RecoveryMachine(SchedulerMachine):
    """The ranks die as well: killed, by some fault, or by a log that is poison to them."""

    @rule(request=requests(), constraint=constraints, at=st.integers(-2, 5), copies=st.integers(0, 2))
    def add_poison(self, request: GenerationRequest, constraint: Stepwise | None, at: int, copies: int) -> None:
        """Among others like it, so that there is company. `at` counts from the prompt's end."""
        poison = replace(request.params, logit_bias={POISON: float(max(0, len(request.prompt) + at))})
        for params in [*[request.params] * copies, poison]:
            self._add(replace(request, params=params, seed=request.seed + self.num_added), constraint)

    @rule()
    def kill(self) -> None:
        self.harness.fail(is_suspect=False)

    @rule()
    @precondition(lambda self: self.harness.in_flight)
    def fault(self) -> None:
        self.harness.fail(is_suspect=True)

    @rule()
    @precondition(lambda self: self.harness.in_flight and self.harness.jury.suspects)
    def abort_whoever_is_alone(self) -> None:
        self.harness.abort(self.harness.scheduler._flights[-1].rows[0][0].request.id)

    @rule(names_rows=st.booleans(), sees_at_once=st.booleans())
    def change_the_rank(self, names_rows: bool, sees_at_once: bool) -> None:
        self.harness.jury.names_rows, self.harness.jury.sees_at_once = names_rows, sees_at_once


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)

TestRecovery = RecoveryMachine.TestCase
TestRecovery.settings = TestScheduler.settings
