"""What HAProxy answers by itself, where there is no ingress or one is gone, in the shape of all other errors.

Its own pages are HTML, and Serve's template makes a 500 in plain text of whatever an ingress's death leads to. Only
what HAProxy cannot read as a request at all (400, or 408 for its headers) is answered before ours are looked at.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from ..router.http import envelope, error_headers, status_of
from ..runtime.errors import InvalidRequest, ShoalError, Unavailable

HEADERS_TIMEOUT_S = 30
"""A request's headers must be complete in this time: else who sends none holds a connection for an hour."""


def write_answers(folder: Path) -> Path:
    """Writes HAProxy's own answers into `folder`. Returns a file with what its config is to say under `defaults`."""
    lines = [f"    timeout http-request {HEADERS_TIMEOUT_S}s\n"]
    for status, error in _errors().items():
        answer = folder / f"{status}.http"
        answer.write_bytes(_answer(error))
        lines.append(f"    errorfile {status} {answer}\n")
    defaults = folder / "defaults.cfg"
    defaults.write_text("".join(lines))
    return defaults


def _errors() -> dict[int, ShoalError]:
    """By the status that HAProxy would give."""
    lost = Unavailable("the ingress that had this request ended before it answered: send it again", retry_after=1.0)
    return {
        400: InvalidRequest("the connection was half closed before the answer: keep it open", code="connection_closed"),
        502: lost,
        503: Unavailable("no ingress takes requests now", retry_after=1.0),
        504: lost,
    }


def _answer(error: ShoalError) -> bytes:
    status, _ = status_of(error)
    body = envelope(error)
    headers = error_headers(error) | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-cache",
        "connection": "close",
    }
    head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
