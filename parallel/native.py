"""Weights in the form of our own CPU kernels (`kernels/csrc/`), where those can be built."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.native import STEP, TILE_ROWS, Native, pack_b16, pack_q4, pack_q8
from .codes import UNIT, Codes

_PACKED_ROWS = 1 << 10  # at a time, while loading: whole tiles


class NativeInt4Linear:
    """A `LinearMethod` in bfloat16 with the codes' very weights: of all numbers only the result is rounded.

    One kernel for any number of rows of x, and each of them gets the same sums in any company.
    """

    bits = 4

    def __init__(self, native: Native, codes: Codes) -> None:
        """codes: 4 bits. Their scales become float16, as they are in most files."""
        self._native = native
        self.out_features, self.in_features = codes.codes_FD.shape
        self.packed = torch.cat([_packed_q4(part.regrouped(UNIT)) for part in _parts(codes)])

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        return self._native.q4_product(x_TD, self.packed, self.out_features)

    def num_bytes(self) -> int:
        return self.packed.nbytes


class NativeInt8Linear:
    """The same of 8 bits, scales and minima in float32. A group of codes is any multiple of its unit."""

    bits = 8

    def __init__(self, native: Native, codes: Codes) -> None:
        self._native = native
        self.out_features, self.in_features = codes.codes_FD.shape
        self.packed = torch.cat([_packed_q8(part) for part in _parts(codes)])

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        return self._native.q8_product(x_TD, self.packed, self.out_features)

    def num_bytes(self) -> int:
        return self.packed.nbytes


class NativeDenseLinear:
    """The same of weights in bfloat16, in as much memory as they take."""

    bits = 16

    def __init__(self, native: Native, weight_FD: Tensor) -> None:
        self._native = native
        self.out_features, self.in_features = weight_FD.shape
        self.packed = pack_b16(weight_FD)

    @staticmethod
    def fits(weight_FD: Tensor) -> bool:
        """Whether there is a kernel for it."""
        rows, columns = weight_FD.shape
        return weight_FD.dtype is torch.bfloat16 and rows % TILE_ROWS == 0 and columns % STEP == 0

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        return self._native.b16_product(x_TD, self.packed, self.out_features)

    def num_bytes(self) -> int:
        return self.packed.nbytes


def fits_q4(codes: Codes) -> bool:
    """Whether float16 holds the scales: they may be too large for it, or nearly all too small."""
    return all(_fits_half(numbers) for numbers in (codes.scale_FG, _minima(codes)))


def _fits_half(numbers: Tensor) -> bool:
    rounded = numbers.half().float()
    return bool(rounded.isfinite().all()) and bool((rounded - numbers).norm() <= 1e-3 * numbers.norm())


def _minima(codes: Codes) -> Tensor:
    """What a code of 0 stands for: [F, G]. In GGUF's own blocks it is a float16, found again when it is rounded."""
    return torch.zeros_like(codes.scale_FG) if codes.zero_FG is None else -codes.zero_FG * codes.scale_FG


def _parts(codes: Codes) -> Iterator[Codes]:
    return (codes.rows(slice(at, at + _PACKED_ROWS)) for at in range(0, codes.out_features, _PACKED_ROWS))


def _packed_q4(codes: Codes) -> Tensor:
    return pack_q4(*(_whole_tiles(part) for part in (codes.codes_FD, codes.scale_FG, _minima(codes))))


def _packed_q8(codes: Codes) -> Tensor:
    minimum_FG = None if codes.zero_FG is None else _whole_tiles(_minima(codes))
    return pack_q8(_whole_tiles(codes.codes_FD), _whole_tiles(codes.scale_FG), minimum_FG)


def _whole_tiles(rows: Tensor) -> Tensor:
    """With rows of zeros below, whose products are never stored."""
    return F.pad(rows, (0, 0, 0, -len(rows) % TILE_ROWS))
