"""Beside station 5: one name for all that decides an answer, which nobody without the secret can guess or make.

A name is an HMAC-SHA256 over a canonical form: equal requests have equal forms however they were written (a default
left out or given, an int for a float, the order of a dict), and different ones have different forms, for msgpack puts
a length before whatever has one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import msgspec

from ..runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs

_encode = msgspec.msgpack.Encoder().encode
_NOT_CONTENT = frozenset({"n", "seed"})  # each choice is a log of its own, with the seed that its request carries


def derived(secret: bytes, use: bytes) -> bytes:
    """A key for one use of the cluster's secret; one use's key says nothing of another's."""
    return hmac.digest(secret, b"shoal " + use, hashlib.sha256)


class LogKeys:
    """Names of one model's logs, 32 bytes each. model: a digest of name, weights, dtype and tokenizer."""

    def __init__(self, secret: bytes, *, model: str) -> None:
        self._secret = derived(secret, b"log names v1")
        self._model = model

    def content(self, request: GenerationRequest, *, scope: str, is_reproducible: bool) -> bytes:
        """Named by what decides the answer, and by who may share it.

        The seed counts where the client chose it and it matters; a drawn one is no part of what was asked. The id,
        timeout, priority and tenant's salt of the request do not count.
        """
        params = request.params
        seed = request.seed if is_reproducible and params.temperature > 0 else None
        return self._digest("content", scope, request.prompt, seed, _canonical(params))

    def idempotent(self, key: str, index: int, *, scope: str) -> bytes:
        """Named by the client: its `Idempotency-Key`, and which of the request's logs it is."""
        return self._digest("idempotent", scope, key, index)

    def _digest(self, *parts: Any) -> bytes:
        return hmac.digest(self._secret, _encode((self._model, *parts)), hashlib.sha256)


def _constraint(given: StructuredOutputs) -> list[Any]:
    """A schema as text: its numbers may be longer than msgpack's, and its order is a part of what it asks."""
    schema = given.json
    text = schema if schema is None or isinstance(schema, str) else json.dumps(schema)
    return [text, given.regex, given.choice, given.grammar]


_NORMAL: dict[str, Callable[[Any], Any]] = {
    "logit_bias": lambda bias: sorted((token, float(by) + 0.0) for token, by in bias.items()),  # + 0.0: -0.0 is 0.0
    "stop_token_ids": lambda tokens: sorted(set(tokens)),
    "structured_outputs": _constraint,
}


def _form(name: str, default: Any) -> tuple[str, Any, Callable[[Any], Any]]:
    as_given: Callable[[Any], Any] = lambda value: value  # noqa: E731
    as_float: Callable[[Any], Any] = lambda value: float(value) + 0.0  # noqa: E731
    return name, default, _NORMAL.get(name, as_float if isinstance(default, float) else as_given)


# Every field counts unless it is said not to: a new one cannot be forgotten.
_DEFAULTS = SamplingParams()
_FIELDS = tuple(
    _form(name, getattr(_DEFAULTS, name)) for name in SamplingParams.__struct_fields__ if name not in _NOT_CONTENT
)


def _canonical(params: SamplingParams) -> list[Any]:
    """Name and value of each parameter that is not at its default."""
    return [(name, normal(value)) for name, default, normal in _FIELDS if (value := getattr(params, name)) != default]
