"""Weight formats: how one linear layer's slice of the weights is held, and multiplied with.

A rank's slice is cut when it is read (`runtime/weights.py`), so a method here knows nothing of shards.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LinearMethod(Protocol):
    """`y = x @ W.T`, for a weight of [out_features, in_features] in some format. Biases are the layer's affair."""

    out_features: int
    in_features: int

    def apply(self, x_TD: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features], in x's dtype."""
        ...

    def num_bytes(self) -> int:
        """Memory the weight takes, scales included."""
        ...


class DenseLinear:
    """A weight in a float dtype, used as it is."""

    def __init__(self, weight_FD: Tensor) -> None:
        self.weight_FD = weight_FD
        self.out_features, self.in_features = weight_FD.shape

    def apply(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_FD)

    def num_bytes(self) -> int:
        return self.weight_FD.numel() * self.weight_FD.element_size()
