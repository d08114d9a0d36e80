"""Station 1: what a request asks in its headers, read once, each in its place refused where it makes no sense."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ..runtime.errors import InvalidRequest
from .cache import CacheMode

CACHE = "x-shoal-cache"
CACHE_AGE = "age"
DEGRADED = "x-shoal-degraded"
IDEMPOTENCY_KEY = "idempotency-key"
LAST_EVENT_ID = "last-event-id"
TIMEOUT = "x-shoal-timeout"
DEADLINE = "x-shoal-deadline"
SESSION = "x-shoal-session"
VARIANT = "x-shoal-variant"
MAX_WORD = 255  # characters of a key, a session or a variant's name
_READ = frozenset({CACHE, IDEMPOTENCY_KEY, LAST_EVENT_ID, TIMEOUT, DEADLINE, SESSION, VARIANT})
_EVENT_ID = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})*")


class Asks(msgspec.Struct, frozen=True, kw_only=True):
    """cache: None leaves it to the config. received: tokens of each choice that the client has had already, as the last
    event's id says; None where this is no continuation. timeout_s: from now. session: what the request belongs to.
    variant: the one that is to answer.
    """

    cache: CacheMode | None = None
    idempotency_key: str | None = None
    received: list[int] | None = None
    timeout_s: float | None = None
    session: str | None = None
    variant: str | None = None


def read_asks(headers: Iterable[tuple[bytes, bytes]], *, now: Callable[[], float] = time.time) -> Asks:
    """`headers` as ASGI gives them, names in lower case. now: unix seconds.

    Raises:
        InvalidRequest: a value is malformed, or given twice; `param` is the header's name.
    """
    given: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1")
        if name in _READ:
            if name in given:
                raise InvalidRequest(f"the header {name} was sent twice", param=name)
            given[name] = raw_value.decode("latin-1").strip()
    return Asks(
        cache=_mode(given.get(CACHE)),
        idempotency_key=_word(given, IDEMPOTENCY_KEY),
        received=event_id_counts(given.get(LAST_EVENT_ID)),
        timeout_s=_timeout(given.get(TIMEOUT), given.get(DEADLINE), now),
        session=_word(given, SESSION),
        variant=_word(given, VARIANT),
    )


def event_id(counts: Iterable[int]) -> bytes:
    """The id of an event behind which each choice has so many tokens."""
    return ".".join(map(str, counts)).encode()


def event_id_counts(value: str | None) -> list[int] | None:
    """The inverse of `event_id`. Raises InvalidRequest."""
    if value is None or value == "":  # what a browser sends before its first event
        return None
    if not _EVENT_ID.fullmatch(value):
        raise InvalidRequest(
            f"{LAST_EVENT_ID} is {value!r:.80}; it must be the id of an event of ours, like 17 or 17.4",
            param=LAST_EVENT_ID,
        )
    return [int(count) for count in value.split(".")]


def _mode(value: str | None) -> CacheMode | None:
    if value is None:
        return None
    try:
        return CacheMode(value.lower())
    except ValueError:
        modes = ", ".join(CacheMode)
        raise InvalidRequest(f"{CACHE} is {value!r:.80}; it must be one of {modes}", param=CACHE) from None


def _word(given: Mapping[str, str], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not 1 <= len(value) <= MAX_WORD:
        raise InvalidRequest(f"{name} has {len(value)} characters; it must have 1 to {MAX_WORD}", param=name)
    return value


def _timeout(timeout: str | None, deadline: str | None, now: Callable[[], float]) -> float | None:
    if timeout is not None and deadline is not None:
        raise InvalidRequest(f"{TIMEOUT} and {DEADLINE} exclude each other", param=TIMEOUT)
    if timeout is not None:
        seconds = _number(timeout, TIMEOUT)
        if seconds <= 0:
            raise InvalidRequest(f"{TIMEOUT} is {timeout:.40}; it must be above 0 seconds", param=TIMEOUT)
        return seconds
    if deadline is not None:
        seconds = _number(deadline, DEADLINE) - now()
        if seconds <= 0:
            raise InvalidRequest(f"{DEADLINE} is {deadline:.40}: {-seconds:.3f} s in the past", param=DEADLINE)
        return seconds
    return None


def _number(value: str, name: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be a number of seconds", param=name)
    return number
