"""Beside the line: how this ingress corrects one replica's word, which is as old as its last beat. Pure.

It knows what it has sent since, which of its prompts are computed (their answers have begun) and which of its
generations are over. What other ingresses have done since it does not know: there the replica's word stands.
"""

from __future__ import annotations

import msgspec

from ..runtime.generation import GenerationRequest
from .prefix_index import PrefixIndex, Promise


class _Debt(msgspec.Struct):
    """A live stream. tokens: the most it may cost. prefill: those of its log yet to be computed, 0 once it answers."""

    tokens: int
    prefill: int
    promise: Promise


class Ledger:
    """Streams are numbered from 1.

    A prefix that was sent counts as cached until the replica has had the time to say so itself: it publishes a block
    with the step that computes it, so what has answered before one beat is known by the next.
    """

    def __init__(self, replica: str, index: PrefixIndex) -> None:
        self.num_sent = 0
        self.tokens_sent = 0
        self.prefill_sent = 0
        self.num_ended = 0
        self.prefill_answered = 0
        self.prefill_unanswered = 0
        self._replica = replica
        self._index = index
        self._debts: dict[int, _Debt] = {}
        self._received = 0  # the last stream that the replica's word counts
        self._answered: list[Promise] = []  # since the last beat,
        self._kept: list[Promise] = []  # and before it

    def corrections(self) -> dict[str, int]:
        """What `ReplicaState` says beside the replica's own word."""
        return {
            "num_sent": self.num_sent,
            "tokens_sent": self.tokens_sent,
            "prefill_sent": self.prefill_sent,
            "num_ended": self.num_ended,
            "prefill_answered": self.prefill_answered,
            "prefill_unanswered": self.prefill_unanswered,
        }

    def sent(self, stream: int, request: GenerationRequest) -> None:
        spared, promise = self._index.send(request, self._replica)
        prefill = len(request.prompt) + len(request.tokens) - spared
        self._debts[stream] = debt = _Debt(len(request.prompt) + (request.params.max_tokens or 0), prefill, promise)
        self.num_sent += 1
        self.tokens_sent += debt.tokens
        self.prefill_sent += prefill
        self.prefill_unanswered += prefill

    def answered(self, stream: int) -> None:
        """Events of the stream are here, so its prompt is computed."""
        debt = self._debts.get(stream)
        if debt is not None and debt.prefill:
            self._answered.append(debt.promise)
            self._settle(stream, debt)

    def ended(self, stream: int) -> None:
        """The stream is over; if nothing came of it, its prompt may never be computed."""
        debt = self._debts.pop(stream, None)
        if debt is None:
            return
        if debt.prefill:
            debt.promise.close()
            self._settle(stream, debt)
        if stream > self._received:
            self.num_sent -= 1
            self.tokens_sent -= debt.tokens
        else:
            self.num_ended += 1

    def beat(self, received: int) -> None:
        """The replica has spoken, and counts all streams up to `received`."""
        for stream in range(self._received + 1, received + 1):
            if (debt := self._debts.get(stream)) is not None:
                self.num_sent -= 1
                self.tokens_sent -= debt.tokens
                self.prefill_sent -= debt.prefill
        self._received = max(self._received, received)
        self.num_ended = self.prefill_answered = 0
        for promise in self._kept:
            promise.close()
        self._kept, self._answered = self._answered, []

    def _settle(self, stream: int, debt: _Debt) -> None:
        """Its prompt is off the replica's queue."""
        self.prefill_unanswered -= debt.prefill
        if stream > self._received:
            self.prefill_sent -= debt.prefill
        else:
            self.prefill_answered += debt.prefill
        debt.prefill = 0
