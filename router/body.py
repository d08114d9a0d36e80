"""Station 1, the reading end: bytes to a JSON object, strictly, before anything looks at what it says.

Refused here, so that no later station can meet it: bodies over the limit or too slow, other media types, invalid UTF-8,
deep nesting, NaN and infinities, duplicate keys, integers of thousands of digits, lone surrogates.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from ..runtime.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMedia
from .config import RouterConfig

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Strings are skipped whole, so that brackets inside them do not count. Possessive: never backtracks.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_LONG_BODY = 2**18  # bytes; from here on parsing would hold up the event loop: a thread takes it


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be told."""


async def read_json(headers: dict[bytes, bytes], receive: Receive, limits: RouterConfig) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        UnsupportedMedia, TooLarge, RequestTimeout, InvalidRequest: see the module.
        ClientGone: the connection closed before the body was there.
    """
    _check_media(headers)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(headers, receive, limits.max_body_bytes)
    except TimeoutError:
        raise RequestTimeout(
            f"the body was not complete after {limits.body_timeout_s:g} s (limit body_timeout_s)"
        ) from None
    if len(body) < _LONG_BODY:
        return parse_object(body, max_nesting=limits.max_nesting)
    return await asyncio.to_thread(parse_object, body, max_nesting=limits.max_nesting)


def parse_object(body: bytes, *, max_nesting: int) -> dict[str, Any]:
    """Strict JSON: one object. Raises InvalidRequest, with the place where it went wrong."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = body[error.start]
        raise _invalid(f"the body is not valid UTF-8: byte 0x{bad:02x} at offset {error.start}") from None
    _check_nesting(body, max_nesting)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise _invalid(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(value, dict):
        raise _invalid(f"the body must be a JSON object; got {_kind(value)}")
    if b"\\u" in body:  # the bytes are valid UTF-8, so only an escape can make half a surrogate pair
        _check_surrogates(value)
    return value


def _check_media(headers: dict[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"").decode("latin-1")
    media, _, parameters = given.partition(";")
    charset = re.search(r'charset\s*=\s*"?([\w-]+)', parameters.lower())
    if media.strip().lower() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8")):
        raise UnsupportedMedia(
            f"content-type is {given[:80]!r}; it must be application/json (charset utf-8)",
            param="content-type",
            code="unsupported_media_type",
        )
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia(
            f"content-encoding is {encoding[:80]!r}; bodies are read as they are (identity)",
            param="content-encoding",
            code="unsupported_media_type",
        )


async def _read(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(f"{declared[:20].decode()} bytes", limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(f"at least {size} bytes", limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check_nesting(body: bytes, limit: int) -> None:
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for token in _BRACKETS.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise _invalid(
                    f"the body nests at least {depth} levels deep; at most {limit} are allowed (max_nesting)"
                )
        elif first in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequest(f"the key {name!r:.80} is given twice", param=name[:80], code="invalid_json")
            seen.add(name)
    return value


def _no_constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is not JSON; numbers must be finite")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _invalid(f"the number {digits[:40]} is too large; numbers must be finite")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 40:  # 2**128 has 39; a longer one is nobody's parameter, and int() of thousands is slow
        raise _invalid(f"the number {digits[:40]}... has {len(digits)} digits; at most 40 are allowed")
    return int(digits)


def _check_surrogates(value: dict[str, Any]) -> None:
    for name, item in value.items():
        try:
            json.dumps([name, item], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise InvalidRequest(
                f"{name!r:.80} holds the lone surrogate {half!r}, which is half a character",
                param=name.encode("utf-8", "replace").decode()[:80],
                code="invalid_json",
            ) from None


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json")


def _too_large(size: str, limit: int) -> TooLarge:
    return TooLarge(f"the body has {size}; at most {limit} are allowed (max_body_bytes)", code="body_too_large")
