"""The ingress actor without Ray: it answers while the replica loads, then serves, with the template it was given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from shoal.cluster.app import IngressActor
from shoal.cluster.config import load_config
from shoal.router.backend import ModelInfo

from ..tiny import EOS, byte_tokenizer

INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260, eos_token_ids=[EOS])
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class LateHandle:
    """A DeploymentHandle whose replica is there once `loaded` is set."""

    loaded = False

    def options(self, *, stream: bool) -> LateHandle:
        return self

    def __getattr__(self, method: str) -> Any:
        answers = {"info": msgspec.msgpack.encode(INFO), "ready": None}

        class Method:
            @staticmethod
            async def remote() -> Any:
                if not self.loaded:
                    raise ConnectionError
                return answers[method]

        return Method


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that an ingress reads of a model."""
    monkeypatch.setattr("shoal.cluster.app.hold_serve_port", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def with_client(
    model: Path, scenario: Callable[[IngressActor, LateHandle, httpx.AsyncClient], Awaitable[None]], **options: Any
) -> None:
    async def run() -> None:
        config = load_config({("engine", "model"): str(model), ("router", "served_model_name"): ["tiny"]})
        handle = LateHandle()
        actor = IngressActor.__new__(IngressActor)
        await actor.__init__(handle, config, Path("nowhere/board"), **options)  # type: ignore[misc]
        transport = httpx.ASGITransport(app=actor.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await scenario(actor, handle, client)

    asyncio.run(asyncio.wait_for(run(), timeout=30))


async def loaded(handle: LateHandle, client: httpx.AsyncClient) -> None:
    handle.loaded = True
    while (await client.get("/ready")).status_code != 200:
        await asyncio.sleep(0.01)


def test_answers_while_the_replica_loads_and_then_serves(model: Path) -> None:
    async def scenario(actor: IngressActor, handle: LateHandle, client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 200
        for path in ("/ready", "/v1/models"):
            reply = await client.get(path)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        await actor.check_health()
        await loaded(handle, client)
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
        await actor.check_health()

    with_client(model, scenario)


def test_an_ingress_that_cannot_open_says_so_to_serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.router.replica.HandleBackend.info", lambda self: 1 / 0)

    async def scenario(actor: IngressActor, handle: LateHandle, client: httpx.AsyncClient) -> None:
        await asyncio.sleep(0)
        with pytest.raises(ZeroDivisionError):
            await actor.check_health()

    with_client(model, scenario)


def test_the_given_chat_template_makes_the_prompts(model: Path) -> None:
    async def scenario(actor: IngressActor, handle: LateHandle, client: httpx.AsyncClient) -> None:
        await loaded(handle, client)
        tokens = (await client.post("/tokenize", json=HI)).json()["tokens"]
        assert bytes(tokens) == b"<user> hi"

    with_client(model, scenario, chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")
