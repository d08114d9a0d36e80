"""Weight formats: how one linear layer's slice of the weights is held, and multiplied with.

A rank's slice is cut when it is read (`runtime/weights.py`), so a method here knows nothing of shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.linear import Linear, linear
from ..kernels.native import load_native
from .native import NativeInt4Linear

# Not by torch.ops.aten, whose look-up costs 2 us of a product's 20.
_int4_product = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]


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
    """A weight in a float dtype, used as it is. `product` is the device's."""

    def __init__(self, weight_FD: Tensor, product: Linear = linear) -> None:
        self.weight_FD = weight_FD
        self._product = product
        self.out_features, self.in_features = weight_FD.shape

    def apply(self, x_TD: Tensor) -> Tensor:
        return self._product(x_TD, self.weight_FD)

    def num_bytes(self) -> int:
        return self.weight_FD.numel() * self.weight_FD.element_size()


def packed_linear(
    format: str,
    rows: list[NDArray[np.uint8]],
    *,
    in_features: int,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> LinearMethod | None:
    """A method that multiplies straight from a file's blocks, or None where dense weights are the better form.

    format: GGUF's name of the blocks. rows: uint8 [rows, bytes of a row] each; their rows are stacked (a fused QKV
    comes from three matrices). dtype is that of the activations. What comes out None is dequantised by the caller:
    other formats and devices, dtypes without a fast kernel (float32's is 60 times slower than a dense product).
    deterministic: a row's result does not depend on how many rows there are.
    """
    if device.type != "cpu" or dtype is not torch.bfloat16 or format not in ("Q4_0", "Q4_1"):
        return None
    if native := load_native():  # deterministic as it is
        return NativeInt4Linear(native, partial(_read_q4_blocks, format), rows, in_features)
    layout = probe_int4_layout()
    if layout is None:
        return None
    # The int4 product sums each row for itself and in one order; unpacked, the order is a dense product's.
    unpack_from = None if deterministic else Int4Linear.UNPACK_FROM
    return Int4Linear(format, rows, in_features, layout, unpack_from=unpack_from)


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


def probe_int4_layout() -> Int4Layout | None:
    """Find the layout by packing matrices whose nibbles are the digits of each weight's own index.

    torch does not document it, and it differs between AVX-512, AVX2 and plain builds. None: one we cannot unpack.
    """
    rows, columns, digits = 128, 32, 3
    index = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    packed = [_pack_int4((index >> 4 * digit) & 15) for digit in range(digits)]
    for tile in (64, 32, 16):
        for stack_dim in (2, 3):
            layout = Int4Layout(tile, stack_dim)
            nibbles = [layout.unpack(part, columns).to(torch.int32) for part in packed]
            found = sum(part << 4 * digit for digit, part in enumerate(nibbles))
            if torch.equal(torch.as_tensor(found).transpose(1, 2).reshape(rows, columns), index):
                return layout
    return None


def _pack_int4(nibbles_FD: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_FD.contiguous(), 1)
    return packed


class HalfLinear:
    """A weight in float16 for inputs and outputs in float32: FBGEMM's product, which reads 16 bits and sums 32.

    On a CPU it runs at the memory's speed where torch's own float32 and bfloat16 products do not: 1.3 ms against 9.8
    and 3.1 for one row by 49,152 x 576 on two cores. It sums each row for itself, in one order for any number of rows.
    """

    def __init__(self, weight_FD: Tensor) -> None:
        """`weight_FD` is float32; what is beyond float16's range is clipped to it."""
        self.out_features, self.in_features = weight_FD.shape
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_FD, None)

    @staticmethod
    def is_available() -> bool:
        """FBGEMM is part of torch on x86 processors with AVX2."""
        return "fbgemm" in torch.backends.quantized.supported_engines

    def apply(self, x_TD: Tensor) -> Tensor:
        y_TF: Tensor = torch.ops.quantized.linear_dynamic_fp16(x_TD, self._packed)
        return y_TF

    def num_bytes(self) -> int:
        return 2 * self.out_features * self.in_features


class BlockTable:
    """An embedding table as GGUF's blocks: the rows that are asked for are dequantised, float32 [T, D]."""

    def __init__(self, format: str, rows: NDArray[np.uint8]) -> None:
        self._read = _BLOCK_READERS[format]
        self._rows = torch.from_numpy(np.array(rows))

    @staticmethod
    def reads(format: str) -> bool:
        return format in _BLOCK_READERS

    def __len__(self) -> int:
        return len(self._rows)

    def lookup(self, ids_T: Tensor) -> Tensor:
        return self._read(self._rows.index_select(0, ids_T))

    def num_bytes(self) -> int:
        return self._rows.nbytes


class Int4Linear:
    """GGUF's 4-bit blocks of 32 in torch's packed form: held once, multiplied in two ways.

    A block's `w = d * q + m` becomes `(q - 8) * scale + zero` with scale d and zero m + 8 d, both rounded to bfloat16;
    the products below round that sum to bfloat16 once, so both see the very same weights.
    """

    GROUP = 32
    # Rows of x from which unpacking pays: the int4 product costs as much for each row, unpacking costs once.
    UNPACK_FROM = 80
    _UNPACKED_WEIGHTS = 1 << 20  # at a time: the scratch stays in the cache
    _PACKED_ROWS = 1 << 10  # at a time, while loading: a multiple of every tile

    def __init__(
        self,
        format: str,
        rows: list[NDArray[np.uint8]],
        in_features: int,
        layout: Int4Layout,
        *,
        unpack_from: int | None = UNPACK_FROM,
    ) -> None:
        """unpack_from: rows of x from which the weight is unpacked; None: never."""
        self._unpack_from = unpack_from
        self.in_features = in_features
        self.out_features = sum(len(part) for part in rows)
        self.layout = layout
        padded = -(-self.out_features // layout.tile) * layout.tile
        self.packed = torch.empty(padded, in_features // 2, dtype=torch.uint8)
        self.scale_zero_GF2 = torch.zeros(in_features // self.GROUP, padded, 2, dtype=torch.bfloat16)
        blocks = np.concatenate(rows) if len(rows) > 1 else rows[0]
        for start in range(0, self.out_features, self._PACKED_ROWS):
            self._load(format, blocks[start : start + self._PACKED_ROWS], start)

    def _load(self, format: str, blocks: NDArray[np.uint8], start: int) -> None:
        nibbles_FD, scale_FG, zero_FG = _read_q4_blocks(format, blocks)
        count = len(nibbles_FD)
        stop = start + -(-count // self.layout.tile) * self.layout.tile
        padded_FD = F.pad(nibbles_FD, (0, 0, 0, stop - start - count), value=8)  # scale and zero 0: the weight is 0
        self.packed[start:stop] = _pack_int4(padded_FD).view(stop - start, -1)
        self.scale_zero_GF2[:, start : start + count] = torch.stack((scale_FG.T, zero_FG.T), -1)

    def apply(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.contiguous()
        if self._unpack_from is None or x_TD.shape[0] < self._unpack_from:
            y_TF: Tensor = _int4_product(x_TD, self.packed, self.GROUP, self.scale_zero_GF2)
            return y_TF if y_TF.shape[1] == self.out_features else y_TF[:, : self.out_features]
        step = max(self._UNPACKED_WEIGHTS // self.in_features // self.layout.tile, 1) * self.layout.tile
        starts = range(0, self.packed.shape[0], step)
        parts = [x_TD @ self._unpack(start, min(start + step, self.packed.shape[0])) for start in starts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole[:, : self.out_features]

    def _unpack(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight, dense and transposed: [in_features, stop - start]."""
        groups, tile = self.in_features // self.GROUP, self.layout.tile
        nibbles = self.layout.unpack(self.packed[start:stop], self.in_features)
        # In float32: there torch is fast, and the product is exact, so the sum is rounded once.
        weights = nibbles.to(torch.float32).sub_(8).view(-1, groups, self.GROUP, tile)
        scale_zero = self.scale_zero_GF2[:, start:stop].view(groups, -1, tile, 2).permute(3, 1, 0, 2)
        scale, zero = scale_zero.unsqueeze(3).contiguous().float()
        weights.mul_(scale).add_(zero)
        by_tile = weights.to(torch.bfloat16).view(-1, self.in_features, tile)
        return by_tile.transpose(0, 1).reshape(self.in_features, -1)

    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scale_zero_GF2.nbytes


def _read_q4_blocks(format: str, blocks: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
    """Nibbles int32 [F, D], scales and zero points float32 [F, D / 32] of rows of Q4_0 or Q4_1 blocks.

    Q4_0: d, then 16 bytes, w = d * (q - 8). Q4_1: d, m, then 16 bytes, w = d * q + m. Both numbers are float16; byte j
    has weight j in its low and weight j + 16 in its high nibble.
    """
    head = 2 if format == "Q4_0" else 4
    split = blocks.reshape(len(blocks), -1, head + 16)
    numbers = torch.from_numpy(np.ascontiguousarray(split[..., :head]).view(np.float16).astype(np.float32))
    pairs = torch.from_numpy(split[..., head:].astype(np.int32))
    nibbles_FD = torch.cat((pairs & 15, pairs >> 4), -1).flatten(1)
    scale_FG = numbers[..., 0]
    zero_FG = torch.zeros_like(scale_FG) if format == "Q4_0" else numbers[..., 1] + 8 * scale_FG
    return nibbles_FD, scale_FG, zero_FG


def _dequantise_q4(format: str, rows: Tensor) -> Tensor:
    nibbles_FD, scale_FG, zero_FG = _read_q4_blocks(format, rows.numpy())
    centred = (nibbles_FD - 8).view(len(rows), -1, Int4Linear.GROUP)
    return torch.addcmul(zero_FG[..., None], scale_FG[..., None], centred).flatten(1)


def _dequantise_q8_0(rows: Tensor) -> Tensor:
    """Blocks of a float16 scale and 32 signed bytes."""
    blocks = rows.view(len(rows), -1, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].view(torch.int8) * scale).flatten(1)


_BLOCK_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": partial(_dequantise_q4, "Q4_0"),
    "Q4_1": partial(_dequantise_q4, "Q4_1"),
    "Q8_0": _dequantise_q8_0,
}
