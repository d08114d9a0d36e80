"""A vocabulary in 8 bits for our own CPU kernels: the head, and the embedding table where the two are tied."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.native import TILE_ROWS, Native, pack_q8, q8_rows
from .codes import Codes, Kind

_PACKED_ROWS = 1 << 12  # at a time, while loading: whole tiles


class NativeHead:
    """Reads a byte a weight where float16 panels read two: half the time for few rows, and no weight is rounded.

    Inputs and sums are float32, and each row of x gets the same sums in any company.
    """

    def __init__(self, native: Native, codes: Codes) -> None:
        """codes: such that `fits`."""
        self._native = native
        self.out_features, self.in_features = codes.out_features, codes.in_features
        starts = range(0, codes.out_features, _PACKED_ROWS)
        self._packed = torch.cat([_packed(codes.rows(slice(start, start + _PACKED_ROWS))) for start in starts])

    @staticmethod
    def fits(codes: Codes) -> bool:
        """Whether they have 8 bits, no zeros, their own order, and groups of whole units."""
        plain = codes.zero_FG is None and codes.order_D is None
        return codes.kind is Kind.INT8 and plain and codes.group % codes.unit == 0

    def logits(self, x_RD: Tensor) -> Tensor:
        """Float32 [R, D] -> [R, V]."""
        return self._native.q8_logits(x_RD.contiguous(), self._packed, self.out_features)

    def lookup(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids, float32 [T, D]."""
        return q8_rows(self._packed, ids_T)

    def num_bytes(self) -> int:
        return self._packed.nbytes


def _packed(codes: Codes) -> Tensor:
    padding = (0, 0, 0, -codes.out_features % TILE_ROWS)  # by rows of zeros, which are never read
    return pack_q8(F.pad(codes.codes_FD, padding), F.pad(codes.scale_FG, padding))
