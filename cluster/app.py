"""The deployment's object graph, built in one place: config -> Serve application. Runs on the driver and in the actors.

One Serve replica is one engine; the ingress holds no weights and no torch, so it answers while the replica still loads.
What differs between deployments (where ranks live, which cache, which balancer) is decided here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.util
from ray import serve

from ..router.backend import Backend, ModelInfo
from ..router.balance import Balancer, select_balancer
from ..router.line_client import LineBackend
from ..router.log_key import derived
from ..router.meters import StoreMeter
from ..router.prefix_index import PrefixIndex
from ..router.redis_url import parse_redis_url
from ..router.replica import Parts, Replica, ServeDirectory
from ..router.store import NoStore, Store
from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError, Unavailable
from .board import posting
from .config import NO_REDIS, ShoalConfig, smaller
from .logs import log_to_stderr
from .peers import ServePeers
from .ray_env import hold_serve_port
from .ray_launcher import ENGINE_CPUS, RayLauncher, bundles

if TYPE_CHECKING:
    from ..router.metrics import RouterMetrics
    from ..router.model import Model
    from ..runtime.tokenizer import Tokenizer

logger = logging.getLogger("shoal.cluster")

SERVE_NAMESPACE = "serve"
REPLICA, SMALLER = "replica", "smaller"  # deployments, of the model and of the one to fall to
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
    more = "" if config.server.smaller_model is None else " + 1 for --smaller-model"
    needed = (replicas + bool(more)) * grid.size
    if device == "cuda" and needed > num_gpus:
        raise ConfigError(
            f"--replicas {replicas}{more} x --tensor-parallel-size {grid.tp} x --pipeline-parallel-size {grid.pp} = "
            f"{needed} GPUs, one a rank, but Ray has {num_gpus:g}: lower one of them, add GPUs, or use --device cpu"
        )
    return config.model_copy(update={"engine": engine.model_copy(update={"device": device})})


def build_app(config: ShoalConfig, *, board: Path, chat_template: str | None = None) -> serve.Application:
    """The application: the ingress in front of the replicas. `config` is settled (`on_device`).

    board: where a replica on this machine posts how its start goes. chat_template: instead of the model's own.
    """
    secret = derived(secret_of(config), b"line")  # what a line's ends prove to each other
    small = smaller(config)
    replicas = {REPLICA: _replicas(REPLICA, config, board, secret=secret)}
    if small is not None:
        replicas[SMALLER] = _replicas(SMALLER, small, board, secret=secret)
    ingress: Any = serve.deployment(
        name="ingress",
        num_replicas=config.server.ingresses,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 0.1},
        **_lifecycle(config),
    )(serve.ingress()(IngressActor))
    bound: serve.Application = ingress.bind(replicas, config, board, secret=secret, chat_template=chat_template)
    return bound


def _replicas(name: str, config: ShoalConfig, board: Path, *, secret: bytes) -> serve.Application:
    """A deployment of the model that `config` names."""
    deployment: Any = serve.deployment(
        name=name,
        num_replicas=config.server.replicas,
        max_ongoing_requests=CALLS,
        **_resources(config.engine),
        **_lifecycle(config),
    )(Replica)
    bound: serve.Application = deployment.bind(partial(build_parts, config, board), secret)
    return bound


def build_parts(config: ShoalConfig, board: Path) -> Parts:
    """In a replica's process: the engine, its grammars and what the ingress must know of the model."""
    hold_serve_port()
    log_to_stderr(config.server.log_format)
    with posting(board):
        from ..runtime.async_engine import AsyncEngine
        from ..runtime.build import build_replica
        from ..runtime.fingerprint import model_digest
        from ..runtime.grammar import GrammarCompiler
        from ..runtime.tokenizer_files import load_tokenizer

        engine = config.engine
        launcher = None
        if engine.grid.size > 1:
            launcher = RayLauncher(engine.grid, gpus=engine.device == "cuda", timeout_s=engine.start_timeout_s)
        built = build_replica(engine, secret=secret_of(config), launcher=launcher)
        info = ModelInfo(
            model=config.router.served_model_name[0],
            digest=model_digest(
                built.model_path,
                str(built.dtype),
                f"deterministic={engine.deterministic}",
                f"kv_cache_dtype={engine.kv_cache_dtype}",
            ),
            max_model_len=built.max_model_len,
            vocab_size=built.spec.vocab_size,
            eos_token_ids=list(built.eos_token_ids),
            dtype=str(built.dtype).removeprefix("torch."),
            kv_tokens=built.kv_tokens,
            block_size=engine.block_size if engine.enable_prefix_caching else 0,
            created=int(time.time()),
        )
        serving = AsyncEngine(built.engine)
        return Parts(
            engine=serving,
            grammars=GrammarCompiler(load_tokenizer(built.model_path), info.vocab_size, built.eos_token_ids),
            info=info,
            changes=serving.take_cache_changes,
            drain_timeout_s=config.server.shutdown_timeout_s,
        )


class IngressActor:
    """The router in its own Serve replica; `serve.ingress` turns it into an ASGI app once it is built."""

    async def __init__(  # type: ignore[misc]
        self,
        replicas: Mapping[str, Any],
        config: ShoalConfig,
        board: Path,
        *,
        secret: bytes,
        chat_template: str | None = None,
    ) -> None:
        """Serve awaits it. What takes long, the replicas' weights, is waited for behind: requests are answered."""
        hold_serve_port()
        log_to_stderr(config.server.log_format)
        with posting(board):
            from ..router.ingress import Ingress

            tokenizer = await asyncio.to_thread(_load_tokenizer, config)
        metrics = _metrics_of(config)
        store = open_store(config, metrics.store)
        backend, balancer = self._reach(replicas[REPLICA], config, secret=secret, metrics=metrics)
        self.router = Ingress(
            backend, config.router, balancer=balancer, store=store, metrics=metrics, peers=ServePeers(config.server)
        )
        self._serving = asyncio.create_task(_serve_metrics(self.router, config))

        async def open_when_loaded(
            model: Model, of: ShoalConfig, tokenizer: Tokenizer | None, chat_template: str | None
        ) -> None:
            from ..router.log_cache import LogCache
            from ..runtime.text import Text

            info = await _first_info(model.backend)
            text = Text(tokenizer, info.max_model_len, info.vocab_size, chat_template=chat_template)
            cache = LogCache(store, model=info.digest, secret=secret_of(of), config=of.router, meter=metrics.cache)
            model.open(info, text, cache=cache)

        opening = [open_when_loaded(self.router.model, config, tokenizer, chat_template)]
        small = smaller(config)
        if small is not None:
            backend, balancer = self._reach(replicas[SMALLER], small, secret=secret, metrics=metrics)
            model = self.router.add(backend, name=small.router.served_model_name[0], balancer=balancer)
            opening.append(open_when_loaded(model, small, await asyncio.to_thread(_load_tokenizer, small), None))
        self._opening = [asyncio.create_task(each) for each in opening]

    def _reach(
        self, replicas: Any, config: ShoalConfig, *, secret: bytes, metrics: RouterMetrics
    ) -> tuple[LineBackend, Balancer]:
        """The way to one deployment's replicas, and who chooses among them."""
        index = PrefixIndex(secret=secret_of(config))
        find = ServeDirectory(replicas, timeout_s=config.router.ready_timeout_s)
        backend = LineBackend(find, secret=secret, index=index, on_silent=_kill_soon)
        backend.start()
        balancer = select_balancer(
            config.router.balancer, backend.replicas, index, rng=random.Random(), on_choice=metrics.routing.chose
        )
        return backend, balancer

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for it once `__init__` is over."""
        from ..router.api import create_app

        return create_app(self.router, echoes_id=False)

    async def check_health(self) -> None:
        """Serve calls this, and replaces an ingress that could not be opened."""
        for opening in self._opening:
            if opening.done():
                opening.result()

    async def exchange(self, telling: bytes) -> bytes:
        """Another ingress calls this, for what each has counted."""
        return await self.router.exchange(telling)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; returns when what runs has ended, each with a terminal event."""
        await self.router.drain(timeout_s)


def open_store(config: ShoalConfig, meter: StoreMeter) -> Store:
    """What ingresses share: Redis, where there is one. It is not asked anything yet."""
    url = config.server.redis_url
    if url == NO_REDIS:
        return NoStore()
    from ..router.redis_store import RedisStore

    return RedisStore(parse_redis_url(url), meter, timeout_s=config.router.redis_timeout_s)


def secret_of(config: ShoalConfig) -> bytes:
    """The cluster's: of routers and engines alike."""
    assert config.router.secret is not None, "the command has settled it"
    return config.router.secret.encode()


def _load_tokenizer(config: ShoalConfig) -> Tokenizer | None:
    from ..runtime.hub import resolve_model
    from ..runtime.tokenizer_files import load_tokenizer

    return load_tokenizer(resolve_model(config.engine.model))


def _metrics_of(config: ShoalConfig) -> Any:
    """An ingress's; one of several is named in them."""
    from ..router.metrics import RouterMetrics

    several = config.server.ingresses > 1
    return RouterMetrics(
        ingress=str(serve.get_replica_context().replica_id.unique_id) if several else "",
        vllm_model=config.router.served_model_name[0] if config.router.vllm_metrics else None,
    )


async def _serve_metrics(router: Any, config: ShoalConfig) -> None:
    """`/metrics` on a port of its own, where there is one."""
    from ..router.metrics_server import serve_metrics

    if config.server.metrics_port is not None:
        await serve_metrics(router.scrape, host=config.server.metrics_host, port=config.server.metrics_port)


async def _first_info(backend: Backend) -> ModelInfo:
    """Waits for the replica, however long its weights take."""
    while True:
        try:
            return await backend.info()
        except Unavailable:
            await asyncio.sleep(0.05)


def _kill_soon(replica: str) -> None:
    asyncio.get_running_loop().run_in_executor(None, kill_replica, replica)


def kill_replica(replica: str) -> None:
    """End the process of a replica that says nothing, so that Serve starts another. Blocks for Ray's answers.

    Serve by itself waits two minutes for one that is stopped. Such a process does not hear Ray either: its raylet asks
    it to end, and kills it 5 s later.
    """
    actors = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
    for actor in actors:
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].endswith(
            (f"#{REPLICA}#{replica}", f"#{SMALLER}#{replica}")
        ):
            logger.warning("replica %s is silent: it is killed", replica)
            with suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(actor["name"], namespace=SERVE_NAMESPACE), no_restart=True)


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
