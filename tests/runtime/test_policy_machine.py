"""The scheduler's own machine of every order of calls, ranks that die among them, under the fair policy."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from msgspec.structs import replace

from shoal.runtime.generation import GenerationRequest
from shoal.runtime.policy import FairShare

from .fakes import Stepwise
from .test_scheduler_machine import RecoveryMachine


class FairMachine(RecoveryMachine):
    """Requests belong to the accounts of their tenants, with shares of their own."""

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from([1, 3, 6, 12, 40]),
        depth=st.integers(1, 3),
        microbatches=st.integers(1, 2),
        caching=st.booleans(),
        schedule=st.sampled_from(["ring", "ring", "gpipe"]),
    )
    def start(self, **drawn: object) -> None:
        super().start(policy=FairShare(), **drawn)  # type: ignore[arg-type]

    def _add(self, request: GenerationRequest, constraint: Stepwise | None) -> None:
        super()._add(replace(request, account=request.tenant, share=1.0 + len(request.prompt) % 3), constraint)


TestFair = FairMachine.TestCase
TestFair.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
