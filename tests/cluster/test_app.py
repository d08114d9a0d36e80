"""The ingress actor without Ray: it answers while the replica loads, then serves, with the template it was given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.app import REPLICA, IngressActor
from shoal.cluster.config import load_config
from shoal.router.backend import ModelInfo
from shoal.router.line_client import Address
from shoal.router.replica import Parts, Replica
from shoal.runtime.stats import Stats

from ..tiny import EOS, byte_tokenizer

INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260, eos_token_ids=[EOS])
SECRET = b"s" * 32
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Client:
    """Asks an ASGI application, without a server."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[bytes, bytes], Any]:
        """Status, headers and the JSON of the answer."""
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        await self._app(scope, receive, send)
        answer = b"".join(message["body"] for message in sent[1:])
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(answer)


class LateHandle:
    """A DeploymentHandle whose replica, on a line of its own, is there once `loaded` is set."""

    def __init__(self) -> None:
        self.loaded = False
        self._replica = Replica(lambda: Parts(IdleEngine(), NoGrammars(), INFO), SECRET)

    def broadcast(self, method: str) -> LateHandle:
        assert method == "address"
        return self

    async def results_async(self, **options: Any) -> list[Address]:
        if not self.loaded:
            raise ConnectionError
        return [await self._replica.listen("r1", "127.0.0.1")]

    async def end(self) -> None:
        await self._replica.shutdown()


class IdleEngine:
    healthy = ready = True
    state = "ready"

    def ranks(self) -> list[Any]:
        return []

    def generate(self, request: Any, constraint: Any = None) -> Any:
        raise NotImplementedError

    def stats(self) -> Stats:
        return Stats()

    async def drain(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class NoGrammars:
    async def acheck(self, spec: Any) -> None: ...

    def constraint(self, spec: Any, tokens: Any = None) -> Any: ...

    def close(self) -> None: ...


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that an ingress reads of a model."""
    monkeypatch.setattr("shoal.cluster.app.hold_serve_port", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def with_client(
    model: Path, scenario: Callable[[IngressActor, LateHandle, Client], Awaitable[None]], **options: Any
) -> None:
    async def run() -> None:
        served = {("engine", "model"): str(model), ("router", "served_model_name"): ["tiny"]}
        alone = {("router", "secret"): "s" * 32, ("server", "redis_url"): "none"}
        config = load_config({**served, **alone})
        handle = LateHandle()
        actor = IngressActor.__new__(IngressActor)
        await actor.__init__({REPLICA: handle}, config, Path("nowhere/board"), secret=SECRET, **options)  # type: ignore[misc]
        await scenario(actor, handle, Client(actor.__serve_build_asgi_app__()))
        await handle.end()

    asyncio.run(asyncio.wait_for(run(), timeout=30))


async def loaded(handle: LateHandle, client: Client) -> None:
    handle.loaded = True
    while (await client.ask("GET", "/ready"))[0] != 200:
        await asyncio.sleep(0.01)


def test_answers_while_the_replica_loads_and_then_serves(model: Path) -> None:
    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        assert (await client.ask("GET", "/health"))[0] == 200
        for path in ("/ready", "/v1/models"):
            status, headers, _ = await client.ask("GET", path)
            assert (status, headers[b"retry-after"]) == (503, b"1")
        await actor.check_health()
        await loaded(handle, client)
        _, _, models = await client.ask("GET", "/v1/models")
        assert models["data"][0]["max_model_len"] == 512
        await actor.check_health()

    with_client(model, scenario)


def test_an_ingress_that_cannot_open_says_so_to_serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.router.line_client.LineBackend.info", lambda self: 1 / 0)

    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        await asyncio.sleep(0)
        with pytest.raises(ZeroDivisionError):
            await actor.check_health()

    with_client(model, scenario)


def test_the_given_chat_template_makes_the_prompts(model: Path) -> None:
    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        await loaded(handle, client)
        _, _, answer = await client.ask("POST", "/tokenize", HI)
        assert bytes(answer["tokens"]) == b"<user> hi"

    with_client(model, scenario, chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")
