"""The generation log: the one value that serving is about, and what a client may say about how it goes on.

A `GenerationRequest` is a log as it is handed to an engine: the prompt, the parameters, the seed and whatever tokens
were produced elsewhere already. The engine answers with `TokenEvent`s, which append to the log until one carries a
finish reason. Emitted tokens never change, and any engine can go on with any log.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import msgspec

from .errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_N = 128
MAX_SEED = 2**63
POISON = "this request made a rank of the engine fail"
"""The error of a log under which ranks ended, and under it alone: it is tried nowhere else."""


class FinishReason(StrEnum):
    """Why a log ended. `STOP` and `LENGTH` are complete answers; the others are not."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """An output constraint: exactly one of the fields is set (vLLM's names).

    json: a JSON schema as a dict or as text; `{}` admits any JSON object value. regex: a full-match pattern in RE2
    syntax. choice: the answer is one of these strings. grammar: Lark or EBNF text as llguidance reads it.
    """

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"structured_outputs takes exactly one of json, regex, choice and grammar; got {given or 'none'}",
                param="structured_outputs",
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn and when a generation ends. Field names and defaults are vLLM's; validated on construction.

    n: choices per prompt. seed: any integer of 63 bits; None lets the engine draw one. temperature 0 is greedy.
    top_k 0 or -1, top_p 1 and min_p 0 are off. max_tokens None: up to the context's end; 0: only read the prompt.
    stop: strings that end the text (left out of it unless include_stop_str_in_output). logprobs: how many of the most
    likely tokens to report beside the chosen one (0: the chosen one alone; None: no logprobs), taken before temperature
    and penalties. prompt_logprobs: the same for the prompt's tokens.

    Raises:
        InvalidRequest: a value is outside its limits; the message names value and limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] = msgspec.field(default_factory=list)
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        _check_range("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("seed", self.seed, -MAX_SEED, MAX_SEED - 1)
        _check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", param="min_tokens"
            )
        self._check_lists()

    def _check_lists(self) -> None:
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                got = f"one of {len(text)}" if isinstance(text, str) else f"{text!r:.80}"
                raise InvalidRequest(f"a stop string has 1 to {MAX_STOP_LENGTH} characters; got {got}", param="stop")
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _check_range("stop_token_ids", token, 0, 2**31 - 1)
        _check_count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _check_range("logit_bias", token, 0, 2**31 - 1)
            _check_range("logit_bias", bias, -100.0, 100.0)


def _check_range(name: str, value: float | None, low: float, high: float, *, open_low: bool = False) -> None:
    if value is None:
        return
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or math.isnan(value):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be {'an integer' if whole else 'a number'}", param=name)
    if value < low or value > high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low} and at most {high}"
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be {bounds}", param=name)


def _check_count(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {limit} are allowed", param=name)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's log-probability, its rank (1 is the most likely) and the most likely alternatives (id, logprob)."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A log as it is handed to an engine. `params.n` is 1: each choice is a log of its own.

    tokens: what was produced already, by any engine; the generation goes on behind them.
    seed: always set. tenant: whose prefix-cache entries may be shared (a salt).
    account, share: whose tokens these are in a fair policy's books, and its part against others'. Not the salt: that is
    the client's to vary.
    priority: lower goes first.
    timeout_s: seconds from admission to the hard deadline; None for none.
    digest: of the model whose log this is (router.backend.ModelInfo): another one does not go on with it; empty: nobody
    says so.
    trial: tokens after which it is cleared of having ended a replica (router/probation.py); 0: nobody says so.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[int] = msgspec.field(default_factory=list)
    tenant: str = ""
    account: str = ""
    share: float = 1.0
    priority: int = 0
    timeout_s: float | None = None
    digest: str = ""
    trial: int = 0


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step appended to one log; the last event of a log carries `finish_reason`.

    start: how many tokens the log had before these. stop_reason: the stop token id, where one ended the log.
    num_cached_tokens: prompt tokens served from the prefix cache (set on a log's first event).
    error: for the client to read, with finish_reason ERROR or TIMEOUT.
    """

    id: str
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None
