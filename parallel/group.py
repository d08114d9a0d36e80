"""A replica's ranks as the engine sees them: plans go in, results come out, in order."""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Plan = TypeVar("Plan")
Result = TypeVar("Result")
PlanIn = TypeVar("PlanIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


class Worker(Protocol[PlanIn, ResultOut]):
    """One rank: executes plans in the order they come."""

    def execute(self, plan: PlanIn) -> ResultOut: ...


class WorkerGroup(Protocol[PlanIn, ResultOut]):
    """All ranks of one replica. At most `depth` plans (at least 1) are submitted and not yet collected."""

    depth: int

    def submit(self, plan: PlanIn) -> None:
        """Hand a plan to every rank. Raises what the worker raised where the rank is in this process."""
        ...

    def collect(self) -> ResultOut:
        """Wait for the oldest outstanding plan's result. Raises if a rank died or its deadline passed."""
        ...

    def close(self) -> None:
        """End the ranks. Idempotent."""
        ...


class LocalGroup(Generic[Plan, Result]):
    """One rank in this very process and thread: nothing is started, nothing is sent."""

    def __init__(self, worker_factory: Callable[[], Worker[Plan, Result]]) -> None:
        self.depth = 1
        self._worker = worker_factory()
        self._results: deque[Result] = deque()

    def submit(self, plan: Plan) -> None:
        self._results.append(self._worker.execute(plan))

    def collect(self) -> Result:
        return self._results.popleft()

    def close(self) -> None:
        self._results.clear()
