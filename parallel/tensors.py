"""What every wire does with tensors: their bytes, and sums of what the shards gave, the same wherever it comes from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operation = Callable[..., Tensor]  # torch.add or torch.maximum: (a, b), and (a, b, out=)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are kept in: float32 for 16-bit floats."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def fold(operation: Operation, parts: Sequence[Tensor], *, out: Tensor) -> Tensor:
    """The parts (two or more) one after the other, in order; rounded to out's dtype once, at the end."""
    total = parts[0].to(wide(parts[0].dtype))
    for part in parts[1:-1]:
        total = operation(total, part)
    return operation(total, parts[-1], out=out)


def as_bytes(x: Tensor) -> Tensor:
    """The memory of x, which must be contiguous: uint8, flat.

    Not by `view(-1)`: a dimension of length 1 may have any stride, which a view as bytes refuses.
    """
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)
