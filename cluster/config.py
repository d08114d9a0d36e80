"""The YAML root, `shoal.yaml`: composes the folders' configs, merges flags over the file, and refuses with a hint.

    engine:            # runtime.config.EngineConfig
      model: ...
    router:            # router.config.RouterConfig
    server:            # ServerConfig, below

A flag has its field's name (`--max-model-len` is `engine.max_model_len`), and a flag wins over the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
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
from .parts import ModelConfig, VariantConfig

EMBEDDED, NO_REDIS = "embedded", "none"  # values of redis_url that are no URL


class ServerConfig(BaseModel):
    """Where the service listens and how it is deployed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allow_anonymous: bool = Field(False, description="Listen beyond loopback without any API key.")
    metrics_port: int | None = Field(None, ge=1, le=65535, description="A port for /metrics alone, without a key.")
    metrics_host: str = Field("127.0.0.1", description="Address of that port, on machines with an ingress.")
    log_format: Literal["text", "json"] = Field("text", description="Of the actors' logs, one record a line.")
    replicas: int = Field(1, ge=1, description="Engines behind the router.")
    ingresses: int = Field(1, ge=1, description="Routers in front of the replicas.")
    smaller_model: str | None = Field(
        None, description="A second model, on one replica, for the ladder's rungs and for whoever asks for it by name."
    )
    redis_url: str = Field(
        EMBEDDED,
        repr=False,
        description="For cached, shared and continued answers: embedded (a Redis of our own on this machine), none, or "
        "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://.",
    )
    haproxy: bool = Field(True, description="HAProxy and Serve's fast data path in front; else Serve's own proxy.")
    startup_timeout_s: float = Field(600, gt=0, description="Give up if the service is not ready by then.")
    shutdown_timeout_s: float = Field(10, ge=0, description="How long running generations may go on after SIGTERM.")


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


REPEATED = {"api_keys": "--api-key"}  # given once for each
Overrides = Mapping[tuple[str, str], Any]
"""(section, field) -> the value a flag gave."""


def load_config(overrides: Overrides, *, file: Path | None = None) -> ShoalConfig:
    """The file (where one is given) with the flags over it, validated.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the nearest known one), or a value out of its limits;
            the message names the file and the key, or the flag.
    """
    tree = _read(file) if file else {}
    for complaint in _unknown_keys(tree, ShoalConfig, ()):
        raise ConfigError(f"{file}: {complaint}")
    tree = {**tree, **{section: dict(tree.get(section) or {}) for section in ("engine", "router", "server")}}
    for (section, name), value in overrides.items():
        tree[section][name] = value
    model = tree["engine"].get("model")
    if not model:
        raise ConfigError("no model: name a folder, a .gguf file or a hub id, as an argument or as engine.model")
    tree["router"].setdefault("served_model_name", [default_name(str(model))])
    try:
        return ShoalConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, overrides, file)) from None


def default_name(model: str) -> str:
    """What clients call the model where no name was given: a hub id as it is, a path's last part without `.gguf`."""
    path = Path(model).expanduser()
    return Path(os.path.abspath(path)).name.removesuffix(".gguf") if path.exists() else model


def smaller(config: ShoalConfig) -> ShoalConfig | None:
    """What the smaller model's replica runs with: all of the main one's options but the model itself."""
    model = config.server.smaller_model
    if model is None:
        return None
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"model": model}),
            "router": config.router.model_copy(update={"served_model_name": (default_name(model),)}),
            "server": config.server.model_copy(update={"replicas": 1, "smaller_model": None}),
        }
    )


def check_supported(config: ShoalConfig) -> None:
    """Refuse what this version has flags for but not yet the machinery, and an open door that nobody asked for.

    Raises:
        ConfigError: with the value, the reason and what to use instead.
    """
    engine, server = config.engine, config.server
    if not (is_loopback(server.host) or config.router.api_keys or config.router.tenants or server.allow_anonymous):
        raise ConfigError(
            f"host {server.host} without an API key would serve everyone who can reach it: give --api-key or "
            "--api-key-file, listen on 127.0.0.1, or say --allow-anonymous"
        )
    known = () if server.smaller_model is None else (default_name(server.smaller_model),)
    for rung in config.router.ladder:
        if rung.model is not None and rung.model not in known:
            raise ConfigError(
                f"router.ladder names the model {rung.model!r}, and there is "
                f"{f'only {known[0]!r}' if known else 'no other model'} to fall to: set --smaller-model"
            )
    if known and known[0] in config.router.served_model_name:
        raise ConfigError(f"--smaller-model {server.smaller_model} would be served as {known[0]!r}, as the main one is")
    if server.metrics_port is not None and server.metrics_port == server.port:
        raise ConfigError(f"--metrics-port {server.metrics_port} is --port, too: /metrics alone takes another one")
    if server.redis_url not in (EMBEDDED, NO_REDIS):
        parse_redis_url(server.redis_url)
    for value, limit, sentence in (
        (engine.seed, None, f"seed {engine.seed}: requests bring their own to a server; leave it out"),
    ):
        if value != limit:
            raise ConfigError(sentence)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def flag_of(name: str) -> str:
    """The flag that sets the field `name`."""
    return REPEATED.get(name) or "--" + name.replace("_", "-")


def _read(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file}: the root is a {type(tree).__name__}; it must be a mapping with {_list(ShoalConfig)}"
        )
    return tree


def _unknown_keys(tree: Mapping[Any, Any], model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    """One complaint for each key that `model` does not have, depth first."""
    for key, value in tree.items():
        known = model.model_fields.get(key) if isinstance(key, str) else None
        here = ".".join((*path, str(key)))
        if known is None:
            yield f"unknown key {here}{_suggestion(str(key), model, path)}"
            continue
        below = known.annotation
        if isinstance(below, type) and issubclass(below, BaseModel) and value is not None:
            if not isinstance(value, Mapping):
                yield f"{here} is a {type(value).__name__}; it must be a mapping with {_list(below)}"
            else:
                yield from _unknown_keys(value, below, (*path, key))


def _suggestion(key: str, model: type[BaseModel], path: tuple[str, ...]) -> str:
    """The nearest known key: in the same mapping, or in the section where it belongs."""
    wanted = key.replace("-", "_")
    near = get_close_matches(wanted, model.model_fields, n=1)
    if near:
        return f"; did you mean {'.'.join((*path, near[0]))}?"
    everywhere = {
        field: section
        for section, info in ShoalConfig.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for field in info.annotation.model_fields
    }
    near = get_close_matches(wanted, everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {everywhere[near[0]]}.{near[0]}?"
    return f"; known here: {_list(model)}"


def _list(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, overrides: Overrides, file: Path | None) -> str:
    """One line a problem, each naming where the value came from."""
    lines = []
    for problem in error.errors(include_url=False):
        where = [str(part) for part in problem["loc"]]
        flagged = len(where) > 1 and (where[0], where[1]) in overrides
        source = flag_of(where[1]) if flagged else f"{file or 'config'}: {'.'.join(where)}"
        secret = isinstance(problem["input"], dict) or _is_secret(where)
        given = "" if secret else f" (got {problem['input']!r:.80})"
        lines.append(f"{source}: {problem['msg'].removeprefix('Value error, ')}{given}")
    return "\n".join(lines)


def _is_secret(where: list[str]) -> bool:
    """Fields that their model keeps out of its repr stay out of messages too."""
    section = ShoalConfig.model_fields[where[0]].annotation
    fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
    return len(where) > 1 and where[1] in fields and not fields[where[1]].repr
