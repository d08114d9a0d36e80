"""Station 1, the writing end: the one mapping from errors to HTTP, and how events are framed.

Every status but 2xx carries OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`, of at most 16 KiB;
`status_of` is the only place where an error becomes a status.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from starlette.responses import Response

from ..runtime import errors as e
from .rates import RateLimited

logger = logging.getLogger("shoal.router")

MAX_MESSAGE = 2000  # characters; escaped at most six bytes each, so an envelope stays under 16 KiB
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

# First match wins: subclasses stand before their bases.
_STATUSES: list[tuple[type[Exception], int, str]] = [
    (e.Unauthorized, 401, "invalid_request_error"),
    (e.NotFound, 404, "invalid_request_error"),
    (e.MethodNotAllowed, 405, "invalid_request_error"),
    (e.RequestTimeout, 408, "timeout_error"),
    (e.LogLost, 409, "invalid_request_error"),
    (e.TooLarge, 413, "invalid_request_error"),
    (e.UnsupportedMedia, 415, "invalid_request_error"),
    (e.QueueFull, 429, "rate_limit_error"),
    (e.RequestError, 400, "invalid_request_error"),
    (e.CacheMiss, 504, "server_error"),
    (e.EngineDead, 503, "server_error"),
    (e.Unavailable, 503, "server_error"),
]
_CODES = {401: "invalid_api_key", 408: "timeout", 500: "internal_error", 503: "unavailable"}


def status_of(error: Exception) -> tuple[int, str]:
    """(HTTP status, OpenAI error type)."""
    for kind, status, type_ in _STATUSES:
        if isinstance(error, kind):
            return status, type_
    return 500, "server_error"


def envelope(error: Exception) -> bytes:
    """The error as a client reads it. Only errors raised on purpose speak; a bug's text stays in our log."""
    status, type_ = status_of(error)
    message = str(error) if isinstance(error, e.ShoalError) else "internal error; the server's log has it"
    param = getattr(error, "param", None)
    body: dict[str, Any] = {
        "message": _printable(message, MAX_MESSAGE),
        "type": type_,
        "param": None if param is None else _printable(str(param), 200),
        "code": getattr(error, "code", None) or _CODES.get(status),
    }
    return msgspec.json.encode({"error": body})


def error_headers(error: Exception) -> dict[str, str]:
    """What goes with the status: on 429 and 503 Retry-After, on 401 the scheme; a half-read body closes the line.

    `x-should-retry` is what OpenAI's clients obey before their own rules: to send again, twice, what ends in 408, 409
    or any 5xx. A deadline that passed was the client's own: made again at once, the request would only add to the load.
    A row that failed would fail again, and may take its replica along. A log that is not kept is not there a moment
    later.
    """
    status, _ = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, RateLimited):
        headers |= error.headers
    if isinstance(error, RateLimited) and error.is_final:
        headers["x-should-retry"] = "false"
    elif status in (429, 503):
        headers["x-should-retry"] = "true"
        wait = max(0.001, float(getattr(error, "retry_after", 1.0)))
        headers["retry-after"] = str(math.ceil(wait))
        headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, e.RequestTimeout | e.RowFailed | e.CacheMiss | e.LogLost):
        headers["x-should-retry"] = "false"
    if status in (408, 413):
        headers["connection"] = "close"
    return headers


def error_response(error: Exception, headers: dict[str, str] | None = None) -> Response:
    status, _ = status_of(error)
    if not isinstance(error, e.ShoalError):
        logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return Response(envelope(error), status, {**error_headers(error), **(headers or {})}, media_type="application/json")


def error_event(error: Exception) -> bytes:
    """An error in mid-stream: the last event but `[DONE]`."""
    if not isinstance(error, e.ShoalError):
        logger.error("unexpected %s in mid-stream", type(error).__name__, exc_info=error)
    return event(envelope(error))


def event(data: bytes) -> bytes:
    """One server-sent event. `data` is compact JSON, so it holds no line break."""
    return b"data: " + data + b"\n\n"


def _printable(text: str, limit: int) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."
