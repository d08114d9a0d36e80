"""4-bit weights in the form of our own CPU kernel (`kernels/csrc/q4.cpp`), where that can be built."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.native import TILE_ROWS, Native, pack_q4

ReadBlocks = Callable[[NDArray[np.uint8]], tuple[Tensor, Tensor, Tensor]]
"""Rows of a file's blocks -> nibbles [F, D], scales and zero points [F, D / 32], w = (nibble - 8) * scale + zero."""


class NativeInt4Linear:
    """A `LinearMethod` in bfloat16 with the file's very weights: of all numbers only the result is rounded.

    One kernel for any number of rows of x, and each of them gets the same sums in any company.
    """

    _PACKED_ROWS = 1 << 10  # at a time, while loading: whole tiles

    def __init__(self, native: Native, read: ReadBlocks, rows: list[NDArray[np.uint8]], in_features: int) -> None:
        self._native = native
        self.in_features, self.out_features = in_features, sum(len(part) for part in rows)
        blocks = np.concatenate(rows) if len(rows) > 1 else rows[0]
        starts = range(0, self.out_features, self._PACKED_ROWS)
        self._packed = torch.cat([_packed(*read(blocks[start : start + self._PACKED_ROWS])) for start in starts])

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        return self._native.q4_product(x_TD, self._packed, self.out_features)

    def num_bytes(self) -> int:
        return self._packed.nbytes


def _packed(nibbles_FD: Tensor, scale_FG: Tensor, zero_FG: Tensor) -> Tensor:
    # The file's own minimum, which float16 holds; the zero point was made of it in float32.
    parts = nibbles_FD, scale_FG, zero_FG - 8 * scale_FG
    padding = (0, 0, 0, -len(nibbles_FD) % TILE_ROWS)  # by rows of zeros, which are never stored
    return pack_q4(*(F.pad(part, padding) for part in parts))
