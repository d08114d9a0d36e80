"""The router in its own Serve replica: which parts there are, how it reaches each, and what changes while it serves.

What it is built from (`IngressArgs`) holds for its life. The list of parts and the rollout are told to `reconfigure`,
once before the first request and again at every change. A part is reached through a handle on its application; whether
that has replicas yet, or still has, shows on the line to them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray
import ray.util
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from ..router.backend import ModelInfo
from ..router.config import RouterConfig
from ..router.line import Queue
from ..router.line_client import LineBackend
from ..router.load_report import Decided
from ..router.meters import StoreMeter
from ..router.prefix_index import PrefixIndex
from ..router.redis_url import parse_redis_url
from ..router.replica import MARGIN_S, Depart, ServeDirectory
from ..router.rollout_config import STABLE, RolloutConfig
from ..router.store import NoStore, Store
from ..runtime.errors import ShoalError, Unavailable
from .autoscale_board import follow_board
from .board import posting
from .config import NO_REDIS, ServerConfig
from .draining import on_shutdown, watch_nodes
from .heap import settle_heap
from .logs import log_to_stderr
from .parts import default_name
from .peers import ServePeers
from .preflight import read_chat_template
from .ray_env import hold_serve_port
from .secret import line_secret, redis_password_in, secret_of, with_secrets
from .serve_config import REPLICA, app_of

if TYPE_CHECKING:
    from ..router.balance import Balancer
    from ..router.metrics import RouterMetrics
    from ..router.model import Model
    from ..runtime.tokenizer import Tokenizer

logger = logging.getLogger("shoal.cluster")

SERVE_NAMESPACE = "serve"
SOON_S = 0.05  # between two looks for a first replica,
SETTLED_S = 1.0  # and for one that serves another version of the model
AGAIN_S = 5.0  # after what could not be read


class IngressArgs(BaseModel):
    """`args` of the ingress's application (serve_config.py).

    board: where an ingress on this machine posts how its start goes; a cluster has none. is_alone: there will never be
    another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    router: RouterConfig
    server: ServerConfig
    node_labels: dict[str, str] = Field(default_factory=dict)
    board: Path | None = None
    is_alone: bool = False


class NamedPart(BaseModel):
    """What an ingress must know of a part. sleeps: it may have no replica, and is woken by who asks for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    served_model_name: tuple[str, ...] = ()
    variant: bool = False
    sleeps: bool = False


class UserConfig(BaseModel):
    """`user_config` of the ingress's deployment: what changes in place. The first part is stable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[NamedPart, ...]
    rollout: RolloutConfig


@dataclass(slots=True)
class Joined:
    """A part that is connected, or waited for. told: as `reconfigure` was told last."""

    told: NamedPart
    model: Model
    backend: LineBackend
    following: asyncio.Task[None]


def part_handle(part: str) -> Any:
    """A DeploymentHandle to a part's replicas, whether or not its application is there."""
    return serve.get_deployment_handle(REPLICA, app_name=app_of(part))


class IngressActor:
    """`serve.ingress` turns it into an ASGI app once it is built. From then on it answers, with replicas or without."""

    async def __init__(  # type: ignore[misc]
        self,
        args: IngressArgs,
        *,
        handle_of: Callable[[str], Any] = part_handle,
        watch: Callable[[str, Depart], Coroutine[Any, Any, None]] = watch_nodes,
    ) -> None:
        """Serve awaits it. Raises ConfigError: a secret cannot be read."""
        hold_serve_port()
        log_to_stderr(args.server.log_format)
        with posting(args.board):
            from ..router.ingress import Ingress

            self._config = config = with_secrets(args.router)
            self._line_secret = line_secret(config)
            self._metrics = _metrics_of(args)
            self._store = open_store(args.server, config, self._metrics.store)
            self._chat_template = read_chat_template(config.chat_template)
        self._board = args.board
        self._handle_of = handle_of
        self._joined: dict[str, Joined] = {}
        self._tokenizers: dict[str, Tokenizer | None] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._reconfiguring = asyncio.Lock()
        backend, balancer = self._reach(STABLE)
        self.router = Ingress(
            backend,
            config,
            balancer=balancer,
            store=self._store,
            metrics=self._metrics,
            peers=ServePeers(is_alone=args.is_alone),
        )
        self._stable = backend
        self._serving = asyncio.create_task(_serve_metrics(self.router, args.server))
        self._watching = asyncio.create_task(watch(args.server.notice, self.depart))
        self._scaling = asyncio.create_task(follow_board(self._applications, self._decided))
        on_shutdown(partial(self.depart, args.server.ingress_drain_timeout_s + MARGIN_S))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it before the first request, and whenever the config has changed. What runs is not touched.

        Raises:
            ConfigError: at the first call, the main model's tokenizer cannot be read. Later ones that make no sense
            change nothing instead: to raise would end an ingress that serves.
        """
        async with self._reconfiguring:
            try:
                told = UserConfig.model_validate(user_config)
                told.rollout.check_names(part.name for part in told.parts if part.variant)
            except (ValidationError, ValueError) as error:
                if not self._joined:
                    raise
                logger.error("what was to change makes no sense, so nothing has: %s", error)
                return
            with posting(self._board):
                if not self._joined:
                    await self._tokenizer(told.parts[0].model)
            self._change(told)

    def _change(self, told: UserConfig) -> None:
        wanted = {part.name: part for part in told.parts}
        for name, joined in list(self._joined.items()):
            if name not in wanted or not _is_same(joined.told, wanted[name]):
                self._drop(self._joined.pop(name))
        for name, part in wanted.items():
            if name in self._joined:
                self._joined[name].told = part
            else:
                self._joined[name] = self._join(part)
            self._joined[name].model.sleep.allow(self._directory(name).wake if part.sleeps else None)
        self._tokenizers = {
            model: tokenizer
            for model, tokenizer in self._tokenizers.items()
            if model in {part.model for part in told.parts}
        }
        self.router.roll_out(told.rollout)

    def _join(self, part: NamedPart) -> Joined:
        if part.name == STABLE:
            backend, model = self._stable, self.router.model
        else:
            backend, balancer = self._reach(part.name)
            if part.variant:
                model = self.router.add_variant(part.name, backend, balancer=balancer)
            else:
                names = part.served_model_name or (default_name(part.model),)
                model = self.router.add(backend, name=part.name, names=names, balancer=balancer)
        backend.queue = lambda: Queue(len(model.queue), model.queue.longest_s)
        return Joined(part, model, backend, asyncio.create_task(self._follow(part.name)))

    def _drop(self, joined: Joined) -> None:
        """What runs there goes on to its end; nothing new comes."""
        joined.following.cancel()
        self.router.drop(joined.told.name)
        joined.backend.retire()

        async def close_when_unused() -> None:
            await joined.model.unused()
            await joined.model.cache.close()
            await joined.backend.close()

        leaving = asyncio.create_task(close_when_unused())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _follow(self, name: str) -> None:
        """Open the part's model once a replica has answered, however long its weights take; and again when its replicas
        have been replaced by those of another version."""
        await asyncio.sleep(0)  # it is joined by then
        joined = self._joined[name]
        seen: ModelInfo | None = None
        with ExitStack() as unknown:
            unknown.enter_context(joined.model.sleep.waiting())  # one that sleeps is woken to be known
            while True:
                try:
                    info = await joined.backend.info()
                    told = msgspec.structs.replace(info, created=0)
                    if told != seen:
                        await self._open(joined)
                        settle_heap()
                        seen = told
                        unknown.close()
                    await asyncio.sleep(SETTLED_S)
                except Unavailable:
                    await asyncio.sleep(SOON_S if seen is None else SETTLED_S)
                except (ShoalError, OSError) as error:
                    logger.error("%s cannot be served: %s", name, error)
                    await asyncio.sleep(AGAIN_S)

    async def _open(self, joined: Joined) -> None:
        from ..router.log_cache import LogCache
        from ..runtime.text import Text

        tokenizer = await self._tokenizer(joined.told.model)
        info = await joined.backend.info()
        is_main = joined.told.variant or joined.told.name == STABLE
        template = self._chat_template if is_main else None
        text = Text(tokenizer, info.max_model_len, info.vocab_size, chat_template=template)
        cache = LogCache(
            self._store,
            model=info.digest,
            secret=secret_of(self._config),
            config=self._config,
            meter=self._metrics.cache,
        )
        joined.backend.use(info.digest)
        joined.model.open(info, text, cache=cache)

    async def _tokenizer(self, model: str) -> Tokenizer | None:
        if model not in self._tokenizers:
            self._tokenizers[model] = await asyncio.to_thread(_load_tokenizer, model)
        return self._tokenizers[model]

    def _reach(self, part: str) -> tuple[LineBackend, Balancer]:
        """The way to a part's replicas, and who chooses among them."""
        from ..router.balance import select_balancer

        config = self._config
        index = PrefixIndex(secret=secret_of(config))
        backend = LineBackend(
            self._directory(part), secret=self._line_secret, index=index, on_silent=partial(_kill_soon, part)
        )
        backend.start()
        balancer = select_balancer(
            config.balancer, backend.replicas, index, rng=random.Random(), on_choice=self._metrics.routing.chose
        )
        return backend, balancer

    def _applications(self) -> list[str]:
        return [app_of(name) for name in self._joined]

    def _decided(self, decided: Mapping[str, Decided]) -> None:
        """How many replicas there are to be, as those say that settle it."""
        for name, joined in self._joined.items():
            joined.model.decided = decided.get(app_of(name))

    def _directory(self, part: str) -> ServeDirectory:
        return ServeDirectory(self._handle_of(part), timeout_s=self._config.ready_timeout_s)

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for it once `__init__` is over."""
        from ..router.api import create_app

        return create_app(self.router, echoes_id=False)

    @property
    def broken(self) -> list[asyncio.Task[None]]:
        """Parts' followers that have ended; none should."""
        return [joined.following for joined in self._joined.values() if joined.following.done()]

    async def check_health(self) -> None:
        """Serve calls this, and replaces an ingress in which something broke that should not."""
        for following in self.broken:
            following.result()

    async def exchange(self, telling: bytes) -> bytes:
        """Another ingress calls this, for what each has counted."""
        return await self.router.exchange(telling)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; returns when what runs has ended, each with a terminal event."""
        await self.router.drain(timeout_s)
        for joined in self._joined.values():
            await joined.backend.close()  # replicas that are to go need not wait for anything from here

    async def depart(self, left_s: float | None) -> None:
        """Serve ends this ingress in `left_s` seconds, or its machine goes. Others are asked instead, once proxies
        know; who asks here until then is answered. Shortly before, what still runs ends with a terminal event."""
        if left_s is not None:
            await asyncio.sleep(left_s - MARGIN_S)
            await self.drain(0.0)


def _is_same(joined: NamedPart, told: NamedPart) -> bool:
    """Whether the way to it stays; another model under the same name comes with other replicas, see `_follow`."""
    return joined.model_copy(update={"model": told.model, "sleeps": told.sleeps}) == told


def open_store(server: ServerConfig, router: RouterConfig, meter: StoreMeter) -> Store:
    """What ingresses share: Redis, where there is one. It is not asked anything yet. Raises ConfigError."""
    if server.redis_url == NO_REDIS:
        return NoStore()
    from ..router.redis_store import RedisStore

    address = parse_redis_url(server.redis_url)
    if server.redis_password_file is not None:
        address = msgspec.structs.replace(address, password=redis_password_in(server.redis_password_file))
    return RedisStore(address, meter, timeout_s=router.redis_timeout_s)


def _load_tokenizer(model: str) -> Tokenizer | None:
    from ..runtime.hub import resolve_model
    from ..runtime.tokenizer_files import load_tokenizer

    return load_tokenizer(resolve_model(model))


def _metrics_of(args: IngressArgs) -> RouterMetrics:
    """An ingress's; one that may be one of several is named in them."""
    from ..router.metrics import RouterMetrics

    router = args.router
    name = (*router.served_model_name, STABLE)[0]
    return RouterMetrics(
        ingress="" if args.is_alone else str(serve.get_replica_context().replica_id.unique_id),
        vllm_model=name if router.vllm_metrics else None,
    )


async def _serve_metrics(router: Any, server: ServerConfig) -> None:
    """`/metrics` on a port of its own, where there is one."""
    from ..router.metrics_server import serve_metrics

    if server.metrics_port is not None:
        await serve_metrics(router.scrape, host=server.metrics_host, port=server.metrics_port)


def _kill_soon(part: str, replica: str) -> None:
    asyncio.get_running_loop().run_in_executor(None, kill_replica, part, replica)


def kill_replica(part: str, replica: str) -> None:
    """End the process of a replica that says nothing, so that Serve starts another. Blocks for Ray's answers.

    Serve by itself waits two minutes for one that is stopped. Such a process does not hear Ray either: its raylet asks
    it to end, and kills it 5 s later.
    """
    actors = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
    for actor in actors:
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].endswith(f"{app_of(part)}#{REPLICA}#{replica}"):
            logger.warning("replica %s is silent: it is killed", replica)
            with suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(actor["name"], namespace=SERVE_NAMESPACE), no_restart=True)
