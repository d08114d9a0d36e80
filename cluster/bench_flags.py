"""From the flags of `shoal bench serve` to what is asked and how fast. Nothing that was typed is ignored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.errors import ConfigError
from .bench_load import FileLoad, Load, RandomLoad, Range, SharedPrefixLoad, ShareGptLikeLoad, read_file
from .bench_serve import Pace
from .config import flag_of

CLIENTS = 8
MAX_CLIENTS = 16384
DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {"input_tokens": "512", "output_tokens": "128"},
    "sharegpt": {"file": None, "max_context": 2048},
    "shared-prefix": {
        "input_tokens": "64",
        "output_tokens": "128",
        "prefix_groups": 8,
        "prefix_tokens": 1024,
        "turns": 1,
    },
}
"""The flags that each load knows, and what they are where nothing is said."""


class LoadFlags(NamedTuple):
    """What was typed of the flags that shape a load; None: nothing."""

    input_tokens: str | None = None
    output_tokens: str | None = None
    file: Path | None = None
    max_context: int | None = None
    prefix_groups: int | None = None
    prefix_tokens: int | None = None
    turns: int | None = None


def make_load(name: str, given: LoadFlags) -> Load:
    """The load of this name. Raises ConfigError: a flag is wrong, or another load's."""
    known = DEFAULTS[name]
    typed = {flag: value for flag, value in given._asdict().items() if value is not None}
    for flag, value in typed.items():
        if flag not in known:
            owners = " or ".join(f"--load {load}" for load, flags in DEFAULTS.items() if flag in flags)
            raise ConfigError(f"{flag_of(flag)} {value}: --load {name} does not have it, {owners} does")
    flags = {**known, **typed}
    if name == "sharegpt":
        file: Path | None = flags["file"]
        limit: int = flags["max_context"]
        return ShareGptLikeLoad(limit) if file is None else read_file(file, limit)
    lengths = (
        Range.parse(flags["input_tokens"], "--input-tokens"),
        Range.parse(flags["output_tokens"], "--output-tokens"),
    )
    if name == "random":
        return RandomLoad(*lengths)
    return SharedPrefixLoad(flags["prefix_groups"], flags["prefix_tokens"], *lengths, flags["turns"])


def make_paces(rate: str | None, concurrency: str | None, requests: int | None) -> tuple[Pace, ...]:
    """Of `--rate` or `--concurrency`, each a list. Raises ConfigError."""
    if rate is not None and concurrency is not None:
        raise ConfigError(f"--rate {rate} and --concurrency {concurrency}: a run has one or the other")
    if rate is not None:
        return tuple(Pace("rate", _number(part, f"--rate {rate}", whole=False)) for part in rate.split(","))
    if concurrency is None:
        return (Pace("concurrency", min(CLIENTS, requests or CLIENTS)),)
    clients = [_number(part, f"--concurrency {concurrency}", whole=True) for part in concurrency.split(",")]
    for number in clients:
        if requests is not None and number > requests:
            raise ConfigError(f"--concurrency {number:g}: above --requests {requests}, so never reached")
        if number > MAX_CLIENTS:
            raise ConfigError(f"--concurrency {number:g}: above {MAX_CLIENTS}, the ports that one client has at most")
    return tuple(Pace("concurrency", number) for number in clients)


def check_requests(load: Load, requests: int | None) -> None:
    """Raises ConfigError: a file's load is shorter than that."""
    if isinstance(load, FileLoad) and requests is not None and requests > load.num_turns:
        raise ConfigError(
            f"--requests {requests}: the file has {load.num_turns} that fit (--max-context), none is sent twice"
        )


def _number(text: str, flag: str, *, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (whole and value != int(value)):
        raise ConfigError(f"{flag}: {text!r} is not {'a whole number' if whole else 'a number'} above 0")
    return value
