"""The pipeline axis: what a rank hands to its neighbours in the ring of stages."""

from typing import Protocol

import torch
from torch import Tensor


class Ring(Protocol):
    """A rank's place in the ring: it sends to the same shard of the next stage and receives from the one before.

    The last stage's next is the first. Tensors arrive in the order they were sent; both sides know from the plan what
    comes, so shape and dtype are not sent.
    """

    def send(self, x: Tensor) -> None:
        """Hand `x` to the next stage. May return before it arrived; what is done to x afterwards changes nothing.

        Waits only while more is on its way than the line holds, and raises once that wait passes its deadline.
        """
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor from the stage before, fresh and contiguous. Raises if it does not come in time."""
        ...
