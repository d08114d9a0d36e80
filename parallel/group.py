"""A replica's ranks as the engine sees them: plans go in, results come out, in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

Plan = TypeVar("Plan")
Result = TypeVar("Result")
PlanIn = TypeVar("PlanIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)
T = TypeVar("T")
U = TypeVar("U")

Cause = Literal["killed", "lost", "exception", "hang"]


class GroupFailure(Exception):
    """A rank died, hung or raised: the whole group has ended, and nothing but `restart` or `close` is left to do.

    cause: "killed" by somebody outside, "lost" with its node, or something that the plans in flight may have brought
    about: an "exception" (a crash, too) or a "hang". slots: the rows that the failing rank itself blamed, where it
    could.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        station: str = "",
        cause: Cause = "killed",
        slots: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.station = station
        self.cause: Cause = cause
        self.slots = slots

    @property
    def is_suspect(self) -> bool:
        """Whether the plans in flight may have caused it."""
        return self.cause in ("exception", "hang")


class GroupStartError(Exception):
    """The ranks did not come up: one message for the operator. `kind`: the name of the error that a rank raised."""

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, for the operator. `details` are its worker's own words: layers, heads, bytes of weights and KV."""

    rank: int
    stage: int
    shard: int
    node: str = "local"
    pid: int = 0
    device: str = "cpu"
    details: dict[str, int | str] = {}


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """What has begun, and may go on by itself on a device.

    result: waits for what it comes to; called once, in the order of what was begun. is_done: whether that would not
    have to wait.
    """

    result: Callable[[], T]
    is_done: Callable[[], bool] = lambda: True

    def then(self, change: Callable[[T], U]) -> "Begun[U]":
        """The same, and what is made of its result when that is asked for."""
        return Begun(lambda: change(self.result()), self.is_done)


class Worker(Protocol[PlanIn, Result]):
    """One rank: executes plans in the order they come. Only the output rank's result is looked at."""

    def begin(self, plan: PlanIn) -> Begun[Result]:
        """Start a step. A worker that computes by itself is done when this returns."""
        ...


class WorkerGroup(Protocol[PlanIn, ResultOut]):
    """All ranks of one replica. At most `depth` plans (at least 1) are submitted and not yet collected."""

    depth: int

    def submit(self, plan: PlanIn) -> None:
        """Hand a plan to every rank. Raises GroupFailure; what the worker raised where the rank is in this thread."""
        ...

    def collect(self) -> ResultOut:
        """Wait for the oldest outstanding plan's result. Raises GroupFailure if a rank died or its deadline passed."""
        ...

    def check(self) -> None:
        """Raise GroupFailure if a rank has failed. For while nothing is in flight: `collect` sees it by itself."""
        ...

    def restart(self) -> None:
        """End what is left of the ranks and bring all of them up anew, with nothing in flight and empty caches.

        Raises GroupStartError where they do not come up. GroupFailure: this kind of group cannot be restarted.
        """
        ...

    def ranks(self) -> list[RankInfo]:
        """The grid as it stands, by rank. Any thread may ask."""
        ...

    def close(self) -> None:
        """End the ranks. Idempotent."""
        ...


class LocalGroup(Generic[Plan, Result]):
    """One rank in this very process and thread: nothing is started, nothing is sent."""

    def __init__(self, worker: Worker[Plan, Result], info: RankInfo | None = None, *, depth: int = 1) -> None:
        """depth: 2 where the worker computes on a device, which then has a step to do while the host plans the next."""
        self.depth = depth
        self._worker = worker
        self._info = info or RankInfo(rank=0, stage=0, shard=0)
        self._begun: deque[Begun[Result]] = deque()

    def submit(self, plan: Plan) -> None:
        self._begun.append(self._worker.begin(plan))

    def collect(self) -> Result:
        return self._begun.popleft().result()

    def check(self) -> None:
        pass

    def restart(self) -> None:
        raise GroupFailure("a rank in the engine's own process cannot be started anew")

    def ranks(self) -> list[RankInfo]:
        return [self._info]

    def close(self) -> None:
        self._begun.clear()
