"""Sizes as people write them: `8k` tokens, `5/s`, `500ms`. One place reads them, so that every flag reads alike."""

from __future__ import annotations

import re

from ..runtime.errors import ConfigError

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_COUNTS = {"": 1, "k": 1024, "m": 1024**2}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_PERIODS = {"": 1.0, "/s": 1.0, "/min": 60.0, "/h": 3600.0}


def parse_tokens(text: str, flag: str) -> int:
    """`300`, `8k` (8,192), `1.5k`. Raises ConfigError."""
    number, unit = _split(text, flag, _COUNTS, "tokens, as 300, 8k or 128k")
    tokens = number * _COUNTS[unit]
    if tokens != int(tokens) or tokens < 1:
        raise ConfigError(f"{flag} {text}: that is {tokens:g} tokens; needed is a whole number from 1 on")
    return int(tokens)


def parse_seconds(text: str, flag: str) -> float:
    """`500ms`, `0.5s`: seconds. Raises ConfigError."""
    number, unit = _split(text, flag, _SECONDS, "a time with its unit, as 500ms or 2s")
    if number <= 0:
        raise ConfigError(f"{flag} {text}: a time above 0 is needed")
    return number * _SECONDS[unit]


def parse_rate(text: str, flag: str) -> float:
    """`5/s`, `300/min`, `5`: requests a second. Raises ConfigError."""
    number, unit = _split(text, flag, _PERIODS, "requests in a time, as 5/s or 300/min")
    if number <= 0:
        raise ConfigError(f"{flag} {text}: a rate above 0 is needed")
    return number / _PERIODS[unit]


def _split(text: str, flag: str, units: dict[str, float] | dict[str, int], expected: str) -> tuple[float, str]:
    found = re.fullmatch(_NUMBER + r"\s*([a-z/]*)", text.strip().lower())
    if found is None or found[2] not in units:
        raise ConfigError(f"{flag} {text!r}: expected {expected}")
    return float(found[1]), found[2]
