"""Collectives in shared memory, between processes: right to the last bit, and an absent shard is named."""

import pytest

from shoal.parallel.grid import Grid

from .wire_group import running, wires_of


@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_on_every_dtype_and_shape(size):
    with wires_of(Grid(size, 1)) as wires, running(wires, "collectives") as ranks:
        assert ranks.reports() == [[]] * size


def test_a_shard_that_does_not_come_is_named():
    with wires_of(Grid(2, 1), deadline_s=0.5) as wires, running(wires, "sleepy") as ranks:
        report = ranks.report(1)
    assert report["peer"] == 0
    assert report["message"] == "all_reduce: rank 0 did not come within 0.5 s"
    assert report["seconds"] >= 0.5
