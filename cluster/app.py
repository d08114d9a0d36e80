"""The deployment's object graph, built in one place: config -> Serve application. Runs on the driver and in the actors.

One Serve replica is one engine; the ingress holds no weights and no torch, so it answers while the replica still loads.
What differs between deployments (where ranks live, which cache, which balancer) is decided here and nowhere else.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from ..router.balance import LeastLoaded
from ..router.line_client import LineBackend
from ..router.replica import Parts, Replica, ServeDirectory
from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError, Unavailable
from .board import posting
from .config import ShoalConfig
from .ray_env import hold_serve_port
from .ray_launcher import ENGINE_CPUS, RayLauncher, bundles

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
CALLS = 64  # at once, to a replica: its address, its health; generations go over the line
NO_LIMIT = 1_000_000  # the ingress's own admission decides, with the right error shape


def on_device(config: ShoalConfig, *, num_gpus: float) -> ShoalConfig:
    """The config with its device settled by what Ray has.

    Raises:
        ConfigError: the ranks are more than the GPUs, with the arithmetic.
    """
    engine, grid, replicas = config.engine, config.engine.grid, config.server.replicas
    device = engine.device if engine.device != "auto" else "cuda" if num_gpus >= 1 else "cpu"
    needed = replicas * grid.size
    if device == "cuda" and needed > num_gpus:
        raise ConfigError(
            f"--replicas {replicas} x --tensor-parallel-size {grid.tp} x --pipeline-parallel-size {grid.pp} = "
            f"{needed} GPUs, one a rank, but Ray has {num_gpus:g}: lower one of them, add GPUs, or use --device cpu"
        )
    return config.model_copy(update={"engine": engine.model_copy(update={"device": device})})


def build_app(config: ShoalConfig, *, board: Path, chat_template: str | None = None) -> serve.Application:
    """The application: the ingress in front of the replicas. `config` is settled (`on_device`).

    board: where a replica on this machine posts how its start goes. chat_template: instead of the model's own.
    """
    assert config.router.secret is not None, "the command gives the cluster's"
    secret = hmac.digest(config.router.secret.encode(), b"line", "sha256")  # what a line's ends prove to each other
    replica: Any = serve.deployment(
        name="replica",
        num_replicas=config.server.replicas,
        max_ongoing_requests=CALLS,
        **_resources(config.engine),
        **_lifecycle(config),
    )(Replica)
    ingress: Any = serve.deployment(
        name="ingress",
        num_replicas=config.server.ingresses,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 0.1},
        **_lifecycle(config),
    )(serve.ingress()(IngressActor))
    parts = partial(build_parts, config, board)
    bound: serve.Application = ingress.bind(
        replica.bind(parts, secret), config, board, secret=secret, chat_template=chat_template
    )
    return bound


def build_parts(config: ShoalConfig, board: Path) -> Parts:
    """In a replica's process: the engine, its grammars and what the ingress must know of the model."""
    hold_serve_port()
    with posting(board):
        from ..router.backend import ModelInfo
        from ..runtime.async_engine import AsyncEngine
        from ..runtime.build import build_replica
        from ..runtime.fingerprint import model_digest
        from ..runtime.grammar import GrammarCompiler
        from ..runtime.tokenizer_files import load_tokenizer

        assert config.router.secret is not None
        engine = config.engine
        launcher = None
        if engine.grid.size > 1:
            launcher = RayLauncher(engine.grid, gpus=engine.device == "cuda", timeout_s=engine.start_timeout_s)
        built = build_replica(engine, secret=config.router.secret.encode(), launcher=launcher)
        info = ModelInfo(
            model=config.router.served_model_name[0],
            digest=model_digest(built.model_path, str(built.dtype), f"deterministic={engine.deterministic}"),
            max_model_len=built.max_model_len,
            vocab_size=built.spec.vocab_size,
            eos_token_ids=list(built.eos_token_ids),
            dtype=str(built.dtype).removeprefix("torch."),
            kv_tokens=built.kv_tokens,
            created=int(time.time()),
        )
        return Parts(
            engine=AsyncEngine(built.engine),
            grammars=GrammarCompiler(load_tokenizer(built.model_path), info.vocab_size, built.eos_token_ids),
            info=info,
            drain_timeout_s=config.server.shutdown_timeout_s,
        )


class IngressActor:
    """The router in its own Serve replica; `serve.ingress` turns it into an ASGI app once it is built."""

    async def __init__(  # type: ignore[misc]
        self, replica: Any, config: ShoalConfig, board: Path, *, secret: bytes, chat_template: str | None = None
    ) -> None:
        """Serve awaits it. What takes long, the replica's weights, is waited for behind: requests are answered."""
        hold_serve_port()
        with posting(board):
            from ..router.ingress import Ingress
            from ..runtime.hub import resolve_model
            from ..runtime.text import Text
            from ..runtime.tokenizer_files import load_tokenizer

            tokenizer = await asyncio.to_thread(load_tokenizer, resolve_model(config.engine.model))
        find = ServeDirectory(replica, timeout_s=config.router.ready_timeout_s)
        self._backend = backend = LineBackend(find, secret=secret)
        backend.start()
        balancer = LeastLoaded(backend.replicas, rng=random.Random())
        self.router = Ingress(backend, config.router, balancer=balancer)

        async def open_when_loaded() -> None:
            info = await _first_info(backend)
            text = Text(tokenizer, info.max_model_len, info.vocab_size, chat_template=chat_template)
            self.router.open(info, text)

        self._opening = asyncio.create_task(open_when_loaded())

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for it once `__init__` is over."""
        from ..router.api import create_app

        return create_app(self.router)

    async def check_health(self) -> None:
        """Serve calls this, and replaces an ingress that could not be opened."""
        if self._opening.done():
            self._opening.result()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; returns when what runs has ended, each with a terminal event."""
        await self.router.drain(timeout_s)


async def _first_info(backend: LineBackend) -> Any:
    """Waits for the replica, however long its weights take."""
    while True:
        try:
            return await backend.info()
        except Unavailable:
            await asyncio.sleep(0.05)


def _resources(engine: EngineConfig) -> dict[str, Any]:
    """What a replica asks of Ray. One rank lives in the replica's own process, more have bundles of their own."""
    grid, gpus = engine.grid, engine.device == "cuda"
    if grid.size == 1:
        return {"ray_actor_options": {"num_cpus": ENGINE_CPUS, "num_gpus": int(gpus)}}
    return {
        "ray_actor_options": {"num_cpus": ENGINE_CPUS},
        "placement_group_bundles": bundles(grid, gpus=gpus),
        "placement_group_strategy": "PACK",
    }


def _lifecycle(config: ShoalConfig) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": config.server.shutdown_timeout_s + 1.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": {"enable_access_log": False},
    }
