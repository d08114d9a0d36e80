"""The wires of whole groups: plans down, hidden states along the stages, results back; and nothing stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from shoal.parallel.grid import Grid
from shoal.parallel.wiring import WireSizes, Wiring, lay_wires

from .wire_group import LOOPBACK, running, wires_of

SHM = Path("/dev/shm")


def left_of(wires):
    return list(SHM.glob(f"{wires.wiring.segment}*"))


@pytest.mark.parametrize(
    ("grid", "nodes"),
    [
        (Grid(1, 1), []),
        (Grid(2, 2), []),
        (Grid(1, 3), ["here", "here", "there"]),
        (Grid(2, 2), ["there", "there", "here", "here"]),
        (Grid(2, 1), ["there", "there"]),
    ],
    ids=["alone", "one node", "answers from afar", "first stage afar", "driver apart"],
)
def test_messages_are_the_same_everywhere_and_come_in_order(grid, nodes):
    plans = [bytes([i]) * (1 + i * 997) for i in range(40)] + [bytes([7]) * 3_000_000]
    with wires_of(grid, nodes, sizes=WireSizes(max_plan_bytes=4096)) as wires, running(wires, "echo") as ranks:
        assert not left_of(wires)
        for plan in plans:
            wires.send(plan)
            assert wires.receive(30) == plan
        assert wires.receive(0.01) is None
        wires.send(b"")
        assert len(set(ranks.reports())) == 1


@pytest.mark.parametrize("nodes", [[], ["here", "here", "there", "there"]], ids=["one node", "two nodes"])
def test_hidden_states_and_tokens_go_round_the_ring(nodes):
    rows = [1, 2, 5000, 1, 300]
    sizes = WireSizes(max_hidden_bytes=100_000)  # less than the largest message
    with wires_of(Grid(2, 2), nodes, sizes=sizes) as wires, running(wires, "relay") as ranks:
        for count in rows:  # more on their way than the line holds
            wires.send(str(count).encode())
        assert [wires.receive(30) for _ in rows] == [str(3 * 64 * count).encode() for count in rows]
        wires.send(b"")
        assert ranks.reports() == [[[3] * count for count in rows]] * 2 + [[]] * 2


def test_everybody_may_send_before_anybody_receives():
    with wires_of(Grid(1, 3)) as wires, running(wires, "rush") as ranks:
        assert ranks.reports() == [[200, 201, 202, 203], [0, 1, 2, 3], [100, 101, 102, 103]]


@pytest.mark.parametrize("program", ["starved", "stuffed"])
def test_a_neighbour_that_does_not_come_is_named(program):
    with wires_of(Grid(1, 2), deadline_s=0.5) as wires, running(wires, program) as ranks:
        report = ranks.report(1 if program == "starved" else 0)
    assert report["peer"] == (0 if program == "starved" else 1)


def test_waiting_ranks_burn_nothing():
    with wires_of(Grid(2, 1)) as wires, running(wires, "idle") as ranks:
        assert wires.receive(1.0) is None
        wires.send(b"plan")
        assert max(ranks.reports()) < 0.2


def test_closing_early_leaves_nothing():
    wires = lay_wires(
        Grid(2, 1), ["a", "a"], driver_node="a", address=LOOPBACK, device="cpu", sizes=WireSizes(), deadline_s=5.0
    )
    assert left_of(wires)
    wires.close()
    wires.close()
    assert not left_of(wires)
    assert wires.wiring.segment not in Path("/proc/self/maps").read_text()


def test_several_nodes_need_addresses():
    with pytest.raises(ValueError, match="addresses"):
        lay_wires(
            Grid(2, 1), ["a", "b"], driver_node="a", address=LOOPBACK, device="cpu", sizes=WireSizes(), deadline_s=5.0
        )


def test_wiring_travels_as_msgpack():
    with wires_of(Grid(2, 2), ["here", "here", "there", "there"]) as wires:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(wires.wiring), type=Wiring) == wires.wiring


def test_nothing_is_left_when_everybody_is_killed():
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from wire_group import running, wires_of
        from shoal.parallel.grid import Grid

        nodes = ["here", "here", "there", "there"]
        with wires_of(Grid(2, 2), nodes) as wires, running(wires, "echo") as ranks:
            print(wires.wiring.segment, *ranks.pids, flush=True)
            sys.stdin.read()
    """)
    driver = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    segment, *pids = driver.stdout.readline().split()
    driver.kill()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    driver.communicate()
    assert len(pids) == 4
    assert not list(SHM.glob(f"{segment}*"))
