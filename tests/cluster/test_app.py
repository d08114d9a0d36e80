"""The ingress actor without Ray: it answers while the replica loads, then serves, with the template it was given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.app import build_app, on_device
from shoal.cluster.config import load_config
from shoal.cluster.ingress import IngressActor, IngressArgs
from shoal.cluster.ray_env import SWITCHES
from shoal.router.backend import ModelInfo
from shoal.router.line_client import Address
from shoal.router.log_key import derived
from shoal.router.replica import Parts, Replica
from shoal.runtime.errors import ConfigError
from shoal.runtime.stats import Stats

from ..tiny import EOS, byte_tokenizer

INFO = ModelInfo(model="tiny", max_model_len=512, vocab_size=260, eos_token_ids=[EOS])
SECRET = derived(b"s" * 32, b"line")
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
    monkeypatch.setattr("shoal.cluster.ingress.hold_serve_port", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def with_client(
    model: Path, scenario: Callable[[IngressActor, LateHandle, Client], Awaitable[None]], **options: Any
) -> None:
    async def run() -> None:
        router = {"served_model_name": ["tiny"], "secret": "s" * 32, **options}
        args = IngressArgs.model_validate({"router": router, "server": {"redis_url": "none"}, "is_alone": True})
        handle = LateHandle()
        actor = IngressActor.__new__(IngressActor)
        await actor.__init__(args, handle_of=lambda part: handle, watch=nobody)  # type: ignore[misc]
        await actor.reconfigure({"parts": [{"name": "stable", "model": str(model)}], "rollout": {}})
        await scenario(actor, handle, Client(actor.__serve_build_asgi_app__()))
        await actor.drain(0.0)
        await handle.end()

    asyncio.run(asyncio.wait_for(run(), timeout=30))


async def nobody(source: str, depart: Any) -> None:
    """Says that a machine is to go."""


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


def test_parts_come_and_go_while_it_serves(model: Path) -> None:
    """One whose application is not there yet is waited for, and a change that makes no sense changes nothing."""
    stable, canary = ({"name": name, "model": str(model)} for name in ("stable", "canary"))
    both: dict[str, Any] = {"parts": [stable, {**canary, "variant": True}], "rollout": {"weights": {"canary": 1}}}

    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        async def states() -> dict[str, str]:
            return {each["name"]: each["state"] for each in (await client.ask("GET", "/v1/cluster"))[2]["variants"]}

        await loaded(handle, client)
        assert await states() == {"stable": "serving"}
        handle.loaded = False  # nobody answers any more to who asks anew
        await actor.reconfigure(both)
        assert await states() == {"stable": "idle", "canary": "not ready"}
        for nonsense in ({**both, "rollout": {"weights": {"kanary": 1}}}, {"parts": [stable], "role": {}}):
            await actor.reconfigure(nonsense)
        await actor.check_health()
        handle.loaded = True
        while (await states())["canary"] != "serving":
            await asyncio.sleep(0.01)
        await actor.reconfigure({"parts": [stable], "rollout": {}})
        assert await states() == {"stable": "serving"}

    with_client(model, scenario)


def test_an_ingress_that_cannot_open_says_so_to_serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.router.line_client.LineBackend.info", lambda self: 1 / 0)

    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        while not actor.broken:
            await asyncio.sleep(0.01)
        with pytest.raises(ZeroDivisionError):
            await actor.check_health()

    with_client(model, scenario)


ROUTER = {"secret_file": "/etc/shoal/secret"}


def test_the_builder_names_what_is_wrong_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"args.engine.*max_num_sequences.*max_num_seqs"):
        build_app({"part": "stable", "engine": {"model": "m", "max_num_sequences": 1}, "router": ROUTER, "server": {}})
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="haproxy: false") as refused:
        build_app({"router": ROUTER, "server": {}})
    for name in SWITCHES:
        assert f"{name}=1" in str(refused.value)
    build_app({"router": ROUTER, "server": {"haproxy": False}})
    for name in SWITCHES:
        monkeypatch.setenv(name, "1")
    build_app({"router": ROUTER, "server": {}})


def test_gpus_are_counted_over_all_parts() -> None:
    flags: dict[tuple[str, str], Any] = {("engine", "model"): "m", ("engine", "tensor_parallel_size"): 2}
    two = load_config({**flags, ("server", "smaller_model"): "n"})
    assert on_device(two, num_gpus=0).engine.device == "cpu"
    assert on_device(two, num_gpus=4).engine.device == "cuda"
    with pytest.raises(ConfigError, match=r"2 for smaller = 4 GPUs.*Ray has 3"):
        on_device(two, num_gpus=3)


def test_the_given_chat_template_makes_the_prompts(model: Path) -> None:
    template = model / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")

    async def scenario(actor: IngressActor, handle: LateHandle, client: Client) -> None:
        await loaded(handle, client)
        _, _, answer = await client.ask("POST", "/tokenize", HI)
        assert bytes(answer["tokens"]) == b"<user> hi"

    with_client(model, scenario, chat_template=str(template))
