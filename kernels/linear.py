"""The product of a layer, as devices without a reason of their own compute it, and what all of them look like."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """`x @ W.T`: [T, D] by [F, D] -> [T, F] in `dtype` (default: x's), sums in float32. x has the weight's dtype."""

    def __call__(self, x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor: ...


def linear(x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor:
    """torch's own choice of kernel, which depends on how many rows there are, and with it the order of the sums.

    16-bit inputs with a float32 result: on GPUs only.
    """
    if dtype is None or dtype is x_TD.dtype:
        return F.linear(x_TD, weight_FD)
    return torch.mm(x_TD, weight_FD.t(), out_dtype=dtype)
