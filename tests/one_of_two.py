"""A rank of two without the other one."""

import torch
from torch import Tensor


class OneOfTwo:
    """A shard's `Comm`; the other one has the same sums."""

    size = 2

    def __init__(self, shard: int) -> None:
        self.shard = shard

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])
