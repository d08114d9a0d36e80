"""What the router asks of whatever makes tokens: the values and the Protocol between stations 7 and 8.

No Ray here: `LineBackend` (line_client.py) speaks to replicas over sockets of ours, the tests' one is in process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import msgspec

from ..parallel.group import RankInfo
from ..runtime import errors as e
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.stats import Stats


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress must know of the model that replicas serve. Lengths in tokens.

    digest: of its weights, its tokenizer and what else decides its tokens (runtime/fingerprint.py).
    block_size: of the blocks whose names the replica publishes (router/prefix_index.py); 0 where it publishes none.
    """

    model: str
    digest: str = ""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int] = msgspec.field(default_factory=list)
    dtype: str = ""
    kv_tokens: int = 0
    block_size: int = 0
    created: int = 0  # unix seconds


class ReplicaLost(e.EngineDead):
    """The replica went away with the log unfinished, and nobody knows why: what it computed may have ended it.

    The tokens it emitted stand, another one can go on.
    """


class ReplicaLeft(e.Unavailable):
    """The replica said that it would go, and has gone with the log unfinished: another goes on, nobody is to blame."""


class Poison(e.RowFailed):
    """Ranks or replicas were lost while they computed this one, and it alone: nobody else is to try it."""


class Status(msgspec.Struct, frozen=True, array_like=True):
    """A replica's word on itself. problem: why it takes no work; None where it does. ranks: its grid."""

    problem: str | None
    stats: Stats
    ranks: list[RankInfo] = []


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """What an ingress knows of one replica that is connected: what a balancer chooses by.

    problem: why it takes no work, or does not answer; None where it is ready. stats, ranks: its last word. in_flight:
    this ingress's generations on it. heard_s: seconds since anything came from it. digest: of the model it serves.
    is_leaving: it is to go, and others are to take what is new.

    How this ingress corrects `stats` (router/ledger.py). num_sent, tokens_sent, prefill_sent: its generations that are
    not counted there yet, the most that they may cost, and what of it is prompt that is yet to be computed and not in
    the cache. num_ended, prefill_answered: those that are still counted though they are over, or have a token.
    prefill_unanswered: prompt to compute of all that have none.
    """

    problem: str | None
    stats: Stats
    ranks: list[RankInfo]
    in_flight: int
    tokens_sent: int
    heard_s: float = 0.0
    digest: str = ""
    is_leaving: bool = False
    num_sent: int = 0
    prefill_sent: int = 0
    num_ended: int = 0
    prefill_answered: int = 0
    prefill_unanswered: int = 0

    @property
    def tokens_owed(self) -> int:
        """The most that its live generations may still cost, in tokens."""
        return self.stats.tokens_owed + self.tokens_sent

    @property
    def prefill_tokens_owed(self) -> int:
        """Tokens that it computes before those of a newcomer, about."""
        known = self.stats.prefill_tokens_owed - self.prefill_answered + self.prefill_sent
        return max(known, self.prefill_unanswered)

    @property
    def num_generations(self) -> int:
        """Its live generations, about."""
        return max(self.stats.num_running + self.stats.num_waiting - self.num_ended + self.num_sent, self.in_flight)


def check_ready(replicas: Mapping[str, ReplicaState]) -> None:
    """Returns if one can take work now.

    Raises:
        Unavailable: none can; with what keeps each.
    """
    if not replicas:
        raise e.Unavailable("not ready: no replica is connected")
    problems = {replica: state.problem for replica, state in replicas.items()}
    if None in problems.values():
        return
    told = list(dict.fromkeys(problems.values()))
    if len(told) == 1:
        raise e.Unavailable(f"not ready: {told[0]}" + (f" (all {len(problems)} replicas)" if len(problems) > 1 else ""))
    raise e.Unavailable("not ready: " + "; ".join(f"{replica}: {problem}" for replica, problem in problems.items()))


class Backend(Protocol):
    """Where generations run. Safe to call from many tasks of one event loop."""

    def generate(self, request: GenerationRequest, replica: str | None = None) -> AsyncIterator[list[TokenEvent]]:
        """The log's events as they come, all that are ready in one list; ends behind the one with a finish reason.

        `replica`: the balancer's choice; None leaves it to the transport. Closing or cancelling the iterator aborts
        the generation.

        Raises:
            ReplicaLost: see there. Unavailable: no replica is connected, or the chosen one is gone or leaves.
            ShoalError: as the engine raised it.
        """
        ...

    async def info(self) -> ModelInfo:
        """Raises Unavailable where no replica answers yet."""
        ...

    async def ready(self) -> None:
        """Returns if a replica can take work now; raises Unavailable with the reason otherwise."""
        ...

    async def stats(self) -> Mapping[str, Stats]:
        """Replica id -> how things stood there a moment ago, of every connected replica."""
        ...

    def replicas(self) -> Mapping[str, ReplicaState]:
        """Replica id -> what is known of it now, of every connected replica."""
        ...


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `ShoalError` on the wire: exceptions do not cross processes, their kind, text and fields do."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None


_KINDS: dict[str, type[e.ShoalError]] = {
    kind.__name__: kind for kind in vars(e).values() if isinstance(kind, type) and issubclass(kind, e.ShoalError)
}


def failure_of(error: e.ShoalError) -> Failure:
    """The nearest kind of errors.py, so that a subclass private to some module still arrives as what it is."""
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS)
    return Failure(
        kind=kind,
        message=str(error)[:2000],
        param=getattr(error, "param", None),
        code=getattr(error, "code", None),
        retry_after=getattr(error, "retry_after", None),
    )


def error_of(failure: Failure) -> e.ShoalError:
    """The inverse of `failure_of`."""
    kind = _KINDS.get(failure.kind, e.EngineError)
    fields = {name: getattr(failure, name) for name in ("param", "code", "retry_after")}
    given = {name: value for name, value in fields.items() if value is not None}
    if issubclass(kind, e.QueueFull):
        given.pop("param", None)
    elif issubclass(kind, e.RequestError):
        given.pop("retry_after", None)
    elif issubclass(kind, e.Unavailable):
        given = {name: value for name, value in given.items() if name == "retry_after"}
    else:
        given = {}
    return kind(failure.message, **given)
