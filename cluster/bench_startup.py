"""`shoal bench startup`: a server is started as an operator would, watched from outside through HTTP, and ended."""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import msgspec

from ..runtime.errors import EngineError
from .bench_report import write_json
from .client import Client
from .config import ShoalConfig, flag_of, load_config
from .offline import Overrides
from .preflight import free_port
from .progress import Progress
from .serve import local_host, status_of, url_of
from .table import table_lines

POLL_S = 0.02
SPARE_S = 60.0  # beyond the server's own limits
STAGE = re.compile(r"\[ *(?P<at>[\d.]+) s\] (?P<name>[^:\d]*\w)")
KEPT_LINES = 20


@dataclass(slots=True)
class Start:
    """One start. Seconds from the command; stop_s: from SIGTERM to the end of the process.

    stages: as the server names them, and how long each went on: a line of its progress begins one.
    """

    health_s: float = 0.0
    ready_s: float = 0.0
    first_token_s: float = 0.0
    stop_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


def bench_startup(model: str | None, overrides: Overrides, *, runs: int, json_file: Path | None) -> None:
    """Start `shoal serve` so many times; prints a table.

    Raises:
        ConfigError: a flag is refused. EngineError: the server did not come up.
    """
    from .demo import need_demo_model

    name = model or str(need_demo_model())
    config = load_config({**overrides, ("engine", "model"): name})
    starts = []
    with Progress() as progress:
        for number in range(runs):
            progress.phase(f"start {number + 1} of {runs}")
            starts.append(_start(name, overrides, config))
    print("\n".join(startup_lines(starts)))
    if json_file is not None:
        write_json(
            json_file, "startup", {"config": config.model_dump(mode="json"), "starts": msgspec.to_builtins(starts)}
        )


def startup_lines(starts: Sequence[Start]) -> list[str]:
    """For people: a column a start, and their median."""
    marks: list[tuple[str, Callable[[Start], float]]] = [
        ("/health 200", lambda start: start.health_s),
        ("/ready 200", lambda start: start.ready_s),
        ("first token", lambda start: start.first_token_s),
        ("SIGTERM to exit", lambda start: start.stop_s),
    ]
    rows = [_row(name, [value(start) for start in starts]) for name, value in marks]
    stages = list(dict.fromkeys(name for start in starts for name in start.stages))
    rows += [_row(f"  {name}", [start.stages.get(name, 0.0) for start in starts]) for name in stages]
    head = ("seconds", *(f"start {number + 1}" for number in range(len(starts))), "median")
    return table_lines(head, rows)


def _row(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    return name, *(f"{value:.2f}" for value in seconds), f"{statistics.median(seconds):.2f}"


def serve_command(model: str, overrides: Overrides, port: int) -> list[str]:
    """`shoal serve` with these flags, by the interpreter that runs this."""
    command = [sys.executable, "-P", "-c", "from shoal.cluster.cli import main; main()", "serve", model]
    for (_, name), value in overrides.items():
        if name != "port":
            command += _flag(flag_of(name), value)
    return [*command, "--port", str(port)]


def _flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (flag, str(one))]


def _start(model: str, overrides: Overrides, config: ShoalConfig) -> Start:
    """Raises EngineError: not ready in time, or ended by itself."""
    server = config.server
    port = free_port(server.host, server.port)
    start = Start()
    command = serve_command(model, overrides, port)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = _Said(process.stderr)
    try:
        deadline = begin + server.startup_timeout_s + SPARE_S
        host = local_host(server.host)
        start.health_s = _await_200(process, said, host, port=port, path="/health", deadline=deadline) - begin
        start.ready_s = _await_200(process, said, host, port=port, path="/ready", deadline=deadline) - begin
        _await_token(url_of(server.host, port))
        start.first_token_s = time.perf_counter() - begin
        start.stages = said.stages(start.ready_s)
        term = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(server.shutdown_timeout_s + SPARE_S)
        start.stop_s = time.perf_counter() - term
    except subprocess.TimeoutExpired:
        limit = server.shutdown_timeout_s
        raise EngineError(f"shoal serve did not end {SPARE_S:g} s after its --shutdown-timeout-s {limit:g}") from None
    finally:
        _end(process)
    return start


def _await_200(
    process: subprocess.Popen[str], said: _Said, host: str, *, port: int, path: str, deadline: float
) -> float:
    """The moment."""
    while status_of(host, port, path) != 200:
        if process.poll() is not None:
            raise EngineError(f"shoal serve ended with {process.returncode} before {path} was 200: {said.end()}")
        if time.perf_counter() > deadline:
            raise EngineError(f"{path} was not 200 in time (--startup-timeout-s): {said.end()}")
        time.sleep(POLL_S)
    return time.perf_counter()


def _await_token(url: str) -> None:
    client = Client(url)
    body = {"model": client.first_model(), "prompt": "The sea is", "max_tokens": 1, "ignore_eos": True}
    for _ in client.stream("/v1/completions", body):
        pass


def _end(process: subprocess.Popen[str]) -> None:
    """Also where we are interrupted: by the signal that it cleans up on, then by the other."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SPARE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Said:
    """What a server writes to stderr, read by a thread so that it never waits for us."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._begun: list[tuple[float, str]] = []  # stages: when, and their names
        self._stream = stream
        self._reader = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._reader.start()

    def stages(self, until_s: float) -> dict[str, float]:
        """Seconds of each; of one that came up again, all together."""
        found: dict[str, float] = {}
        begun = [*self._begun, (until_s, "")]
        for (at_s, name), (next_s, _) in pairwise(begun):
            found[name] = found.get(name, 0.0) + max(0.0, next_s - at_s)
        return found

    def end(self) -> str:
        """The last lines."""
        self._reader.join(1.0)
        return "\n".join(self._lines) or "it said nothing"

    def _read(self) -> None:
        for line in self._stream:
            self._lines.append(line.rstrip())
            if (stage := STAGE.match(line)) is not None:
                self._begun.append((float(stage["at"]), stage["name"]))
