"""A deployment as Ray Serve's declarative config: what `shoal deploy` sends and a RayService of KubeRay holds.

Each part is an application of its own, and so is the ingress, so that nothing replaces what it does not concern. Serve
replaces an application's replicas when its `args` change, or the policy of its autoscaling, which it takes for code;
what else stands under `deployments` changes in place, under running streams. Everything is as it was written, defaults
are left out, so a template can make the same from the same values (helm/shoal does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ..router.redis_url import parse_redis_url
from ..router.rollout_config import STABLE
from .autoscale import serve_autoscaling
from .config import EMBEDDED, NO_REDIS, ShoalConfig, check_supported, served
from .config_errors import Problem, refuse
from .parts import Part, parts

IMPORT_PATH = "shoal.cluster.app:build_app"
INGRESS_APP, INGRESS, REPLICA = "shoal", "ingress", "replica"
"""The application of the ingress, its deployment, and the one deployment of a part's application."""

INGRESS_SERVER = (
    "metrics_port",
    "metrics_host",
    "log_format",
    "redis_url",
    "redis_password_file",
    "ingress_drain_timeout_s",
    "notice",
    "haproxy",
)
"""What an ingress must know of `server`; of `router` it knows all."""

PART_ROUTER, PART_SERVER = ("secret", "secret_file"), ("log_format", "drain_timeout_s", "notice")
"""What a replica must know of `router` and of `server`."""


def app_of(part: str) -> str:
    """The application of a part."""
    return f"{INGRESS_APP}-{part}"


def serve_config(config: ShoalConfig) -> dict[str, Any]:
    """The declarative config, as plain values. `config` as it was loaded.

    Secrets stay where they are written: see `check_deployable`.
    """
    server = config.server
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": server.host, "port": server.port},
        "applications": [_ingress(config), *(_part(part, config) for part in parts(config))],
    }


def check_deployable(config: ShoalConfig) -> None:
    """Refuse what a cluster cannot serve, of a config that may not come from a file.

    Raises:
        ConfigError: with the field and what to use instead.
    """
    check_supported(config)
    refuse(deployed(config))


def deployed(config: ShoalConfig) -> Iterator[Problem]:
    """What a cluster cannot serve, though a machine alone can: it would need what only this machine has."""
    yield from served(config)
    router, server = config.router, config.server
    for path, file in (
        (("router", "secret_file"), router.secret_file),
        (("router", "api_key_file"), router.api_key_file),
        (("router", "chat_template"), router.chat_template),
        (("server", "redis_password_file"), server.redis_password_file),
    ):
        if file is not None and not file.is_absolute():
            yield Problem(path, f"{'.'.join(path)} is {file}: say where it is on every node, from the root on")
    if server.port == 0:
        yield Problem(("server", "port"), "server.port is 0, a free one, and nobody would know which: say one")
    yield from _open_secrets(config)
    if server.redis_url == EMBEDDED:
        yield Problem(
            ("server", "redis_url"),
            "server.redis_url is embedded, a Redis of this machine alone: give the URL of one that the whole cluster "
            "reaches, or none",
        )


def _open_secrets(config: ShoalConfig) -> Iterator[Problem]:
    """Secrets that would lie open in what Serve is told, or are not there."""
    router, server = config.router, config.server
    if router.secret is not None:
        yield Problem(
            ("router", "secret"),
            "router.secret would lie open in the cluster's config: name a file with it, router.secret_file",
        )
    elif router.secret_file is None:
        yield Problem(
            ("router", "secret_file"),
            "router.secret_file is missing: a file with the cluster's secret, 32 characters or more, which every node "
            "has at the same place; `openssl rand -hex 32` makes one",
        )
    if router.api_keys:
        yield Problem(
            ("router", "api_keys"),
            "router.api_keys would lie open in the cluster's config: name a file with them, router.api_key_file, which "
            "every node with an ingress has, or give digests under router.tenants",
        )
    if server.redis_url not in (EMBEDDED, NO_REDIS) and parse_redis_url(server.redis_url).password is not None:
        yield Problem(
            ("server", "redis_url"),
            "server.redis_url has a password in it, which would lie open in the cluster's config: leave it out, and "
            "name a file with it, server.redis_password_file",
        )


def _ingress(config: ShoalConfig) -> dict[str, Any]:
    server = config.server
    return {
        "name": INGRESS_APP,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {
            "router": _written(config.router),
            "server": _some(server, INGRESS_SERVER),
            **_labels(server.ingress_node_labels),
        },
        "deployments": [
            {
                "name": INGRESS,
                "num_replicas": server.ingresses,
                "max_surge_percent": server.max_surge_percent,
                "user_config": {
                    "parts": [_named(part) for part in parts(config)],
                    "rollout": _written(config.rollout),
                },
            }
        ],
    }


def _named(part: Part) -> dict[str, Any]:
    """What an ingress must know of a part. In this order it lists their models."""
    entry: dict[str, Any] = {"name": part.name, "model": part.engine.model}
    if part.is_variant:
        entry["variant"] = True
    if part.served_model_name and part.name != STABLE:  # the main model's names are the router's own
        entry["served_model_name"] = list(part.served_model_name)
    if part.autoscaling is not None and part.autoscaling.min_replicas == 0:
        entry["sleeps"] = True
    return entry


def _part(part: Part, config: ShoalConfig) -> dict[str, Any]:
    return {
        "name": app_of(part.name),
        "route_prefix": None,
        "import_path": IMPORT_PATH,
        "args": {
            "part": part.name,
            "engine": _written(part.engine),
            "router": _some(config.router, PART_ROUTER),
            "server": _some(config.server, PART_SERVER),
            **_labels(part.node_labels),
        },
        "deployments": [
            {"name": REPLICA, "max_surge_percent": config.server.max_surge_percent, **_scale(part)},
        ],
    }


def _scale(part: Part) -> dict[str, Any]:
    """How many replicas, as Serve is told."""
    if part.autoscaling is None:
        return {"num_replicas": part.replicas}
    # No `initial_replicas`: Serve would go back to them at every change. An ingress wakes a part that it must know of.
    return {
        "autoscaling_config": serve_autoscaling(part.autoscaling),
        "user_config": {"autoscaling": _written(part.autoscaling)},
    }


def _labels(labels: Mapping[str, str]) -> dict[str, Any]:
    return {"node_labels": dict(labels)} if labels else {}


def _written(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_unset=True)


def _some(model: BaseModel, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in _written(model).items() if name in names}
