"""What the readers of quantised safetensors share: a matrix as several tensors, and integers packed into words."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from ..parallel.codes import Codes, Kind, Quantised, in_groups
from ..parallel.partition import length
from .checkpoint import Checkpoint, Cut, Form
from .errors import CheckpointError

Shape = tuple[int, ...]


class Matrix(Protocol):
    """A quantised matrix, `shape` [out, in] as the layer sees it, of which any part can be read."""

    @property
    def form(self) -> Form: ...

    @property
    def shape(self) -> Shape: ...

    def codes(self, rows: slice, cols: slice) -> Quantised | None:
        """None if this part has none."""
        ...

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The same as numbers, float32: the format's reference."""
        ...


class Parts:
    """The tensors that store one matrix, `<module>.<suffix>`. What is not as it should be raises `CheckpointError`."""

    def __init__(self, checkpoint: Checkpoint, names: frozenset[str], module: str) -> None:
        self.module = module
        self._checkpoint = checkpoint
        self._names = names

    def has(self, suffix: str) -> bool:
        return f"{self.module}.{suffix}" in self._names

    def shape(self, suffix: str) -> Shape:
        return self._checkpoint.shape(f"{self.module}.{suffix}")

    def dtype(self, suffix: str) -> torch.dtype:
        return self.read(suffix).dtype

    def read(self, suffix: str, cut: Cut = ()) -> Tensor:
        """A view of the file."""
        return self._checkpoint.tensor(f"{self.module}.{suffix}", cut)

    def need(self, suffix: str, expected: Shape, dtype: torch.dtype | None = None) -> None:
        """Hold a tensor to the shape and dtype that follow from the others and from config.json."""
        found = self.shape(suffix)
        if found != expected:
            self.fail(suffix, f"shape {list(expected)} by the config and the matrix's other tensors", f"{list(found)}")
        if dtype is not None and self.dtype(suffix) is not dtype:
            self.fail(suffix, f"{_word(dtype)}", _word(self.dtype(suffix)))

    def fail(self, suffix: str, expected: str, found: str) -> NoReturn:
        name = f"{self.module}.{suffix}"
        raise CheckpointError(f"{self._checkpoint.file_of(name)}: tensor {name!r}: expected {expected}, found {found}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True, eq=False)
class CodeMatrix:
    """A matrix of integers with a scale, and maybe a zero, for each row and group of columns.

    read_codes: rows and columns -> integers [rows, columns]; read_scales, read_zeros: rows -> [rows, G]. Integers of up
    to four bits are uint8 from 0, of more bits int8, and zeros are theirs. group_of_D: each column's group.
    """

    form: Form
    shape: Shape
    read_codes: Callable[[slice, slice], Tensor]
    read_scales: Callable[[slice], Tensor]
    read_zeros: Callable[[slice], Tensor] | None
    group_of_D: Tensor
    round_inputs: bool = False

    def codes(self, rows: slice, cols: slice) -> Codes:
        zero_FG = None if self.read_zeros is None else self.read_zeros(rows).float()
        if zero_FG is not None and not zero_FG.any():
            zero_FG = None
        scale_FG = self.read_scales(rows).float()
        codes = in_groups(self.read_codes(rows, cols).contiguous(), scale_FG, zero_FG, self.group_of_D[cols])
        return replace(codes, round_inputs=self.round_inputs)

    def dense(self, rows: slice, cols: slice) -> Tensor:
        return self.codes(rows, cols).dense()


def kind_of_bits(bits: int) -> Kind:
    return Kind.INT4 if bits <= 4 else Kind.INT8


def unpack(words: Tensor, bits: int) -> Tensor:
    """Integers of `bits` bits one after the other, lowest bits first, in int32s: [R, W] -> uint8 [R, W * 32 / bits].

    Rows are whole: integers that are split between two words are joined, bits left over at a row's end are dropped.
    """
    raw = words.contiguous().view(torch.uint8)
    if bits == 8:
        return raw
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (raw[..., None] >> shifts & (1 << bits) - 1).flatten(1)
    count = raw.shape[1] * 8 // bits
    stream = np.unpackbits(raw.numpy(), axis=1, bitorder="little")[:, : count * bits]
    padded = np.packbits(stream.reshape(len(raw), count, bits), axis=2, bitorder="little")
    return torch.from_numpy(padded[..., 0])


def centred(codes: Tensor, bits: int) -> Tensor:
    """Unsigned integers as `CodeMatrix` wants them: more than four bits become signed ones, half their range lower."""
    return codes if bits <= 4 else codes.sub(1 << bits - 1).view(torch.int8)


def window(part: slice, unit: int) -> tuple[slice, slice]:
    """The part in whole units, counted in units, and where the part lies in what those hold."""
    start, stop = part.start // unit, -(-part.stop // unit)
    skipped = part.start - start * unit
    return slice(start, stop), slice(skipped, skipped + length(part))
