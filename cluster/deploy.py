"""`shoal deploy`: a config to a running cluster, through the REST API of Ray's dashboard, and what comes of it.

The whole deployment is sent as Serve's declarative config; what of it is new, replaced or changed in place follows from
what the cluster was told before, by the rules of `serve_config.py`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from ..runtime.errors import ConfigError, ShoalError, StartupError
from .config import ShoalConfig
from .progress import Progress
from .serve import status_of
from .serve_config import INGRESS_APP, check_deployable, serve_config

POLL_S = 0.5
DASHBOARD = "http://127.0.0.1:8265"


class DeployError(ShoalError):
    """What was deployed does not come to run. What ran before it runs on."""


class Kind(Enum):
    """What a deployment does to one application."""

    ADDED = "added beside"
    REPLACED = "replaced"
    IN_PLACE = "changed in place"
    REMOVED = "removed"
    UNCHANGED = "unchanged"


class Change(NamedTuple):
    """words: what of it, where that says more."""

    app: str
    kind: Kind
    words: str = ""

    def __str__(self) -> str:
        return f"{self.app}: {self.kind.value}" + (f" ({self.words})" if self.words else "")


class Cluster(Protocol):
    """What is needed of `ray.dashboard.modules.serve.sdk.ServeSubmissionClient`."""

    def get_serve_details(self) -> dict[str, Any]: ...

    def deploy_applications(self, config: dict[str, Any]) -> None: ...


def run_deploy(config: ShoalConfig, *, address: str, dry_run: bool, wait: bool) -> None:
    """Deploy, or with `dry_run` only say what would change.

    Raises:
        ConfigError: refused before anything changes. StartupError: no cluster answers there, or not to us. DeployError.
    """
    check_deployable(config)
    wanted = serve_config(config)
    cluster = connect(address)
    before = cluster.get_serve_details()
    check_cluster(before, wanted)
    changes = list(compare(before, wanted))
    for change in changes:
        print(change, flush=True)
    if dry_run:
        return
    try:
        cluster.deploy_applications(wanted)
    except RuntimeError as error:
        raise ConfigError(f"Serve refuses the config: {error}") from None
    if not wait:
        return
    host = urlsplit(address).hostname or "127.0.0.1"
    with Progress() as progress:
        follow(cluster, changes, progress, timeout_s=config.server.startup_timeout_s)
        await_endpoint(host, config.server.port, progress, timeout_s=config.server.startup_timeout_s)


def connect(address: str) -> Cluster:
    """Ray's own client. Its token is where Ray keeps it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    Raises:
        ConfigError: not an address. StartupError: nobody answers there, or the token is not the cluster's.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.exceptions import AuthenticationError

    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(f"--address {address}: it is the dashboard's, such as {DASHBOARD}")
    try:
        client: Cluster = ServeSubmissionClient(address)
    except AuthenticationError as error:
        raise StartupError(
            f"the cluster at {address} does not take our token ({str(error).partition(chr(10))[0]}): put the cluster's "
            "into RAY_AUTH_TOKEN, or into a file that RAY_AUTH_TOKEN_PATH names (by default ~/.ray/auth_token)"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(
            f"no Ray cluster answers at {address}: give --address, and start Ray with its dashboard ({error})"
        ) from None
    return client


def check_cluster(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what Serve would do in silence: to remove others' applications, or to go on listening elsewhere.

    Raises:
        ConfigError: with what stands in the way.
    """
    others = [name for name in before["applications"] if not _is_ours(name)]
    if others:
        raise ConfigError(
            f"the cluster serves {', '.join(sorted(others))}, too, which a declarative deployment would remove: delete "
            "it first, or deploy to another cluster"
        )
    listens = before.get("http_options") or {}
    for name, value in wanted["http_options"].items():
        if before["applications"] and listens.get(name, value) != value:
            raise ConfigError(
                f"server.{name} is {value!r}, and Serve has listened on {listens[name]!r} since it started there: "
                "change it back, or take Serve down first (serve shutdown)"
            )


def compare(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Change]:
    """What `wanted`, a declarative config, changes where Serve's details are `before`."""
    known = {name: app.get("deployed_app_config") or {} for name, app in before["applications"].items()}
    for app in wanted["applications"]:
        name = app["name"]
        if name not in known:
            yield Change(name, Kind.ADDED)
        elif changed := _differences(_code(known[name]), _code(app)):
            yield Change(name, Kind.REPLACED, ", ".join(changed))
        elif changed := _differences(_deployment(known[name]), _deployment(app)):
            yield Change(name, Kind.IN_PLACE, ", ".join(changed))
        else:
            yield Change(name, Kind.UNCHANGED)
    names = {app["name"] for app in wanted["applications"]}
    yield from (Change(name, Kind.REMOVED) for name in known if name not in names)


def follow(cluster: Cluster, changes: Sequence[Change], progress: Progress, *, timeout_s: float) -> None:
    """Returns when every application runs and those that were removed are gone.

    Raises:
        DeployError: one cannot run, with what it says, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    gone = {change.app for change in changes if change.kind is Kind.REMOVED}
    expected = [change.app for change in changes if change.kind is not Kind.REMOVED]
    while True:
        apps = cluster.get_serve_details()["applications"]
        states = {name: apps[name]["status"] if name in apps else "NOT_STARTED" for name in expected}
        failed = {name: apps[name] for name, state in states.items() if state == "DEPLOY_FAILED"}
        if failed:
            raise DeployError("\n".join(f"{name}: {message_of(app)}" for name, app in failed.items()))
        late = [f"{name} {state.lower()}" for name, state in states.items() if state != "RUNNING"]
        late += [f"{name} deleting" for name in gone if name in apps]
        if not late:
            return
        progress.phase(", ".join(late))
        if time.monotonic() > deadline:
            waiting = "; ".join(f"{name}: {message_of(apps[name])}" for name in expected if name in apps)
            raise DeployError(f"not ready after {timeout_s:.0f} s (--startup-timeout-s): {waiting}")
        time.sleep(POLL_S)


def await_endpoint(host: str, port: int, progress: Progress, *, timeout_s: float) -> None:
    """Returns when `/ready` answers 200, or says that it cannot be seen from here.

    Raises:
        DeployError: it is there and does not become ready.
    """
    deadline = time.monotonic() + timeout_s
    progress.phase("waiting for the endpoint")
    while (status := status_of(host, port, "/ready")) != 200:
        if status == 0:
            progress.note(f"The applications run; whether http://{host}:{port}/ready is 200 cannot be seen from here.")
            return
        if time.monotonic() > deadline:
            raise DeployError(f"http://{host}:{port}/ready still answers {status} after {timeout_s:.0f} s")
        time.sleep(POLL_S)
    progress.note(f"Ready: http://{host}:{port}/v1")


def message_of(app: Mapping[str, Any]) -> str:
    """Why an application does not run, in Serve's words or, where there is one, by the error of ours in them."""
    told = [deployment.get("message") for deployment in app.get("deployments", {}).values()] + [app.get("message")]
    text = "\n".join(dict.fromkeys(filter(None, told)))
    ours = re.findall(r"shoal\.runtime\.errors\.\w+: (.+)", text)
    return ours[-1] if ours else text or str(app.get("status"))


def _is_ours(app: str) -> bool:
    return app == INGRESS_APP or app.startswith(INGRESS_APP + "-")


def _code(app: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Serve takes for an application's code: when it changes, replicas are replaced."""
    policy = (_deployment(app).get("autoscaling_config") or {}).get("policy")
    return {**(app.get("args") or {}), "autoscaling policy": policy}


def _deployment(app: Mapping[str, Any]) -> Mapping[str, Any]:
    deployments = app.get("deployments") or [{}]
    first: Mapping[str, Any] = deployments[0]
    return first


def _differences(before: Mapping[str, Any] | None, after: Mapping[str, Any], path: str = "") -> list[str]:
    """`num_replicas 1 -> 2`: the keys whose values differ, and where they are short, the values."""
    before = before or {}
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{path}{key}.")
        elif isinstance(old, Mapping | list) or isinstance(new, Mapping | list):
            found.append(f"{path}{key}")
        else:
            found.append(f"{path}{key} {'unset' if old is None else old} -> {'unset' if new is None else new}")
    return found
