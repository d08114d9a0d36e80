"""Machines for tests: two hosts of namespaces, joined by a cable that can be pulled. Needs root, `unshare` and `ip`.

A host has a network, process numbers, a name, /dev/shm and a folder or more of its own; the rest of the files are this
machine's. Its first process waits for the end of its standard input, so that with whoever made it all of it ends, and
the kernel takes network and mounts away: nothing is left, however a test ends.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CABLE = "eth0"
FOLDER = "/media"  # empty, in memory, the host's own
_NAMESPACES = ("--mount", "--uts", "--net", "--pid")
# A shell as the first process also reaps orphans. The word says that the namespaces are there, and their mounts.
_FIRST = f"""
for folder in /dev/shm {FOLDER} "$@"; do mount -t tmpfs tmpfs "$folder" || exit; done
hostname "$0" && ip link set lo up && echo made
cat > /dev/null
exit
"""


class Host:
    """One machine. Use `two_hosts`."""

    def __init__(self, name: str, address: str, ends: ExitStack, *, folders: Sequence[str] = ()) -> None:
        """address: with its prefix length. folders: empty at first, in memory, its own.

        Raises OSError where this machine does not let namespaces be made.
        """
        self.address = address.partition("/")[0]
        command = [
            "unshare",
            *_NAMESPACES,
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            _FIRST,
            name,
            *folders,
        ]
        pipe = subprocess.PIPE
        process = ends.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        ends.callback(process.stdin.close)
        if process.stdout.readline() != "made\n":
            process.stdin.close()
            raise OSError(f"no namespaces: {process.stderr.read().strip()}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self.first = int(children[0])

    def plug_in(self) -> None:
        self.run("ip", "link", "set", CABLE, "up")

    def unplug(self) -> None:
        """Packets vanish from now on, both ways; nobody is told, neither here nor there."""
        self.run("ip", "link", "set", CABLE, "down")

    def popen(self, *command: str | os.PathLike[str], **options: Any) -> "subprocess.Popen[str]":
        """A program on this host. Its options are those of `subprocess.Popen`."""
        return subprocess.Popen(["nsenter", "--target", str(self.first), *_NAMESPACES, *command], text=True, **options)

    def run(self, *command: str | os.PathLike[str], env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
        """The same, to its end: what it printed. Raises OSError with what it complained of."""
        with self.popen(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            finally:
                process.kill()
        if process.returncode:
            raise OSError(f"{command[0]} ended with {process.returncode}: {(err or out)[-2000:]}")
        return out


@contextmanager
def two_hosts(
    first: str = "10.77.0.1/24", second: str = "10.77.0.2/24", *, folders: Sequence[str] = ()
) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else. Raises OSError where there is no root, or no namespaces."""
    with ExitStack() as ends:
        one, two = Host("one", first, ends, folders=folders), Host("two", second, ends, folders=folders)
        ends_of_cable = [CABLE, "netns", str(one.first), "type", "veth", "peer", "name", CABLE, "netns", str(two.first)]
        cable = subprocess.run(["ip", "link", "add", *ends_of_cable], stderr=subprocess.PIPE, text=True, check=False)
        if cable.returncode:
            raise OSError(f"no cable: {cable.stderr.strip()}")
        for host, address in ((one, first), (two, second)):
            host.run("ip", "address", "add", address, "dev", CABLE)
            host.plug_in()
        yield one, two
