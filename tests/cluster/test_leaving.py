"""An ingress that Serve ends: its streams have their time, and then an end. Without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.draining import on_shutdown
from shoal.cluster.ingress import IngressActor
from shoal.router.replica import MARGIN_S
from shoal.runtime.generation import TokenEvent

from . import test_app
from .test_app import Client, IdleEngine, LateHandle, loaded, with_client

model = test_app.model


class Endless(IdleEngine):
    """Says "a" for ever."""

    async def generate(self, request: Any, constraint: Any = None) -> AsyncGenerator[list[TokenEvent], None]:
        for i in range(10**6):
            await asyncio.sleep(0.01)
            yield [TokenEvent(id=request.id, start=i, tokens=[97])]


async def stream(app: Any, sent: list[bytes]) -> None:
    """Ask for an answer without an end; what comes of it."""
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 400, "stream": True}).encode()

    async def receive() -> Any:
        if asked:
            await asyncio.Event().wait()
        asked.append(True)
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    asked: list[bool] = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    await app(scope, receive, send)


def test_what_still_runs_ends_with_a_word(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_app, "IdleEngine", Endless)

    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        await loaded(handle, client)
        sent: list[bytes] = []
        streaming = asyncio.create_task(stream(actor.__serve_build_asgi_app__(), sent))
        leaving = asyncio.create_task(actor.depart(MARGIN_S + 0.5))
        await asyncio.sleep(0.2)
        assert (await client.ask("GET", "/ready"))[0] == 200, "until proxies know, whoever asks here is answered"
        await asyncio.gather(streaming, leaving)
        events = b"".join(sent).decode().split("\n\n")
        assert len(events) > 10
        assert events[-2:] == ["data: [DONE]", ""]
        assert "before the answer's end" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]

    with_client(model, scenario)


def test_serve_s_shutdown_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, though Serve may say it again; and what Serve does then is done."""
    replica: Any = import_module("ray.serve._private.replica").Replica
    done: list[str] = []

    async def perform(self: object) -> None:
        await asyncio.sleep(0)
        done.append("shut down")

    async def leave() -> None:
        done.append("told")

    async def scenario() -> None:
        on_shutdown(leave)
        for _ in range(2):
            await replica.perform_graceful_shutdown(object())
        await asyncio.sleep(0.05)

    assert asyncio.iscoroutinefunction(replica.perform_graceful_shutdown), "Serve has another way"
    monkeypatch.setattr(replica, "perform_graceful_shutdown", perform)
    asyncio.run(scenario())
    assert sorted(done) == ["shut down", "shut down", "told"]
