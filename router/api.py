"""Stations 1 and 2: the OpenAI API as a FastAPI application over an `Ingress`.

Handlers take the raw request, so that every refusal, from a wrong method to a missing field, is written by `http.py`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..runtime.errors import EngineError, InvalidRequest, MethodNotAllowed, NotFound, RequestError, ShoalError
from . import request_log
from .auth import Guard
from .body import ClientGone, read_json
from .headers import Asks, read_asks
from .health import describe_cluster
from .http import error_response
from .ingress import Ingress
from .launch import Launch
from .metrics import CONTENT_TYPE
from .model import Model
from .prepare import Job
from .request_log import EXCHANGE, Exchange, Overhear
from .responses import ChatShape, CompletionShape, Heading, Shape, Speller, usage_of
from .schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
    parse,
)
from .stream import Answer, respond

AnyBody = TypeVar("AnyBody", bound=BaseModel)


def create_app(ingress: Ingress, *, echoes_id: bool = True) -> FastAPI:
    """The application, guarded: ready for uvicorn or for Ray Serve, also before the ingress is open.

    echoes_id: False where what runs it writes `x-request-id` by itself.
    """
    app = FastAPI(title="Shoal", version=_version(), redirect_slashes=False)
    _add_routes(app, Handlers(ingress))
    app.add_exception_handler(ShoalError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
    if ingress.config.log_prompts:
        app.add_middleware(Overhear)
    app.add_middleware(
        Guard,
        keys=ingress.keys,
        config=ingress.config,
        check_open=ingress.check_open,
        on_status=ingress.metrics.answered,
        on_end=_on_end(ingress),
        echoes_id=echoes_id,
    )
    return app


class Handlers:
    """One method a route."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, streamed or not."""
        body = await self._read(ChatRequest, request)
        return await self._serve(request, body, partial(self._ingress.chat, body), shape=ChatShape)

    async def completion(self, request: Request) -> Response:
        """Go on with one or many prompts, streamed or not."""
        body = await self._read(CompletionRequest, request)
        return await self._serve(request, body, partial(self._ingress.completion, body), shape=CompletionShape)

    async def tokenize(self, request: Request) -> Response:
        """A prompt or a conversation as token ids."""
        body = await self._read(TokenizeRequest, request)
        model = self._ingress.model_of(body.model)
        ids = await self._ingress.preparer(body).tokenize(body)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": model.info.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [model.text.token_text(token) for token in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text."""
        body = await self._read(DetokenizeRequest, request)
        return _json({"prompt": await self._ingress.preparer(body).detokenize(body)})

    async def models(self, request: Request) -> Response:
        """The names this server answers to."""
        cards = [_card(name, model) for model in self._ingress.models for name in model.names]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        return _json(_card(name, self._ingress.model_of(name)))

    async def health(self, request: Request) -> Response:
        """200 while this process runs, with a model or without one yet."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while a replica can take work; else 503 and the reason."""
        await self._ingress.ready()
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text: this process and all replicas."""
        return Response(await self._ingress.scrape(), headers={"content-type": CONTENT_TYPE})

    async def cluster(self, request: Request) -> Response:
        """Every replica, its state, and what each of its ranks holds and where; and how the router itself stands."""
        ingress = self._ingress
        described = describe_cluster(
            ingress.replicas(),
            ingress.metrics,
            variants=ingress.variants.describe(),
            parts=ingress.parts,
            is_draining=ingress.admission.draining,
        )
        return _json(described)

    async def version(self, request: Request) -> Response:
        return _json({"version": _version()})

    async def _read(self, kind: type[AnyBody], request: Request) -> AnyBody:
        self._ingress.admission.check(request.scope["shoal.tenant"])
        headers = dict(request.scope["headers"])
        return parse(kind, await read_json(headers, request.receive, self._ingress.config))

    async def _serve(
        self,
        request: Request,
        body: SamplingBody,
        launch: Callable[..., Awaitable[Launch]],
        *,
        shape: Callable[[Heading, Job, Speller], Shape],
    ) -> Response:
        """The answer of the first variant that has one: nothing is sent before there is something of it."""
        asks = read_asks(request.scope["headers"])
        avoid: frozenset[str] = frozenset()
        began, named = time.monotonic(), [at for at in (body.timeout, asks.timeout_s) if at is not None]
        while True:
            launched = await launch(request.scope["shoal.tenant"], asks, avoid=avoid)
            shaped = shape(_heading(launched, body), launched.asked.job, _speller(launched.asked.model, body))
            try:
                return await self._answer(request, body, asks, launch=launched, shape=shaped)
            except InvalidRequest as error:
                raise _as_asked(error, body) from None
            except EngineError as error:
                avoid |= {launched.asked.model.name}
                if not self._ingress.may_go_elsewhere(launched, error, asks, avoid):
                    raise
                if named:
                    left_s = max(0.001, min(named) - (time.monotonic() - began))
                    asks = msgspec.structs.replace(asks, timeout_s=left_s)

    async def _answer(
        self, request: Request, body: SamplingBody, asks: Asks, *, launch: Launch, shape: Shape
    ) -> Response:
        exchange = _exchange(request)
        asked = launch.asked
        exchange.launched(
            asked.job, launch.flight, model=asked.model.names[0], part=asked.model.name, stream=bool(body.stream)
        )
        options = body.stream_options
        answer = Answer(
            flight=launch.flight,
            shape=shape,
            usage=lambda: usage_of(launch.asked.job, launch.flight.choices),
            include_usage=bool(options and options.include_usage),
            send_timeout_s=self._ingress.config.send_timeout_s,
            on_error=self._ingress.metrics.stream_errors.inc,
            headers=launch.headers,
            has_ids=asks.idempotency_key is not None or asks.received is not None,
            received=asks.received,
            is_held=lambda: asked.model.is_asleep,
        )
        return await respond(answer, request.receive, stream=bool(body.stream))


def _add_routes(app: FastAPI, handlers: Handlers) -> None:
    get, post = ["GET"], ["POST"]
    bodies: dict[str, Any] = {}
    for path, handler, methods, body in (
        ("/v1/chat/completions", handlers.chat, post, ChatRequest),
        ("/v1/completions", handlers.completion, post, CompletionRequest),
        ("/tokenize", handlers.tokenize, post, TokenizeRequest),
        ("/detokenize", handlers.detokenize, post, DetokenizeRequest),
        ("/v1/models", handlers.models, get, None),
        ("/v1/models/{name:path}", handlers.model, get, None),
        ("/health", handlers.health, get, None),
        ("/ready", handlers.ready, get, None),
        ("/metrics", handlers.metrics, get, None),
        ("/version", handlers.version, get, None),
        ("/v1/cluster", handlers.cluster, get, None),
    ):
        extra = None if body is None else _request_body(body, bodies)
        app.add_api_route(path, handler, methods=methods, response_model=None, openapi_extra=extra)
    for path, handler in (("/health", handlers.health), ("/ready", handlers.ready)):
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    _describe(app, bodies)


def _request_body(body: type[BaseModel], bodies: dict[str, Any]) -> dict[str, Any]:
    """The body for /docs: the handlers read it themselves, so FastAPI cannot know."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    bodies.update(schema.pop("$defs", {}))
    bodies[body.__name__] = schema
    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe(app: FastAPI, bodies: dict[str, Any]) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _on_end(ingress: Ingress) -> Callable[[Exchange], None]:
    def on_end(exchange: Exchange) -> None:
        ingress.metrics.ended(exchange)
        request_log.write(exchange)

    return on_end


def _exchange(request: Request) -> Exchange:
    exchange = request.scope[EXCHANGE]
    assert isinstance(exchange, Exchange)
    return exchange


async def _on_error(request: Request, error: Exception) -> Response:
    _exchange(request).failure = error
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    method, path = request.scope["method"], request.scope["path"]
    refusal: RequestError = InvalidRequest(str(error.detail)[:500])
    headers: dict[str, str] = {}
    if error.status_code == 405:
        headers["allow"] = (error.headers or {}).get("Allow", "")
        taken = f"{path!r:.200} does not take {method!r:.30}; it takes {headers['allow']}"
        refusal = MethodNotAllowed(taken, code="method_not_allowed")
    elif error.status_code == 404:
        refusal = NotFound(f"there is no route {path!r:.200}", code="route_not_found")
    _exchange(request).failure = refusal
    return error_response(refusal, headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    _exchange(request).failure = error
    return Response(status_code=499)  # nobody reads it; it is the status that shows in metrics and access logs


def _as_asked(error: InvalidRequest, body: SamplingBody) -> InvalidRequest:
    """A grammar that a replica refuses, under the name of the field that brought it."""
    if error.param == "structured_outputs" and body.structured_outputs is None:
        return InvalidRequest(str(error), param="response_format", code=error.code)
    return error


def _heading(launch: Launch, body: SamplingBody) -> Heading:
    """Under the name that was asked for, unless another model answers."""
    model = launch.asked.model
    return Heading(launch.asked.id, int(time.time()), body.model if body.model in model.names else model.names[0])


def _speller(model: Model, body: SamplingBody) -> Speller:
    return Speller(model.text, as_ids=bool(body.return_tokens_as_token_ids))


def _card(name: str, model: Model) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.info.created,
        "owned_by": "shoal",
        "root": model.info.model,
        "max_model_len": model.info.max_model_len,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "unknown"
