"""Station 6: which replica takes a log. Pure: what it chooses by, and its dice, are handed in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from ..runtime.generation import GenerationRequest
from .backend import ReplicaState
from .prefix_index import PrefixIndex

Replicas = Callable[[], Mapping[str, ReplicaState]]
OnChoice = Callable[[int, int], None]  # told a log's tokens, and how many of them are expected in the chosen cache
BalancerName = Literal["prefix", "p2c", "round-robin", "least-loaded"]

# What work costs, in the time that one token of a prompt takes to compute.
GENERATION_COST = 32  # a live generation: it takes a row of each step, beside the newcomer's prompt and its answer
SHORTAGE_COST = 4  # a token without room in the KV cache: it waits for answers to end, which come slower than prompts

NOISE = 2  # prompts like the newcomer's that may have come to a replica, or gone from it, since it was heard of last


class Balancer(Protocol):
    """Chooses before every attempt, so also before a log goes on elsewhere."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        """A replica's id; None leaves it to the transport. `lost`: replicas that failed this log already."""
        ...


class AnyReplica:
    """The null balancer: whichever the transport prefers."""

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        return None


class RoundRobin:
    """Each ready replica in its turn, whatever it has to do."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._turn = 0

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        ready = sorted(_ready(self._replicas, lost))
        self._turn += 1
        return ready[self._turn % len(ready)] if ready else None


class LeastLoaded:
    """The ready replica that owes the fewest tokens; of equals any, so that ingresses do not all choose the same."""

    def __init__(self, replicas: Replicas, *, rng: random.Random) -> None:
        self._replicas = replicas
        self._rng = rng

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        owed = {replica: state.tokens_owed for replica, state in _ready(self._replicas, lost).items()}
        least = min(owed.values(), default=0)
        return self._rng.choice([replica for replica, tokens in owed.items() if tokens == least]) if owed else None


class PowerOfTwo:
    """Of two ready replicas drawn at random the one that owes less.

    Nearly as even as the least loaded of all, and several ingresses that know of a load only late do not all run to
    where it was least (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001).
    """

    def __init__(self, replicas: Replicas, *, rng: random.Random) -> None:
        self._replicas = replicas
        self._rng = rng

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        ready = _ready(self._replicas, lost)
        drawn = self._rng.sample(list(ready), min(2, len(ready)))
        return min(drawn, key=lambda replica: ready[replica].tokens_owed, default=None)


class PrefixAffinity:
    """Where the log is answered with the least work: what is not in the cache there, behind what is to be done before.

    A replica that has the prefix keeps its traffic until its load makes one that has not the cheaper; what was just
    sent counts as load at once, so that many with one prefix spread at once. Replicas with equally much of the prefix
    differ by their load alone. There news is old by the time it is known, and whoever follows every difference makes
    all ingresses follow it: so they take turns, as `RoundRobin` does, unless another one drawn has clearly less to do.
    """

    def __init__(
        self, replicas: Replicas, index: PrefixIndex, *, rng: random.Random, on_choice: OnChoice = lambda *_: None
    ) -> None:
        self._replicas = replicas
        self._index = index
        self._rng = rng
        self._on_choice = on_choice
        self._turn = rng.randrange(2**16)  # several ingresses do not take turns together

    def choose(self, request: GenerationRequest, *, lost: frozenset[str]) -> str | None:
        ready = _ready(self._replicas, lost)
        num_tokens = len(request.prompt) + len(request.tokens)
        self._turn += 1
        drawn = [
            (self._drawn(equals, ready, num_tokens - spared), spared)
            for spared, equals in self._by_spared(request, ready).items()
        ]
        if not drawn:
            return None
        replica, spared = min(drawn, key=lambda one: (cost(ready[one[0]], num_tokens - one[1]), -one[1]))
        self._on_choice(num_tokens, spared)
        return replica

    def _drawn(self, equals: list[str], ready: Mapping[str, ReplicaState], uncached: int) -> str:
        """Of replicas that differ by their load alone: whose turn it is, unless one drawn has clearly less to do."""
        in_turn = equals[self._turn % len(equals)]
        if len(equals) == 1:
            return in_turn
        other = equals[(self._turn + self._rng.randrange(1, len(equals))) % len(equals)]
        clearly = cost(ready[in_turn], uncached) - NOISE * uncached
        return other if cost(ready[other], uncached) < clearly else in_turn

    def _by_spared(self, request: GenerationRequest, ready: Mapping[str, ReplicaState]) -> dict[int, list[str]]:
        """Tokens of the log that a cache spares -> the ready replicas where it does."""
        blocks = self._index.match(request)
        found: dict[int, list[str]] = {}
        for replica, num in blocks.items():
            if replica in ready:
                found.setdefault(num * self._index.block_size, []).append(replica)
        if cold := [replica for replica in ready if replica not in blocks]:
            found[0] = cold
        return found


def select_balancer(
    name: BalancerName,
    replicas: Replicas,
    index: PrefixIndex,
    *,
    rng: random.Random,
    on_choice: OnChoice = lambda *_: None,
) -> Balancer:
    """The balancer that `router.balancer` names. on_choice: of prefix affinity alone."""
    if name == "prefix":
        return PrefixAffinity(replicas, index, rng=rng, on_choice=on_choice)
    if name == "p2c":
        return PowerOfTwo(replicas, rng=rng)
    return RoundRobin(replicas) if name == "round-robin" else LeastLoaded(replicas, rng=rng)


def cost(state: ReplicaState, uncached: int) -> float:
    """What it takes until a log, `uncached` of whose tokens are to be computed, is answered: in tokens of a prompt."""
    stats = state.stats
    prefill = uncached + state.prefill_tokens_owed
    shortage = max(0, prefill - stats.num_tokens_free) if stats.num_blocks else 0
    return prefill + GENERATION_COST * state.num_generations + SHORTAGE_COST * shortage


def _ready(replicas: Replicas, lost: frozenset[str]) -> dict[str, ReplicaState]:
    return {replica: state for replica, state in replicas().items() if state.problem is None and replica not in lost}
