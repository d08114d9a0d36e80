"""The YAML root, `shoal.yaml`: composes the folders' configs, merges flags over the file, and refuses with a hint.

    engine:            # runtime.config.EngineConfig
      model: ...
    router:            # router.config.RouterConfig
    server:            # ServerConfig, below

A flag has its field's name (`--max-model-len` is `engine.max_model_len`), and a flag wins over the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..router.config import RouterConfig
from ..router.redis_url import parse_redis_url
from ..router.rollout_config import RolloutConfig
from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError
from .autoscale_config import AutoscalingConfig
from .config_checks import part_problems
from .config_errors import Problem, explain, kind_of, misread, refuse
from .parts import MOST_REPLICAS, LabelKey, LabelValue, ModelConfig, VariantConfig, default_name
from .yaml_lines import Step, YamlFile

EMBEDDED, NO_REDIS = "embedded", "none"  # values of redis_url that are no URL


class ServerConfig(BaseModel):
    """Where the service listens and how it is deployed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allow_anonymous: bool = Field(False, description="Listen beyond loopback without any API key.")
    metrics_port: int | None = Field(None, ge=1, le=65535, description="A port for /metrics alone, without a key.")
    metrics_host: str = Field("127.0.0.1", description="Address of that port, on machines with an ingress.")
    log_format: Literal["text", "json"] = Field("text", description="Of the actors' logs, one record a line.")
    replicas: int = Field(1, ge=1, le=MOST_REPLICAS, description="Engines behind the router.")
    ingresses: int = Field(1, ge=1, le=MOST_REPLICAS, description="Routers in front of the replicas.")
    smaller_model: str | None = Field(
        None, description="A second model, on one replica, for the ladder's rungs and for whoever asks for it by name."
    )
    redis_url: str = Field(
        EMBEDDED,
        repr=False,
        description="For cached, shared and continued answers: embedded (a Redis of our own on this machine), none, or "
        "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://.",
    )
    redis_password_file: Path | None = Field(
        None, description="A file with the password of that Redis, on every node with an ingress."
    )
    haproxy: bool = Field(True, description="HAProxy and Serve's fast data path in front; else Serve's own proxy.")
    startup_timeout_s: float = Field(600, gt=0, description="Give up if the service is not ready by then.")
    shutdown_timeout_s: float = Field(10, ge=0, description="How long running generations may go on after SIGTERM.")
    drain_timeout_s: float = Field(
        30,
        ge=0,
        description="How long generations may go on at a replica that is replaced or scaled down; what is left is "
        "handed over to others.",
    )
    ingress_drain_timeout_s: float = Field(
        600, ge=0, description="How long answers may go on at an ingress that is; what is left ends with an error."
    )
    notice: str = Field(
        "none",
        pattern=r"^(none|auto|aws|gcp|azure|file:/.+)$",
        description="Who says that a machine is about to be taken away (spot, maintenance): none, auto (asks where it "
        "is), aws, gcp, azure, or file:/PATH, which does so by being there.",
    )
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="When replicas are replaced, so many start before old ones stop, which serve until then; 0: old "
        "ones stop first, where there are no GPUs to spare.",
    )
    node_labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, description="Labels of the Ray nodes that replicas of the main model may lie on."
    )
    ingress_node_labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, description="Labels of the Ray nodes that ingresses may lie on."
    )


class ShoalConfig(BaseModel):
    """One deployment: what `shoal.yaml` may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig
    router: RouterConfig
    server: ServerConfig
    autoscaling: AutoscalingConfig | None = Field(None, description="How many replicas; without it: server.replicas.")
    variants: tuple[VariantConfig, ...] = Field((), description="Other versions of the model, beside it.")
    models: tuple[ModelConfig, ...] = Field((), description="Further models, each asked for by its own name.")
    rollout: RolloutConfig = Field(
        default_factory=RolloutConfig, description="Which variant answers; changes in place."
    )


_UNLIKE_FIELDS = {"api_keys": "--api-key", "model": "MODEL"}  # once for each key; an argument
Overrides = Mapping[tuple[str, str], Any]
"""(section, field) -> the value a flag gave."""

Check = Callable[[ShoalConfig], Iterator[Problem]]
"""What of a config does not go together."""


def whole(config: ShoalConfig) -> Iterator[Problem]:
    """What no command can do with: parts, ports and Redis that do not go together."""
    yield from part_problems(config)
    server = config.server
    if server.metrics_port is not None and server.metrics_port == server.port:
        sentence = f"--metrics-port {server.metrics_port} is --port, too: /metrics alone takes another one"
        yield Problem(("server", "metrics_port"), sentence)
    if server.redis_url not in (EMBEDDED, NO_REDIS):
        try:
            parse_redis_url(server.redis_url)
        except ConfigError as error:
            yield Problem(("server", "redis_url"), str(error))
    elif server.redis_password_file is not None:
        yield Problem(
            ("server", "redis_password_file"),
            f"--redis-password-file {server.redis_password_file} is for a Redis of yours, and --redis-url is "
            f"{server.redis_url}: give its URL",
        )


def served(config: ShoalConfig) -> Iterator[Problem]:
    """What cannot be served besides: an open door that nobody asked for, and what is for engines alone."""
    engine, server = config.engine, config.server
    if not (is_loopback(server.host) or config.router.has_keys or server.allow_anonymous):
        yield Problem(
            ("server", "host"),
            f"host {server.host} without an API key would serve everyone who can reach it: give --api-key or "
            "--api-key-file, listen on 127.0.0.1, or say --allow-anonymous",
        )
    if engine.seed is not None:
        sentence = f"seed {engine.seed}: requests bring their own to a server; leave it out"
        yield Problem(("engine", "seed"), sentence)


def load_config(overrides: Overrides, *, file: Path | None = None, checks: Sequence[Check] = ()) -> ShoalConfig:
    """The file (where one is given) with the flags over it, validated: by `whole`, and by `checks` for what it is for.

    Raises:
        ConfigError: no such file, not YAML, unknown keys (with the nearest known one), values out of their limits, or
            what does not go together; a line for each problem, which names the file, its line and the key, or the flag.
    """
    said = YamlFile(file) if file else None
    tree = _merged(_root(said), overrides)

    def place(path: Sequence[Step]) -> str:
        if path[:2] in overrides:
            return flag_of(str(path[1]))
        return said.place(path) if said is not None else "config"

    try:
        config = ShoalConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, ShoalConfig, place))) from None
    if said is not None:
        refuse((each for each in misread(tree, config) if each.path[:2] not in overrides), place)
    if not config.engine.model:
        at = "" if said is None else f"{place(('engine', 'model'))}: "
        raise ConfigError(f"{at}no model: name a folder, a .gguf file or a hub id, as an argument or as engine.model")
    for check in (whole, *checks):  # what comes later rests on what came before
        refuse(check(config), place if said is not None else None)
    return config


def check_supported(config: ShoalConfig) -> None:
    """Refuse what cannot be served, of a config that may not come from a file.

    Raises:
        ConfigError: with the value, the reason and what to use instead.
    """
    refuse([*whole(config), *served(config)])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def flag_of(name: str) -> str:
    """The flag that sets the field `name`."""
    return _UNLIKE_FIELDS.get(name) or "--" + name.replace("_", "-")


def _root(said: YamlFile | None) -> Mapping[str, Any]:
    if said is None or said.tree is None:
        return {}
    if not isinstance(said.tree, dict):
        raise ConfigError(
            f"{said.file}: the root is {kind_of(said.tree)}; "
            f"it must be a mapping with {', '.join(ShoalConfig.model_fields)}"
        )
    return said.tree


def _merged(tree: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """The file's tree with the flags over it; a key without a value is as if it were not there."""
    merged: dict[str, Any] = {"engine": {}, "router": {}, "server": {}}
    merged |= {key: value for key, value in tree.items() if value is not None}
    for section, name in overrides:
        if isinstance(merged[section], Mapping):
            merged[section] = {**merged[section], name: overrides[section, name]}
    engine, router = merged["engine"], merged["router"]
    if isinstance(engine, Mapping):
        merged["engine"] = {**engine, "model": engine.get("model") or ""}
        if isinstance(router, Mapping):
            merged["router"] = {"served_model_name": [default_name(str(engine.get("model")))], **router}
    return merged
