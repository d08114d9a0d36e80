"""`shoal serve`: Ray and Serve on this machine, our app on them, and all of it down again without a trace.

Everything that an operator can get wrong is refused before Ray starts. Then each step shows its phase until `/ready`
answers 200.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels.native_build import UnavailableError, build_library
from ..runtime.errors import StartupError
from .board import Board
from .config import EMBEDDED, NO_REDIS, ShoalConfig, is_loopback
from .parts import parts
from .preflight import free_port
from .processes import Stop, adopting_orphans, ignore_signals, raise_on_signals
from .progress import Progress
from .ray_env import leave_out_daemons, ray_environment
from .redis_server import embedded_redis
from .secret import cluster_secret, default_file, redis_password_in, with_secrets
from .serve_config import INGRESS_APP, serve_config

if TYPE_CHECKING:
    from ray import serve

POLL_S = 0.05
STATUS_POLL_S = 1.0  # Serve's status costs 30 ms, of cores that the replica wants for its start
OBJECT_STORE_BYTES = 100 * 2**20  # tokens and frames pass through it, never weights
WATCH_S = 1.0
SERVE_STOP_S = 30.0


def serve_forever(config: ShoalConfig) -> int:
    """Serve until SIGINT or SIGTERM; the exit code: 0 after a clean end, 1 if the service was lost."""
    with Progress() as progress, running(config, progress) as url:
        announce(config, url)
        return wait_for_end(url)
    return 0  # a signal ended the block


@contextmanager
def running(config: ShoalConfig, progress: Progress) -> Iterator[str]:
    """The service, ready, and its URL; on exit nothing of it is left. `Stop` ends the block quietly.

    config: one that `preflight.HERE` finds nothing in.

    Raises:
        ConfigError: refused before anything starts. StartupError: it did not become ready. Stop: a signal came before.
    """
    config = on_this_machine(config)
    port = free_port(config.server.host, config.server.port)
    if config.engine.device != "cuda":
        compile_ahead()
    run_dir = Path(tempfile.mkdtemp(prefix="shoal-"))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    ready = False
    try:
        with adopting_orphans(), with_redis(config, run_dir, progress) as config:
            try:
                raise_on_signals()
                progress.phase("starting Ray")
                start_ray(config, run_dir)
                raise_on_signals()
                board = Board(run_dir / "board")
                url = deploy(config, port=port, board=board, progress=progress)
                progress.close()
                ready = True
                yield url
            finally:
                ignore_signals()
                progress.phase("stopping")
                stop_ray(config)
    except Stop:
        if not ready:
            raise
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        shutil.rmtree(run_dir, ignore_errors=True)


def compile_ahead() -> None:
    """Begin what a CPU's replicas wait for at a machine's first start, while Ray comes up."""

    def compile_kernels() -> None:
        with suppress(UnavailableError):  # the replica says so
            build_library()

    threading.Thread(target=compile_kernels, name="shoal-compile", daemon=True).start()


def on_this_machine(config: ShoalConfig) -> ShoalConfig:
    """The config with all that its files hold, and what only a cluster can leave open. Raises ConfigError."""
    router, server = config.router, config.server
    if router.secret is None and router.secret_file is None:
        router = router.model_copy(update={"secret": cluster_secret(default_file())})
    template = router.chat_template
    router = with_secrets(router).model_copy(
        update={
            "secret_file": None,
            "api_key_file": None,
            "served_model_name": parts(config)[0].names,
            "chat_template": template and template.expanduser().absolute(),  # actors have other folders
        }
    )
    password = server.redis_password_file
    if password is not None:
        redis_password_in(password)
    server = server.model_copy(
        update={
            "redis_password_file": password and password.expanduser().absolute(),
            # The whole service ends at once: nobody is there to take anything over.
            "drain_timeout_s": server.shutdown_timeout_s,
            "ingress_drain_timeout_s": server.shutdown_timeout_s,
        }
    )
    return config.model_copy(update={"router": router, "server": server})


@contextmanager
def with_redis(config: ShoalConfig, run_dir: Path, progress: Progress) -> Iterator[ShoalConfig]:
    """Within: the config with the URL of a Redis that runs, our own where it says so; `none` where there is none."""
    with ExitStack() as stack:
        if config.server.redis_url == EMBEDDED:
            try:
                url = stack.enter_context(embedded_redis(run_dir / "redis"))
            except StartupError as problem:
                progress.note(f"Answers will not be cached: {problem}")
                url = NO_REDIS
            server = config.server.model_copy(update={"redis_url": url})
            config = config.model_copy(update={"server": server})
        yield config


def start_ray(config: ShoalConfig, run_dir: Path) -> None:
    """A Ray of our own on loopback, with a token; nothing of an already running one is touched."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(ray_environment(run_dir, haproxy=config.server.haproxy))
    import ray

    from .ray_launcher import cpus_needed

    leave_out_daemons()
    ray.init(
        address="local",
        # Cores are shared out by threads: what actors ask for must never be what keeps them waiting.
        num_cpus=max(os.cpu_count() or 1, sum(cpus_needed(p.most_replicas, p.engine.grid) for p in parts(config))),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        configure_logging=False,
        log_to_driver=False,
        namespace=INGRESS_APP,
    )


def share_cores(config: ShoalConfig) -> ShoalConfig:
    """The config with the threads of a rank where it does not say: all replicas are on this one machine."""
    engine = config.engine
    if engine.device != "cpu" or engine.num_threads is not None:
        return config
    num_ranks = sum(part.most_replicas * part.engine.grid.size for part in parts(config))
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    return config.model_copy(update={"engine": engine.model_copy(update={"num_threads": threads})})


def deploy(config: ShoalConfig, *, port: int, board: Board, progress: Progress) -> str:
    """Serve with our app on it; returns the URL once `/ready` is 200."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # Serve sets it to INFO when it is imported
    progress.phase("starting Ray Serve")
    starting = start_serve(config.server.host, port)
    from .app import on_device

    await_controller(starting)
    config = share_cores(on_device(config, num_gpus=ray.cluster_resources().get("GPU", 0.0)))
    targets = run_targets(config, board)
    progress.phase("starting the replica")
    with board.follow(progress):
        serve.run_many(targets, wait_for_applications_running=False)
        starting.result()
        await_ready(config, port=port, board=board)
    return url_of(config.server.host, port)


def run_targets(config: ShoalConfig, board: Board) -> list[serve.RunTarget]:
    """The applications of the declarative config, built in this process: a cluster's would cost a second each."""
    from ray import serve

    from .app import application

    targets = []
    for entry in serve_config(config)["applications"]:
        (options,) = entry["deployments"]
        args = {**entry["args"], "board": board.file}
        if "part" not in args:
            args["is_alone"] = config.server.ingresses == 1
        app = application(args, **options)
        targets.append(serve.RunTarget(app, name=entry["name"], route_prefix=entry["route_prefix"]))
    return targets


def start_serve(host: str, port: int) -> Future[None]:
    """Serve's controller and its proxies, which are there when the future is done."""
    from ray import serve

    done: Future[None] = Future()

    def start() -> None:
        try:
            serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        except Exception as error:  # noqa: BLE001 (it is raised where the result is asked for)
            done.set_exception(StartupError(f"Ray Serve's proxy did not start: {error}"))
        else:
            done.set_result(None)

    threading.Thread(target=start, name="shoal-serve", daemon=True).start()
    return done


def await_controller(starting: Future[None]) -> None:
    """Returns when Serve can be told what to deploy: replicas need no proxy, they load their weights meanwhile."""
    import ray

    while not starting.done():
        with suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            return
        time.sleep(POLL_S)


def await_ready(config: ShoalConfig, *, port: int, board: Board) -> None:
    """Returns when `/ready` answers 200.

    Raises:
        StartupError: the replica refused to start, or the time is over.
    """
    host = local_host(config.server.host)
    deadline = time.monotonic() + config.server.startup_timeout_s
    next_look = time.monotonic() + STATUS_POLL_S
    # Any of the ingresses answers: so many times in a row, and all of them have.
    num_answers, enough = 0, 1 if config.server.ingresses == 1 else 3 * config.server.ingresses
    while num_answers < enough:
        if status_of(host, port, "/ready") == 200:
            num_answers += 1
            continue
        num_answers = 0
        failure = board.refusal
        if not failure and (now := time.monotonic()) > next_look:
            failure, next_look = deploy_failure(), now + STATUS_POLL_S
        if failure:
            raise StartupError(failure)
        if time.monotonic() > deadline:
            limit = config.server.startup_timeout_s
            raise StartupError(f"not ready after {limit:.0f} s (--startup-timeout-s); Ray's logs are in {log_dir()}")
        time.sleep(POLL_S)


def deploy_failure() -> str:
    """Why Serve gave an application up; empty while it has not."""
    from ray import serve

    for app in serve.status().applications.values():
        if app.status == "DEPLOY_FAILED":
            details = [d.message for d in app.deployments.values() if d.message] or [app.message]
            return "\n".join([*details, f"Ray's logs are in {log_dir()}"])
    return ""


def status_of(host: str, port: int, path: str) -> int:
    """The HTTP status there, 0 where nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def wait_for_end(url: str) -> int:
    """Blocks until a signal raises `Stop`, or the daemons are gone (1)."""
    import ray

    while ray.is_initialized():
        time.sleep(WATCH_S)
    print(f"shoal: Ray is gone, {url} is down", file=sys.stderr)
    return 1


def stop_ray(config: ShoalConfig) -> None:
    """Drain and stop the app, the proxies and Ray; what is left is the caller's to end."""
    if "ray" not in sys.modules:
        return
    import ray

    if ray.is_initialized():
        # Serve's controller is killed by design, which Ray prints as a failure; Serve forgets to await its own routers,
        # and warns that it does.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            _within(config.server.shutdown_timeout_s + 5, drain, config.server.shutdown_timeout_s)
            _within(SERVE_STOP_S, _stop_serve)
            ray.shutdown()


def drain(timeout_s: float) -> None:
    """The ingresses take nothing new, and what runs ends by itself or with a terminal event at the deadline."""
    from ray import serve

    async def ask() -> None:  # handles want a running loop when Serve is set for throughput
        handle = serve.get_app_handle(INGRESS_APP)
        await handle.check_health.remote()  # a new handle knows of no replica before its first call
        await handle.broadcast("drain", timeout_s).results_async(timeout_s=timeout_s + 1, return_exceptions=True)
        await handle.shutdown_async()

    asyncio.run(ask())


def _stop_serve() -> None:
    from ray import serve

    serve.shutdown()


def _within(timeout_s: float, step: Callable[..., None], *args: float) -> None:
    """Run a step of the shutdown; if it fails or hangs the next one comes all the same.

    Also if Ray's daemons are gone, as after a signal to the whole process group: then nobody will ever answer.
    """

    def attempt() -> None:
        with suppress(Exception):
            step(*args)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline and has_daemons():
        thread.join(POLL_S)


def has_daemons() -> bool:
    """Whether the Ray that we have started is all there."""
    from ray._private.worker import _global_node

    return _global_node is not None and not _global_node.dead_processes()


def announce(config: ShoalConfig, url: str) -> None:
    """Where it listens, and who may come in."""
    names = ", ".join(name for part in parts(config) if not part.is_variant for name in part.names)
    print(f"Serving {names} at {url}/v1", flush=True)
    if not config.router.has_keys:
        reach = "only this machine can reach it" if is_loopback(config.server.host) else "ANYONE can use it"
        print(f"No API key is set: {reach}.", flush=True)


def url_of(host: str, port: int) -> str:
    """The address to write down for clients on this machine."""
    host = local_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def local_host(host: str) -> str:
    """Where this machine reaches a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def log_dir() -> str:
    """The running session's logs."""
    from ray._private.worker import _global_node

    return str(_global_node.get_logs_dir_path()) if _global_node else "/tmp/ray/session_latest/logs"
