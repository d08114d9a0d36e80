"""What `shoal bench serve` asks: conversations made from a seed, word for word the same for every server.

The answers in a conversation's history are the load's own, not the server's: so nothing that is sent depends on who
answers, and a server's cache finds a turn's earlier prompts, but not what it answered itself.
"""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..runtime.errors import ConfigError
from .bench_words import Words

# Lengths and turns as published of ShareGPT: vLLM's paper (arXiv:2309.06180, figure 11) has means of 161 and 338.
MESSAGE_MEAN, MESSAGE_SIGMA = 161, 1.0
ANSWER_MEAN, ANSWER_SIGMA = 338, 0.8
LONGEST_TEXT = 1024
MEAN_TURNS, MAX_TURNS = 3.0, 8

CHARACTERS_A_TOKEN = 4  # of texts from a file: every server is asked for as much, whatever its tokenizer


@dataclass(frozen=True, slots=True)
class Turn:
    """What is said and how long the answer is to be. answer: what the history says was answered."""

    message: str
    message_tokens: int
    answer: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. texts: in turns, the user first and last. prompt_tokens: as meant; None: not known."""

    conversation: int
    turn: int
    texts: tuple[str, ...]
    prompt_tokens: int | None
    output_tokens: int


class Load(Protocol):
    """What is asked, without a moment. name: for people and documents."""

    name: ClassVar[str]

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer at most; None: not known."""
        ...

    def conversations(self, words: Words, seed: str) -> Iterator[list[Turn]]:
        """In order, without end where they are made; the same for the same words and seed."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """Tokens, both ends included."""

    low: int
    high: int

    @staticmethod
    def parse(text: str, flag: str, *, least: int = 1) -> Range:
        """Of `512` or `256:1024`. Raises ConfigError."""
        low, colon, high = text.partition(":")
        try:
            found = Range(int(low), int(high if colon else low))
        except ValueError:
            raise ConfigError(f"{flag} {text}: expected a number of tokens, or two as 256:1024") from None
        if found.low < least or found.high < found.low:
            raise ConfigError(f"{flag} {text}: expected at least {least}, and the smaller number first")
        return found

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class RandomLoad:
    """Prompts that share nothing, of one turn."""

    name: ClassVar[str] = "random"
    input: Range
    output: Range

    @property
    def longest(self) -> int:
        return self.input.high + self.output.high

    def conversations(self, words: Words, seed: str) -> Iterator[list[Turn]]:
        rng = random.Random(f"{seed}/random")
        while True:
            tokens = self.input.draw(rng)
            yield [Turn(words.text(rng, tokens - words.base), tokens, "", self.output.draw(rng))]


@dataclass(frozen=True, slots=True)
class SharedPrefixLoad:
    """Conversations under a few long system prompts: each group's begin with the same `prefix` tokens."""

    name: ClassVar[str] = "shared-prefix"
    groups: int
    prefix: int
    input: Range
    output: Range
    turns: int

    @property
    def longest(self) -> int:
        return self.prefix + self.turns * (self.input.high + self.output.high)

    def conversations(self, words: Words, seed: str) -> Iterator[list[Turn]]:
        rng = random.Random(f"{seed}/shared-prefix")
        prefixes = [words.text(rng, self.prefix - words.base) for _ in range(self.groups)]
        while True:
            turns = []
            for number in range(self.turns):
                tokens, output = self.input.draw(rng), self.output.draw(rng)
                message = " ".join(rng.choices(words.words, k=tokens)) if number == 0 else words.text(rng, tokens)
                turns.append(Turn(message, tokens, words.text(rng, output), output))
            first = turns[0]
            whole = f"{rng.choice(prefixes)} {first.message}"
            yield [Turn(whole, self.prefix + first.message_tokens, first.answer, first.output_tokens), *turns[1:]]


@dataclass(frozen=True, slots=True)
class ShareGptLikeLoad:
    """Conversations with lognormal lengths and a geometric number of turns, as long as they fit `longest` tokens."""

    name: ClassVar[str] = "sharegpt-like"
    longest: int

    def conversations(self, words: Words, seed: str) -> Iterator[list[Turn]]:
        rng = random.Random(f"{seed}/sharegpt")
        while True:
            left = self.longest - words.base
            turns: list[Turn] = []
            for _ in range(_num_turns(rng)):
                said = min(_lognormal(rng, MESSAGE_MEAN, MESSAGE_SIGMA), self.longest // 2)
                answered = _lognormal(rng, ANSWER_MEAN, ANSWER_SIGMA)
                left -= said + answered + words.pair
                if left < 0 and turns:
                    break
                answered = max(1, answered + min(0, left))  # a first turn is made to fit
                tokens = said + (0 if turns else words.base)
                turns.append(Turn(words.text(rng, said), tokens, words.text(rng, answered), answered))
            yield turns


@dataclass(frozen=True, slots=True)
class FileLoad:
    """Conversations of a file, in an order that the seed chooses. Ends with the file."""

    name: ClassVar[str] = "file"
    found: Sequence[list[Turn]]
    longest: int | None = None

    @property
    def num_turns(self) -> int:
        return sum(len(turns) for turns in self.found)

    def conversations(self, words: Words, seed: str) -> Iterator[list[Turn]]:
        order = list(self.found)
        random.Random(f"{seed}/file").shuffle(order)
        return iter(order)


def read_file(file: Path, max_context: int) -> FileLoad:
    """ShareGPT's JSON, or a line of {"prompt", "output_tokens"} each. Raises ConfigError.

    Turns are left out from where a conversation is longer than `max_context` tokens, by an estimate.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: {error}") from None
    rows = _json_rows(text, file)
    found = [turns for row in rows if (turns := _fitting(_turns_of(row), max_context))]
    if not found:
        raise ConfigError(
            f"--file {file}: none of its {len(rows)} rows is a conversation of ShareGPT's, or a prompt with "
            f'"output_tokens", of at most {max_context} tokens (--max-context)'
        )
    return FileLoad(found)


def _json_rows(text: str, file: Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            rows: list[Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--file {file}: not JSON: {error}") from None
        return rows
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"--file {file}: line {number} is not JSON: {error}") from None
    return rows


def _turns_of(row: Any) -> list[Turn]:
    """Empty where it is no row that we know."""
    match row:
        case {"prompt": str(prompt), "output_tokens": int(tokens)} if prompt and tokens > 0:
            return [Turn(prompt, _estimate(prompt), "", tokens)]
        case {"conversations": [*said]}:
            return _share_gpt_turns(said)
    return []


def _share_gpt_turns(said: Sequence[Any]) -> list[Turn]:
    """Pairs of a human's message and a model's answer, from the start on, up to what is no such pair."""
    turns = []
    for pair in zip(said[::2], said[1::2], strict=False):
        match pair:
            case {"from": "human" | "user", "value": str(asked)}, {"from": "gpt" | "assistant", "value": str(answer)}:
                if not asked or not answer:
                    break
                turns.append(Turn(asked, _estimate(asked), answer, _estimate(answer)))
            case _:
                break
    return turns


def _fitting(turns: Sequence[Turn], max_context: int) -> list[Turn]:
    fitting, length = [], 0
    for turn in turns:
        length += turn.message_tokens + turn.output_tokens
        if length > max_context:
            break
        fitting.append(turn)
    return fitting


def _estimate(text: str) -> int:
    return max(1, math.ceil(len(text) / CHARACTERS_A_TOKEN))


def _num_turns(rng: random.Random) -> int:
    turns = 1
    while turns < MAX_TURNS and rng.random() > 1 / MEAN_TURNS:
        turns += 1
    return turns


def _lognormal(rng: random.Random, mean: int, sigma: float) -> int:
    drawn = mean * math.exp(rng.gauss(-sigma * sigma / 2, sigma))
    return max(4, min(round(drawn), LONGEST_TEXT))


def asks(load: Load, words: Words, seed: str, *, at_once: int) -> Iterator[Ask]:
    """The requests in the order they are sent: `at_once` conversations take turns, and others begin as they end."""
    source = enumerate(load.conversations(words, seed))
    waiting = deque((number, 0, turns) for number, turns in islice(source, at_once))
    is_exact = not isinstance(load, FileLoad)
    while waiting:
        number, turn, turns = waiting.popleft()
        yield _ask(number, turn, turns, words.pair if is_exact else None)
        if turn + 1 < len(turns):
            waiting.append((number, turn + 1, turns))
        elif (more := next(source, None)) is not None:
            waiting.append((more[0], 0, more[1]))


def _ask(number: int, turn: int, turns: Sequence[Turn], pair: int | None) -> Ask:
    before = turns[:turn]
    texts = [text for past in before for text in (past.message, past.answer)]
    tokens = None
    if pair is not None:
        tokens = sum(past.message_tokens + past.output_tokens + pair for past in before) + turns[turn].message_tokens
    return Ask(number, turn, (*texts, turns[turn].message), tokens, turns[turn].output_tokens)


def arrivals(rate: float, burstiness: float, seed: str) -> Iterator[float]:
    """Seconds from the start at which requests come: gaps of a gamma distribution, Poisson's where burstiness is 1.

    A burstiness below 1 makes them come in bursts, above 1 more evenly (as vLLM's benchmark has it).
    """
    rng = random.Random(f"{seed}/arrivals")
    at_s = 0.0
    while True:
        at_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        yield at_s
