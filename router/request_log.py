"""Around station 1: the request log. One line a request, at its end: whose it was, who served it, and how it went.

What is known gathers in an `Exchange`: the Guard opens it, handlers add to it, and nothing is written on a token's way.
No prompt, answer or key is in it, nor any error's text, which may quote the client. Only with `log_prompts` the bodies
are, as they crossed the line.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.errors import RequestError, ShoalError
from .backend import failure_of
from .body import ClientGone
from .flight import Flight
from .prepare import Job

logger = logging.getLogger("shoal.requests")

REQUEST_ID = b"x-request-id"
EXCHANGE = "shoal.exchange"  # where in the ASGI scope
MAX_BODY = 64 * 2**10  # bytes of a body that `log_prompts` keeps
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


class Exchange:
    """One HTTP request and what is known of it so far.

    route: its pattern; like the method never what the client made up. status: None until an answer began. failure: what
    it was refused with; error: what ended it early, refused or not.
    """

    def __init__(self, id: str, method: str) -> None:
        self.id = id
        self.method = method if method in _METHODS else "other"
        self.started = time.monotonic()
        self.route = "other"
        self.status: int | None = None
        self.tenant: str | None = None
        self.model: str | None = None
        self.part: str | None = None  # of the deployment that answers: a variant, or a further model
        self.stream = False
        self.job: Job | None = None
        self.flight: Flight | None = None
        self.failure: Exception | None = None
        self.request_body: bytearray | None = None
        self.response_body: bytearray | None = None

    def launched(self, job: Job, flight: Flight, *, model: str, part: str, stream: bool) -> None:
        """It was understood and admitted."""
        self.job, self.flight, self.model, self.part, self.stream = job, flight, model, part, stream

    @property
    def error(self) -> Exception | None:
        return self.failure or (self.flight.error if self.flight is not None else None)


def request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The client's own `x-request-id` where it is one and sane; else a new one."""
    given = [value for name, value in headers if name == REQUEST_ID]
    if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
        return given[0].decode()
    return f"req-{uuid.uuid4().hex}"


def write(exchange: Exchange) -> None:
    """Log the exchange, which is over. Probes that went well are for debugging only."""
    is_probe = exchange.route in _PROBES and exchange.status == 200
    level = logging.DEBUG if is_probe else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "request", extra={"facts": facts(exchange, time.monotonic())})


def facts(exchange: Exchange, now: float) -> dict[str, Any]:
    """What one line says. now: on time.monotonic's clock. What is not known, or does not apply, is left out."""
    known: dict[str, Any] = {
        "request_id": exchange.id,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "tenant": exchange.tenant,
        "error": None if exchange.error is None else _code(exchange.error),
        "param": None if exchange.error is None else _param(exchange.error),
        "e2e_ms": _ms(now - exchange.started),
    }
    if exchange.job is not None and exchange.flight is not None:
        known |= {"model": exchange.model, "variant": exchange.part, "stream": exchange.stream}
        known |= _of_answer(exchange, exchange.job, exchange.flight)
    if exchange.request_body is not None and exchange.response_body is not None:
        known["request"] = exchange.request_body.decode("utf-8", "replace")
        known["response"] = exchange.response_body.decode("utf-8", "replace")
    return {name: value for name, value in known.items() if value is not None}


def _of_answer(exchange: Exchange, job: Job, flight: Flight) -> dict[str, Any]:
    choices = flight.choices
    first = min((choice.first_event for choice in choices if choice.first_event is not None), default=None)
    replicas = [replica for choice in choices for replica in choice.attempts if replica is not None]
    has_origin = any(choice.last_event is not None or choice.finished for choice in choices)
    origin, age_s = flight.origin() if has_origin else (None, 0.0)
    return {
        "cache": origin,
        "cache_age_s": round(age_s, 3) if age_s else None,
        "choices": len(choices),
        "prompt_tokens": sum(len(prompt.ids) for prompt in job.prompts),
        "cached_tokens": sum(choice.num_cached_tokens for choice in choices[:: job.n]),
        "output_tokens": sum(choice.num_tokens for choice in choices),
        "finish_reasons": [choice.finish_reason or "incomplete" for choice in choices],
        "ttft_ms": None if first is None else _ms(first - exchange.started),
        "replicas": list(dict.fromkeys(replicas)),
        "attempts": sum(len(choice.attempts) for choice in choices),
    }


def _code(error: Exception) -> str:
    """A word for the error: its code, or its kind. Its text may quote the client."""
    code = error.code if isinstance(error, RequestError) else None
    return code or ("client_gone" if isinstance(error, ClientGone) else type(error).__name__)


def _param(error: Exception) -> str | None:
    """The field or header that was wrong. Below a field the names may be the client's; so are they in a broken body."""
    if not isinstance(error, RequestError) or error.param is None or error.code == "invalid_json":
        return None
    return error.param.partition(".")[0]


def kind_of(error: Exception) -> str:
    """The error's kind, one of errors.py's: so there are few."""
    return failure_of(error).kind if isinstance(error, ShoalError) else "Bug"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


class Overhear:
    """Raw ASGI, inside the Guard and only where prompts are to be logged: keeps the beginning of both bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange: Exchange = scope[EXCHANGE]
        exchange.request_body = asked = bytearray()
        exchange.response_body = answered = bytearray()

        async def heard() -> Message:
            message = await receive()
            _keep(asked, message)
            return message

        async def said(message: Message) -> None:
            _keep(answered, message)
            await send(message)

        await self._app(scope, heard, said)


def _keep(body: bytearray, message: Message) -> None:
    if message["type"] in ("http.request", "http.response.body"):
        body += message.get("body", b"")[: MAX_BODY - len(body)]
