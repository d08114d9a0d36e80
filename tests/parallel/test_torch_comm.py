"""Both axes over torch.distributed, by gloo between pretended nodes: the same bits as in shared memory."""

import pytest

from shoal.parallel.grid import Grid

from .wire_group import running, wires_of


@pytest.mark.parametrize("nodes", [["here", "there"], ["here", "there", "there"]], ids=len)
def test_every_operation_on_every_dtype_and_shape(nodes):
    with wires_of(Grid(len(nodes), 1), nodes) as wires, running(wires, "collectives") as ranks:
        assert ranks.reports() == [[]] * len(nodes)


def test_a_shard_that_does_not_come_is_named():
    with wires_of(Grid(2, 1), ["here", "there"], deadline_s=1.0) as wires, running(wires, "sleepy") as ranks:
        report = ranks.report(1)
    assert report["peer"] == 0
    assert "all_reduce: rank 0 did not come in time" in report["message"]


@pytest.mark.parametrize("program", ["starved", "stuffed"])
def test_a_neighbour_that_does_not_come_is_named(program):
    with wires_of(Grid(1, 2), ["here", "there"], deadline_s=1.0) as wires, running(wires, program) as ranks:
        report = ranks.report(1 if program == "starved" else 0)
    assert report["peer"] == (0 if program == "starved" else 1)


def test_a_killed_neighbour_is_named():
    with wires_of(Grid(1, 2), ["here", "there"]) as wires, running(wires, "starved") as ranks:
        ranks.kill(0)
        assert ranks.report(1)["peer"] == 0


def test_everybody_may_send_before_anybody_receives():
    with wires_of(Grid(1, 3), ["here", "there", "elsewhere"]) as wires, running(wires, "rush") as ranks:
        assert ranks.reports() == [[200, 201, 202, 203], [0, 1, 2, 3], [100, 101, 102, 103]]
