"""4-bit weights in torch's packed form for CPUs: what serves where our own kernel (`native.py`) cannot be built."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import Codes

# Not by torch.ops.aten, whose look-up costs 2 us of a product's 20.
_int4_product = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """How torch packs nibbles on this CPU: [tiles, in_features, tile / 2] bytes, each with the weights of two rows.

    A tile's rows are all low nibbles, then all high ones (stack_dim 2), or they alternate (stack_dim 3).
    """

    tile: int
    stack_dim: int

    def unpack(self, packed: Tensor, in_features: int) -> Tensor:
        """The nibbles in order: uint8 [tiles, in_features, tile]."""
        pairs = packed.view(-1, in_features, self.tile // 2)
        return torch.stack((pairs & 15, pairs >> 4), self.stack_dim).view(-1, in_features, self.tile)


def pack_int4(nibbles_FD: Tensor) -> Tensor:
    """torch's own packing, of int32 nibbles."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_FD.contiguous(), 1)
    return packed


def probe_int4_layout(pack: Callable[[Tensor], Tensor] = pack_int4) -> Int4Layout | None:
    """Find the layout by packing matrices whose nibbles are the digits of each weight's own index.

    torch does not document it, and it differs between AVX-512, AVX2 and plain builds. None: one we cannot unpack.
    """
    rows, columns, digits = 128, 32, 3
    index = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    packed = [pack((index >> 4 * digit) & 15) for digit in range(digits)]
    for tile in (64, 32, 16):
        for stack_dim in (2, 3):
            layout = Int4Layout(tile, stack_dim)
            nibbles = [layout.unpack(part, columns).to(torch.int32) for part in packed]
            found = sum(part << 4 * digit for digit, part in enumerate(nibbles))
            if torch.equal(torch.as_tensor(found).transpose(1, 2).reshape(rows, columns), index):
                return layout
    return None


class Int4Linear:
    """4-bit `Codes` in torch's packed form: held once, multiplied in two ways.

    A weight is `(code - 8) * scale + shift`, with shift = (8 - zero) * scale. Both are rounded to bfloat16, and the
    products below round that sum to bfloat16 once, so both see the very same weights.
    """

    # Rows of x from which unpacking pays: the int4 product costs as much for each row, unpacking costs once.
    UNPACK_FROM = 80
    _GROUPS = (256, 128, 64, 32)  # that torch has a kernel for
    _UNPACKED_WEIGHTS = 1 << 20  # at a time: the scratch stays in the cache
    _PACKED_ROWS = 1 << 10  # at a time, while loading: a multiple of every tile

    def __init__(
        self,
        codes: Codes,
        layout: Int4Layout,
        *,
        unpack_from: int | None = UNPACK_FROM,
        pack: Callable[[Tensor], Tensor] = pack_int4,
    ) -> None:
        """unpack_from: rows of x from which the weight is unpacked; None: never."""
        self._unpack_from = unpack_from
        self._pack = pack
        self.out_features, self.in_features = codes.codes_FD.shape
        self.layout = layout
        self._group = next(group for group in self._GROUPS if codes.group % group == 0)
        padded = -(-self.out_features // layout.tile) * layout.tile
        self.packed = torch.empty(padded, self.in_features // 2, dtype=torch.uint8)
        self.scale_zero_GF2 = torch.zeros(self.in_features // self._group, padded, 2, dtype=torch.bfloat16)
        for start in range(0, self.out_features, self._PACKED_ROWS):
            self._load(codes.rows(slice(start, start + self._PACKED_ROWS)).regrouped(self._group), start)

    def _load(self, codes: Codes, start: int) -> None:
        count = codes.out_features
        stop = start + -(-count // self.layout.tile) * self.layout.tile
        nibbles_FD = codes.codes_FD.to(torch.int32)
        padded_FD = F.pad(nibbles_FD, (0, 0, 0, stop - start - count), value=8)  # scale and zero 0: the weight is 0
        self.packed[start:stop] = self._pack(padded_FD).view(stop - start, -1)
        zero_FG = (8 - (0 if codes.zero_FG is None else codes.zero_FG)) * codes.scale_FG
        self.scale_zero_GF2[:, start : start + count] = torch.stack((codes.scale_FG.T, zero_FG.T), -1)

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.contiguous()
        if self._unpack_from is None or x_TD.shape[0] < self._unpack_from:
            y_TF: Tensor = _int4_product(x_TD, self.packed, self._group, self.scale_zero_GF2)
            return y_TF if y_TF.shape[1] == self.out_features else y_TF[:, : self.out_features]
        step = max(self._UNPACKED_WEIGHTS // self.in_features // self.layout.tile, 1) * self.layout.tile
        starts = range(0, self.packed.shape[0], step)
        parts = [x_TD @ self._unpack(start, min(start + step, self.packed.shape[0])) for start in starts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole[:, : self.out_features]

    def _unpack(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight, dense and transposed: [in_features, stop - start]."""
        groups, tile = self.in_features // self._group, self.layout.tile
        nibbles = self.layout.unpack(self.packed[start:stop], self.in_features)
        # In float32: there torch is fast, and the product is exact, so the sum is rounded once.
        weights = nibbles.to(torch.float32).sub_(8).view(-1, groups, self._group, tile)
        scale_zero = self.scale_zero_GF2[:, start:stop].view(groups, -1, tile, 2).permute(3, 1, 0, 2)
        scale, zero = scale_zero.unsqueeze(3).contiguous().float()
        weights.mul_(scale).add_(zero)
        by_tile = weights.to(torch.bfloat16).view(-1, self.in_features, tile)
        return by_tile.transpose(0, 1).reshape(self.in_features, -1)

    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scale_zero_GF2.nbytes
