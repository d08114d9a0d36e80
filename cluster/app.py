"""The deployment's object graph, built in one place: arguments -> Serve application. On the driver and in the actors.

One Serve replica is one engine; the ingress (ingress.py) holds no weights and no torch, so it answers while the replica
still loads. What differs between deployments (where ranks live, which device) is decided here and nowhere else.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from ..router.backend import ModelInfo
from ..router.config import RouterConfig
from ..router.replica import Parts, Replica
from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError
from .autoscale import objective_of, sleeps
from .board import posting
from .config import ServerConfig, ShoalConfig
from .config_errors import dotted, explain
from .draining import watch_nodes
from .heap import settle_heap
from .ingress import IngressActor, IngressArgs
from .logs import log_to_stderr
from .parts import default_name, parts
from .ray_env import hold_serve_port, missing_switches
from .ray_launcher import ENGINE_CPUS, RayLauncher, bundles
from .secret import line_secret, secret_of
from .serve_config import INGRESS, REPLICA

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
HAND_OVER_S = 5.0  # behind the drain's deadline, for the last words to arrive; then Serve ends the process
LONGEST_S = 3600.0  # for the last replica of its weights: what runs there ends by its own deadline before that
CALLS = 64  # at once, to a replica: its address, its health; generations go over the line
NO_LIMIT = 1_000_000  # the ingress's own admission decides, with the right error shape


class PartArgs(BaseModel):
    """What the replicas of one part are built from: `args` of its application (serve_config.py).

    board: where a replica on this machine posts how its start goes; a cluster has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    engine: EngineConfig
    router: RouterConfig
    server: ServerConfig
    node_labels: dict[str, str] = Field(default_factory=dict)
    board: Path | None = None


def on_device(config: ShoalConfig, *, num_gpus: float) -> ShoalConfig:
    """The config with its device settled by what Ray has.

    Raises:
        ConfigError: the ranks are more than the GPUs, with the arithmetic.
    """
    engine, grid = config.engine, config.engine.grid
    device = engine.device if engine.device != "auto" else "cuda" if num_gpus >= 1 else "cpu"
    config = config.model_copy(update={"engine": engine.model_copy(update={"device": device})})
    stable, *others = parts(config)
    more = sum(part.most_replicas * part.engine.grid.size for part in others if part.engine.device == "cuda")
    needed = more + (stable.most_replicas * grid.size if device == "cuda" else 0)
    if needed > num_gpus:
        beside = f" + {more} for {', '.join(part.name for part in others)}" if more else ""
        raise ConfigError(
            f"--replicas {stable.most_replicas} x --tensor-parallel-size {grid.tp} x --pipeline-parallel-size {grid.pp}"
            f"{beside} = {needed} GPUs, one a rank, but Ray has {num_gpus:g}: lower one of them, add GPUs, or use "
            "--device cpu"
        )
    return config


def build_app(args: dict[str, Any]) -> serve.Application:
    """The builder that a declarative config names: the ingress, or where `args` name a part, its replicas.

    Raises:
        ConfigError: what is wrong with `args`, a line a problem; Serve shows it as the application's message.
    """
    return application(args)


def application(args: dict[str, Any], **options: Any) -> serve.Application:
    """The same with `options` of its deployment, as an entry under `deployments` has them."""
    try:
        if "part" in args:
            return _replicas(PartArgs.model_validate(args), options)
        return _ingress(IngressArgs.model_validate(args), options)
    except ValidationError as error:
        model = PartArgs if "part" in args else IngressArgs
        raise ConfigError("\n".join(explain(error, model, lambda path: f"args.{dotted(path)}"))) from None


def _ingress(args: IngressArgs, options: dict[str, Any]) -> serve.Application:
    if args.board is None and args.server.haproxy and (missing := missing_switches(os.environ)):
        raise ConfigError(
            f"Ray was started without {' and '.join(f'{name}=1' for name in missing)}: set it on every node before "
            "`ray start` (python -m shoal.cluster.ray_env FOLDER prints all settings), or say server.haproxy: false"
        )
    deployment: Any = serve.deployment(
        **{
            "name": INGRESS,
            "max_ongoing_requests": NO_LIMIT,
            "ray_actor_options": {"num_cpus": 0.1, **_on(args.node_labels)},
            **_lifecycle(args.server.ingress_drain_timeout_s),
            **options,
        }
    )(serve.ingress()(IngressActor))
    bound: serve.Application = deployment.bind(args)
    return bound


def _replicas(args: PartArgs, options: dict[str, Any]) -> serve.Application:
    if args.engine.device == "auto":  # nodes with GPUs may be yet to come
        args = args.model_copy(update={"engine": args.engine.model_copy(update={"device": "cuda"})})
    deployment: Any = serve.deployment(
        **{
            "name": REPLICA,
            "max_ongoing_requests": CALLS,
            **_resources(args.engine, args.node_labels),
            **_lifecycle(max(args.server.drain_timeout_s, LONGEST_S)),
            **options,
        }
    )(ReplicaActor)
    bound: serve.Application = deployment.bind(args)
    return bound


class ReplicaActor(Replica):
    """A replica as Serve makes it, in its own process."""

    def __init__(self, args: PartArgs) -> None:
        super().__init__(partial(build_parts, args), line_secret(args.router))
        self._objective: dict[str, float] = {}

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Serve calls it before the first request, where there is a `user_config`, and whenever that has changed."""
        self._objective = objective_of(user_config)
        self.sleeps = sleeps(user_config)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """With what the policy is to hold it to: told this way, it changes in place (autoscale.py)."""
        return await super().record_autoscaling_stats() | self._objective


def build_parts(args: PartArgs) -> Parts:
    """In a replica's process: the engine, its grammars and what the ingress must know of the model."""
    hold_serve_port()
    log_to_stderr(args.server.log_format)
    with posting(args.board):
        from ..runtime.async_engine import AsyncEngine
        from ..runtime.build import build_replica
        from ..runtime.fingerprint import model_digest
        from ..runtime.grammar import GrammarCompiler
        from ..runtime.tokenizer_files import load_tokenizer

        engine = args.engine
        launcher = None
        if engine.grid.size > 1:
            launcher = RayLauncher(
                engine.grid,
                gpus=engine.device == "cuda",
                timeout_s=engine.start_timeout_s,
                notice=args.server.notice,
            )
        built = build_replica(engine, secret=secret_of(args.router), launcher=launcher)
        info = ModelInfo(
            model=default_name(engine.model),
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
        grammars = GrammarCompiler(load_tokenizer(built.model_path), info.vocab_size, built.eos_token_ids)
        settle_heap()
        return Parts(
            engine=serving,
            grammars=grammars,
            info=info,
            changes=serving.take_cache_changes,
            drain_timeout_s=args.server.drain_timeout_s,
            watch=partial(watch_nodes, args.server.notice, also=lambda: [rank.node for rank in serving.ranks()]),
        )


def _resources(engine: EngineConfig, node_labels: dict[str, str]) -> dict[str, Any]:
    """What a replica asks of Ray. One rank lives in the replica's own process, more have bundles of their own."""
    grid, gpus = engine.grid, engine.device == "cuda"
    if grid.size == 1:
        return {"ray_actor_options": {"num_cpus": ENGINE_CPUS, "num_gpus": int(gpus), **_on(node_labels)}}
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": ENGINE_CPUS},
        "placement_group_bundles": bundles(grid, gpus=gpus),
        "placement_group_strategy": "PACK",
    }
    if node_labels:
        options["placement_group_bundle_label_selector"] = [node_labels]  # for every bundle
    return options


def _on(node_labels: dict[str, str]) -> dict[str, Any]:
    """Of an actor's options: the nodes that it may lie on."""
    return {"label_selector": node_labels} if node_labels else {}


def _lifecycle(drain_timeout_s: float) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": drain_timeout_s + HAND_OVER_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": {"enable_access_log": False},
    }
