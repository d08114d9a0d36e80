"""8-bit weights with a scale for each row, in torch on a CPU: what serves where our own kernel cannot be built."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import Codes

_int8_product = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]


class Int8Linear:
    """A `LinearMethod` in bfloat16, in which every int8 is exact: scales join after the sums."""

    # Rows of x from which converting the weights to bfloat16, piece by piece, pays.
    UNPACK_FROM = 16
    _UNPACKED_WEIGHTS = 1 << 20  # at a time: the scratch stays in the cache

    def __init__(self, codes: Codes, *, unpack_from: int | None = UNPACK_FROM) -> None:
        """codes: 8 bits, one group a row, no zeros. unpack_from: rows of x, None: never."""
        self._unpack_from = unpack_from
        self.out_features, self.in_features = codes.codes_FD.shape
        self._codes_FD = codes.codes_FD.contiguous()
        self._scale_F = codes.scale_FG[:, 0].contiguous()
        self._ones_F = torch.ones(self.out_features, dtype=torch.bfloat16)

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.contiguous()
        if self._unpack_from is None or x_TD.shape[0] < self._unpack_from:
            # Its own scales would have to be bfloat16's.
            sums_TF = _int8_product(x_TD, self._codes_FD, self._ones_F)
        else:
            step = max(self._UNPACKED_WEIGHTS // self.in_features, 1)
            pieces = (self._codes_FD[start : start + step] for start in range(0, self.out_features, step))
            sums_TF = torch.cat([F.linear(x_TD, piece.to(x_TD.dtype)) for piece in pieces], 1)
        return sums_TF.mul_(self._scale_F)

    def num_bytes(self) -> int:
        return self._codes_FD.nbytes + self._scale_F.nbytes + self._ones_F.nbytes
