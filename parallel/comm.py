"""The tensor-parallel axis: what a rank says to the others that share its layers."""

from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """The ranks of one tensor-parallel group. `shard` counts from 0 to `size - 1`.

    Every rank calls the same methods in the same order with tensors of equal shape. Every call has a deadline: a
    rank that does not come raises on all others.
    """

    shard: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns x. The order of the sum is the order of the shards."""
        ...

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place; returns x."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], by shard."""
        ...


class SoloComm:
    """A rank that holds its layers alone."""

    shard = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]
