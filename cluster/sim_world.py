"""Routers, replicas and clients on one virtual clock, under one balancer: what happens next, and what came of it.

Nothing here waits and nothing reads a wall clock: an event is a moment and what to do then, and the earliest is next.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

import msgspec

from ..router.balance import BalancerName
from ..runtime.errors import QueueFull
from ..runtime.generation import GenerationRequest, SamplingParams, TokenEvent
from .sim_config import SimConfig, StepCosts
from .sim_ingress import Sent, SimIngress
from .sim_load import READ_S, Load, Script, Turn
from .sim_replica import Gaps, SimReplica

_RETRY_S = 0.1  # where no replica is there, ask again


@dataclass(slots=True)
class _Conversation:
    script: Script
    is_busy: bool = False
    waiting: deque[Turn] = field(default_factory=deque)  # turns whose moment came before the last answer


@dataclass(slots=True)
class _Flow:
    """One request, from its client to its end."""

    request: GenerationRequest
    script: Script
    turn: Turn
    ingress: SimIngress
    came_at: float
    replica: SimReplica | None = None
    sent: Sent | None = None
    num_sent: int = 0  # attempts: a message of an earlier one is void
    lost: frozenset[str] = frozenset()
    first_at: float | None = None
    spoke_at: float | None = None  # its last token, where it waits for a replica to go on


@dataclass(slots=True)
class Outcome:
    """What one balancer came to. Times in seconds, one entry for each request that was answered."""

    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    e2e_s: array[float] = field(default_factory=lambda: array("d"))
    gaps: Gaps = field(default_factory=Gaps)
    output_tokens: int = 0
    refused: int = 0
    kills: int = 0
    interrupted: int = 0
    resumed: int = 0
    end_s: float = 0.0
    loads: list[float] = field(default_factory=list)  # tokens that each replica computed in a second of its life
    steps: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0


class World:
    """One simulation. `run` it once."""

    def __init__(self, balancer: BalancerName, config: SimConfig, costs: StepCosts) -> None:
        self.now = 0.0
        self.outcome = Outcome()
        self._config = config
        self._costs = costs
        self._load = Load(config, costs)
        self._turns = self._load.turns()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._rng = random.Random(f"{config.seed}/world")
        self._ingresses = [
            SimIngress(balancer, rng=random.Random(f"{config.seed}/{balancer}/{index}"))
            for index in range(config.ingresses)
        ]
        self._conversations: dict[int, _Conversation] = {}
        self._flows: dict[str, _Flow] = {}
        self._params_of: dict[int, SamplingParams] = {}
        self._numbers = count()
        self._replicas: dict[str, SimReplica] = {}
        for _ in range(config.replicas):
            self._join()

    def run(self) -> Iterator[int]:
        """Until every request has ended; gives their number every now and then."""
        config, outcome, events = self._config, self.outcome, self._events
        self._next_turn()
        for index, replica in enumerate(list(self._replicas.values())):
            self._at(config.beat_s * index / config.replicas, partial(self._beat, replica))
        if config.kill_every is not None:
            self._at(config.kill_every, self._kill)
        report = step = max(1, config.requests // 100)
        ended = 0
        while ended < config.requests:
            self.now, _, event = heappop(events)
            event()
            ended = len(outcome.e2e_s) + outcome.refused
            if ended >= report:
                report += step
                yield ended
        outcome.end_s = self.now
        for replica in self._replicas.values():
            self._settle(replica)

    def check(self) -> None:
        """Assert that nothing is left behind. For tests."""
        assert not self._flows, "a request has not ended"
        assert not any(talk.is_busy or talk.waiting for talk in self._conversations.values())
        for replica in self._replicas.values():
            replica.check()

    def _at(self, moment: float, event: Callable[[], None]) -> None:
        heappush(self._events, (moment, next(self._order), event))

    # Clients

    def _next_turn(self) -> None:
        turn = next(self._turns, None)
        if turn is not None:
            self._at(turn.at_s, partial(self._come, turn))

    def _come(self, turn: Turn) -> None:
        self._next_turn()
        talk = self._conversations.get(turn.conversation)
        if talk is None:
            talk = self._conversations[turn.conversation] = _Conversation(
                self._load.script(turn.conversation, turn.num_turns)
            )
        if talk.is_busy:
            talk.waiting.append(turn)
        else:
            self._ask(talk, turn)

    def _ask(self, talk: _Conversation, turn: Turn) -> None:
        talk.is_busy = True
        prompt, end = talk.script.ends[turn.number]
        request = GenerationRequest(
            id=f"{turn.conversation}.{turn.number}",
            prompt=talk.script.tokens[:prompt],
            params=self._params(end - prompt),
            seed=0,
        )
        ingress = self._ingresses[self._rng.randrange(len(self._ingresses))]
        flow = _Flow(request, talk.script, turn, ingress, self.now)
        assert request.id not in self._flows, "a turn comes once"
        self._flows[request.id] = flow
        self._route(flow)

    def _params(self, length: int) -> SamplingParams:
        """An answer of this length; equal ones share the value, which is checked when it is made."""
        params = self._params_of.get(length)
        if params is None:
            params = self._params_of[length] = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        return params

    def _leave(self, flow: _Flow) -> None:
        """The request has ended; the conversation goes on, if its next turn is due already."""
        del self._flows[flow.request.id]
        talk = self._conversations[flow.turn.conversation]
        talk.is_busy = False
        if talk.waiting:
            turn = talk.waiting.popleft()
            talk.is_busy = True
            self._at(self.now + READ_S, partial(self._ask, talk, turn))
        elif flow.turn.number + 1 == flow.turn.num_turns:
            del self._conversations[flow.turn.conversation]

    # Routers

    def _route(self, flow: _Flow) -> None:
        request, ingress = flow.request, flow.ingress
        name = ingress.choose(request, flow.script, lost=flow.lost)
        if name is None and self._replicas.keys() <= flow.lost and self._replicas:
            self.outcome.refused += 1
            self._leave(flow)
        elif name is None:
            self._at(self.now + _RETRY_S, partial(self._route, flow))
        else:
            arrives_at = self.now + self._config.network_s
            flow.sent = ingress.send(request, flow.script, name, arrives_at)
            flow.replica = self._replicas[name]
            flow.num_sent += 1
            attempt = flow.num_sent
            self._at(arrives_at, partial(self._deliver, flow, attempt))

    def _deliver(self, flow: _Flow, attempt: int) -> None:
        replica = flow.replica
        if replica is None or flow.num_sent != attempt:
            return  # the replica died meanwhile
        before = replica.wakes_at
        try:
            replica.take(flow.request, flow.script, spoke_at=flow.spoke_at)
        except QueueFull:
            assert flow.sent is not None
            flow.ingress.ended(flow.sent)
            flow.lost |= {replica.name}
            flow.replica = None
            self._route(flow)
        self._watch(replica, before)

    # Replicas

    def _join(self) -> SimReplica:
        number = next(self._numbers)
        replica = SimReplica(
            f"replica-{number:05}", self._config, self._costs, clock=lambda: self.now, gaps=self.outcome.gaps
        )
        self._replicas[replica.name] = replica
        for ingress in self._ingresses:
            ingress.join(replica.name, replica.stats(), block_size=self._costs.block_size)
        return replica

    def _watch(self, replica: SimReplica, before: float) -> None:
        """See that the replica is woken at the end of what it does now, if that has changed."""
        moment = replica.wakes_at
        if moment != before and moment != float("inf"):
            self._at(moment, partial(self._wake, replica, moment))

    def _wake(self, replica: SimReplica, moment: float) -> None:
        if replica.wakes_at != moment or self._replicas.get(replica.name) is not replica:
            return  # a stretch was cut short, or the replica is dead
        for event in replica.wake():
            self._hear(event)
        self._watch(replica, moment)

    def _hear(self, event: TokenEvent) -> None:
        """A client's first token, or its last."""
        flow = self._flows[event.id]
        assert flow.sent is not None, "a replica answers what it was sent"
        if flow.first_at is None:
            flow.first_at = self.now
            self.outcome.ttft_s.append(self.now - flow.came_at)
        flow.ingress.answered(flow.sent)
        if event.finish_reason is None:
            return
        length = event.start + len(event.tokens)
        prompt, end = flow.script.ends[flow.turn.number]
        assert length == end - prompt, f"{event.id}: {length} tokens instead of {end - prompt}"
        assert event.tokens == flow.script.tokens[end - 1 : end], f"{event.id}: not the token that was to be drawn"
        flow.ingress.ended(flow.sent)
        self.outcome.output_tokens += length
        self.outcome.e2e_s.append(self.now - flow.came_at)
        self._leave(flow)

    def _beat(self, replica: SimReplica) -> None:
        if self._replicas.get(replica.name) is not replica:
            return
        before = replica.wakes_at
        stats = replica.stats()
        self._watch(replica, before)
        changes = replica.changes() if self._ingresses[0].reads_names else None
        for ingress in self._ingresses:
            ingress.hear(replica.name, stats, changes, self.now)
        self._at(self.now + self._config.beat_s, partial(self._beat, replica))

    # Faults

    def _kill(self) -> None:
        """A replica dies with its cache. What it had not finished goes on elsewhere, from the tokens that came."""
        config, outcome = self._config, self.outcome
        assert config.kill_every is not None
        self._at(self.now + config.kill_every, self._kill)
        if not self._replicas:
            return
        replica = self._replicas.pop(self._rng.choice(sorted(self._replicas)))
        outcome.kills += 1
        logs = replica.logs()
        for ingress in self._ingresses:
            ingress.lose(replica.name)
        self._settle(replica)
        self._at(self.now + config.restart_s, self._restart)
        for flow in [flow for flow in self._flows.values() if flow.replica is replica]:
            tokens = logs.get(flow.request.id, [])
            expected = flow.script.tokens[len(flow.request.prompt) :]
            assert tokens == expected[: len(tokens)], f"{flow.request.id}: not the tokens that were to be drawn"
            flow.request = msgspec.structs.replace(flow.request, tokens=tokens)
            flow.lost = frozenset({replica.name})
            flow.replica = flow.sent = None
            flow.num_sent += 1
            flow.spoke_at = self.now if tokens else None
            outcome.interrupted += 1
            outcome.resumed += bool(tokens)
            self._route(flow)

    def _restart(self) -> None:
        replica = self._join()
        self._beat(replica)

    def _settle(self, replica: SimReplica) -> None:
        """Take what the replica has counted into the outcome."""
        outcome, counters = self.outcome, replica.counters
        computed = counters.prefix_query_tokens - counters.prefix_hit_tokens + counters.generation_tokens
        if self.now > replica.born_at:
            outcome.loads.append(computed / (self.now - replica.born_at))
        outcome.steps += replica.num_steps
        outcome.query_tokens += counters.prefix_query_tokens
        outcome.hit_tokens += counters.prefix_hit_tokens
        outcome.preemptions += counters.preemptions
