"""Output constraints: which tokens may come next in a log, and whether any may (at the scheduler, station 10)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

import llguidance

from .compile_pool import CompilePool
from .errors import InvalidRequest, RowFailed
from .generation import StructuredOutputs
from .grammar_source import grammar_source
from .tokenizer import Tokenizer

_CACHED = 128
Value = TypeVar("Value")


class Constraint(Protocol):
    """What one log may still say. Made of the grammar and the tokens so far, so any engine can rebuild it."""

    @property
    def finished(self) -> bool:
        """Nothing more may follow: the log ends here with `stop`."""
        ...

    def mask(self) -> bytes | None:
        """Allowed next tokens as a bitmask of ceil(V / 32) little-endian 32-bit words; None: all of them.

        Raises:
            RowFailed: the grammar engine gave up on this log.
        """
        ...

    def advance(self, token: int) -> None:
        """Append one token to the log.

        Raises:
            RowFailed: the token is not allowed here, or the grammar engine gave up on this log.
        """
        ...

    def look_ahead(self, tokens: list[int]) -> list[bytes]:
        """The masks behind each of these tokens if they came next, up to the first that may not or that ends the log.

        The log stays as it is. Only for a log whose `mask` is not None.

        Raises:
            RowFailed: the grammar engine gave up on this log.
        """
        ...


class FreeConstraint:
    """No constraint."""

    finished = False

    def mask(self) -> bytes | None:
        return None

    def advance(self, token: int) -> None:
        pass

    def look_ahead(self, tokens: list[int]) -> list[bytes]:
        return []


FREE = FreeConstraint()


class LLGuidanceConstraint:
    """A JSON schema, regex, choice or grammar, followed by llguidance."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> bytes:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RowFailed(f"the grammar engine gave up on this output: {_reason(self._matcher)}")
        return _cut(bits, self._vocab_size)

    def advance(self, token: int) -> None:
        if not 0 <= token < self._vocab_size or not self._matcher.consume_token(token):
            raise RowFailed(f"token {token} is not allowed by the output's grammar: {_reason(self._matcher)}")

    def look_ahead(self, tokens: list[int]) -> list[bytes]:
        ahead = LLGuidanceConstraint(self._matcher.deep_copy(), self._vocab_size)
        masks: list[bytes] = []
        for token in tokens[: self._matcher.validate_tokens(tokens)]:
            ahead.advance(token)
            if ahead.finished:
                break
            masks.append(ahead.mask())
        return masks


class Vocabulary:
    """The tokens as llguidance has them, made of a recipe that can be sent to another process.

    Raises:
        InvalidRequest: llguidance cannot read this tokenizer.
    """

    def __init__(self, recipe: str) -> None:
        wanted = json.loads(recipe)
        try:
            self._tokens = llguidance.LLTokenizer(
                wanted["tokenizer"], n_vocab=wanted["vocab_size"], eos_token=wanted["eos_ids"]
            )
        except ValueError as error:
            raise _refusal("structured outputs are not supported with this model's tokenizer") from error
        # Fewer states than the default 250,000 of 1 to 2 kB; no parser states, which quote the output, in messages.
        self._limits = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

    @staticmethod
    def describe(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> str:
        """A recipe: one line of JSON. Raises InvalidRequest where there is no token to end an output with."""
        known = [id for id in eos_ids if 0 <= id < min(vocab_size, tokenizer.vocab_size)]
        if not known:
            raise _refusal("structured outputs need a model with an end-of-sequence token")
        return json.dumps({"tokenizer": tokenizer.backend.to_str(), "vocab_size": vocab_size, "eos_ids": known})

    def compile(self, source: str) -> llguidance.LLMatcher:
        """A matcher at the start of an output.

        Raises:
            InvalidRequest: llguidance refuses the grammar, or nothing can satisfy it.
        """
        matcher = llguidance.LLMatcher(self._tokens, source, log_level=0, limits=self._limits)
        tried = matcher
        if not matcher.is_error():
            mask = matcher.compute_bitmask()  # builds what the first step needs, and finds what cannot begin
            if not matcher.is_error():
                tried = matcher.deep_copy()
                tried.consume_token(_first(mask))  # what is too large may show only now
        if tried.is_error():
            raise _refusal(f"the output's grammar is not usable: {_reason(tried)}")
        return matcher


class GrammarCompiler:
    """Checks constraints at the ingress and makes them at the engine; one for a model in each process.

    `check` compiles in a process that is killed when it takes too long; what passed it is cheap to compile again, so
    `constraint` does so in this process, on another machine perhaps. Both remember what they have seen. Thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()  # held while vocabulary and pool are made, never while a grammar is compiled
        self._vocabulary: Vocabulary | None = None
        self._pool: CompilePool | None = None
        self._verdicts: _Recent[str | None] = _Recent(16 * _CACHED)
        self._matchers: _Recent[llguidance.LLMatcher] = _Recent(_CACHED)

    def check(self, spec: StructuredOutputs) -> None:
        """Returns if the constraint can be served. Blocks up to the pool's time limit for each one before it.

        Raises:
            InvalidRequest: it cannot be, and why. QueueFull: too many wait to be checked.
        """
        source = grammar_source(spec)
        if not self._known(source):
            self._judge(source, self._compile_pool().submit(source).result())

    async def acheck(self, spec: StructuredOutputs) -> None:
        """`check` without blocking the event loop."""
        source = grammar_source(spec)
        if not self._known(source):
            pool = self._pool
            if pool is None:
                pool = await asyncio.to_thread(self._compile_pool)
            self._judge(source, await asyncio.wrap_future(pool.submit(source)))

    def constraint(self, spec: StructuredOutputs, tokens: list[int] | None = None) -> Constraint:
        """A constraint behind the tokens that the log has already.

        Raises:
            InvalidRequest: as `check`. RowFailed: the tokens do not fit the grammar.
        """
        source = grammar_source(spec)
        matcher = self._matchers.get(source)
        if matcher is None:
            matcher = self.warm().compile(source)
            self._matchers.put(source, matcher)
        constraint = LLGuidanceConstraint(matcher.deep_copy(), self._vocab_size)
        for token in tokens or ():
            constraint.advance(token)
        return constraint

    def warm(self) -> Vocabulary:
        """Make the vocabulary now (up to seconds for a large one) rather than at the first constraint."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._recipe())
            return self._vocabulary

    def close(self) -> None:
        """End the checking process. A later check would start a new one."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _known(self, source: str) -> bool:
        if source not in self._verdicts:
            return False
        problem = self._verdicts.get(source)
        if problem is not None:
            raise _refusal(problem)
        return True

    def _judge(self, source: str, problem: str | None) -> None:
        self._verdicts.put(source, problem)
        if problem is not None:
            raise _refusal(problem)

    def _compile_pool(self) -> CompilePool:
        with self._lock:
            if self._pool is None:
                self._pool = CompilePool(self._recipe())
            return self._pool

    def _recipe(self) -> str:
        if self._tokenizer is None:
            raise _refusal("structured outputs need the model's tokenizer, which has no files here")
        return Vocabulary.describe(self._tokenizer, self._vocab_size, self._eos_ids or self._tokenizer.eos_ids)


class _Recent(Generic[Value]):
    """The values used last, by a digest of their grammar."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, source: str) -> bool:
        return _digest(source) in self._values

    def get(self, source: str) -> Value | None:
        key = _digest(source)
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, source: str, value: Value) -> None:
        with self._lock:
            self._values[_digest(source)] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="structured_outputs")


def _digest(source: str) -> bytes:
    return hashlib.sha256(source.encode()).digest()


def _first(mask: bytes) -> int:
    """The lowest token that it admits."""
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1


def _cut(bits: bytes, vocab_size: int) -> bytes:
    """Without the bits behind the model's vocabulary."""
    size = -(-vocab_size // 32) * 4
    if vocab_size % 32 == 0 or len(bits) == 0:
        return bits[:size]
    last = int.from_bytes(bits[size - 4 : size], "little") & ((1 << vocab_size % 32) - 1)
    return bits[: size - 4] + last.to_bytes(4, "little")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The first words of llguidance's message; its parser states stay inside."""
    message = matcher.get_error().partition("\n<")[0].strip()
    if not message or matcher.stop_reason().startswith("NoExtension") or message.startswith("NoExtension"):
        return "nothing that could follow satisfies it"
    return f"{message:.300}"
