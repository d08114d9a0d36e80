"""The load of a simulation: conversations under tenants' system prompts, and the moments at which their turns come.

All of it is settled before the first step, by the seed alone: every balancer is given the same requests, with the same
tokens, at the same moments. Only where an answer is not there yet does the next turn of its conversation wait for it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..runtime.blocks import BlockNames, Digest, tenant_salt
from .sim_config import SPREAD, SimConfig, StepCosts

VOCAB = 256  # small integers are cheap
SECRET = b"simulation"
READ_S = 0.2  # a client's pause behind an answer that it had to wait for
_DIAL = 3  # tokens that make a text unlike all others: they count in base VOCAB
_SIGMA = 0.5  # of the logarithm of lengths
_TABLE = 1 << 12  # lengths are drawn from so many that were drawn before


class _Names(BlockNames):
    """The names of a log's blocks; those of its beginning are known from other logs that begin so."""

    __slots__ = ()

    def __init__(self, tokens: list[int], known: Sequence[Digest], *, salt: Digest, block_size: int) -> None:
        super().__init__(tokens, salt=salt, block_size=block_size)
        self._digests += known


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation as it will be: every token that anybody will say, and the names of its blocks.

    A turn's prompt is `tokens[:ends[turn][0]]`, its answer goes on to `ends[turn][1]`. So no turn hashes again what the
    one before it has hashed, nor does anybody else who asks for these names.
    """

    tokens: list[int]
    names: BlockNames
    ends: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request to come. number: of `num_turns`, from 0."""

    at_s: float
    conversation: int
    number: int
    num_turns: int


class Load:
    """What is asked, and when."""

    def __init__(self, config: SimConfig, costs: StepCosts) -> None:
        self._config = config
        self._block_size = costs.block_size
        self.rate = config.load * config.replicas / cold_request_s(config, costs)
        rng = random.Random(f"{config.seed}/words")
        words = rng.choices(range(VOCAB), k=1 << 16)
        self._words = words * (2 + SPREAD * max(config.system_tokens, config.answer_tokens) // len(words))
        self._salt = tenant_salt(SECRET, "")
        self._popularity = list(accumulate(1 / rank for rank in range(1, config.tenants + 1)))
        self._system_lengths = _lengths(rng, config.system_tokens)
        self._message_lengths = _lengths(rng, config.message_tokens)
        self._answer_lengths = _lengths(rng, config.answer_tokens)
        self._systems: dict[int, tuple[list[int], list[Digest]]] = {}  # tenant -> its prompt, the names of its blocks

    def turns(self) -> Iterator[Turn]:
        """All requests, in the order of their moments.

        As many conversations go on at once as make pauses of `think_s` in the mean; the first are under way already.
        """
        config, max_turns = self._config, self._config.max_turns
        rng = random.Random(f"{config.seed}/turns")
        shape = config.burstiness**-2
        at_s, num_begun = 0.0, 0
        slots: list[tuple[int, int, int]] = []  # conversation, its next turn, its turns
        num_slots = max(1, round(self.rate * config.think_s)) if max_turns > 1 else 1
        for _ in range(config.requests):
            at_s += rng.gammavariate(shape, 1 / (self.rate * shape))
            place = rng.randrange(num_slots)
            if place >= len(slots):
                place = len(slots)
                num_turns = rng.randint(1, max_turns)
                slots.append((num_begun, rng.randrange(num_turns), num_turns))
                num_begun += 1
            conversation, number, num_turns = slots[place]
            yield Turn(at_s, conversation, number, num_turns)
            slots[place] = (conversation, number + 1, num_turns)
            if number + 1 == num_turns:
                slots[place] = (num_begun, 0, rng.randint(1, max_turns))
                num_begun += 1

    def script(self, conversation: int, num_turns: int) -> Script:
        """What a conversation will be. Made anew at each call; the same each time."""
        rng = random.Random((self._config.seed << 32) + conversation)
        if self._config.workload == "shared":
            tenant = rng.choices(range(self._config.tenants), cum_weights=self._popularity)[0]
            system, known = self._system(tenant)
            tokens = system.copy()
        else:
            tokens, known = [*_dial(conversation), *self._text(rng, self._system_lengths)], []
        ends = []
        for _ in range(num_turns):
            tokens += _dial(conversation)
            tokens += self._text(rng, self._message_lengths)
            prompt = len(tokens)
            tokens += self._text(rng, self._answer_lengths)
            ends.append((prompt, len(tokens)))
        return Script(tokens, _Names(tokens, known, salt=self._salt, block_size=self._block_size), ends)

    def _system(self, tenant: int) -> tuple[list[int], list[Digest]]:
        made = self._systems.get(tenant)
        if made is None:
            tokens = self._text(random.Random(f"{self._config.seed}/system/{tenant}"), self._system_lengths)
            names = BlockNames(tokens, salt=self._salt, block_size=self._block_size)
            made = self._systems[tenant] = tokens, list(names.first(len(tokens) // self._block_size))
        return made

    def _text(self, rng: random.Random, lengths: list[int]) -> list[int]:
        """A piece of one long random text, of one of these lengths."""
        start, length = int(rng.random() * (1 << 16)), lengths[int(rng.random() * _TABLE)]
        return self._words[start : start + length]


def cold_request_s(config: SimConfig, costs: StepCosts) -> float:
    """Seconds of a replica that a request costs where nothing is cached and steps are as full as they get."""
    history = (config.max_turns - 1) / 2 * (config.message_tokens + config.answer_tokens)
    prompt = config.system_tokens + history + config.message_tokens
    length = prompt + config.answer_tokens / 2
    rows = max(1.0, min(costs.max_num_seqs, costs.kv_tokens / length))
    step_s = costs.base_s / rows + costs.decode_row_s + length * costs.context_token_s
    return prompt * costs.prefill_token_s + config.answer_tokens * step_s


def _lengths(rng: random.Random, mean: int) -> list[int]:
    """Lognormal around `mean`, cut at the longest that the config allows for."""
    drawn = (mean * math.exp(rng.gauss(-_SIGMA * _SIGMA / 2, _SIGMA)) for _ in range(_TABLE))
    return [max(1, min(round(length), SPREAD * mean - _DIAL)) for length in drawn]


def _dial(number: int) -> tuple[int, int, int]:
    return number % VOCAB, number // VOCAB % VOCAB, number // VOCAB**2 % VOCAB
