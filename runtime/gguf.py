"""GGUF files as a `Checkpoint`: Hugging Face's names, orientation and conventions over llama.cpp's (start-up).

A matrix is cut before it is read: only the pages of the asked-for rows and blocks are touched.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..parallel.blocks import group_of_blocks, has_zeros, kind_of_blocks, read_blocks, reads_blocks
from ..parallel.codes import Codes, cut_columns
from .checkpoint import Cut, Form
from .errors import CheckpointError
from .gguf_file import GGUFFile, TensorEntry
from .gguf_names import IGNORED_TENSORS, Change, Metadata, build_config, family_of

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEEPS_BLOCKS = (Change.NONE, Change.PAIRED_Q, Change.PAIRED_K)  # whole rows moved, at most
_Range = tuple[int, int]


class GGUFCheckpoint:
    """The tensors of one GGUF file."""

    config: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile(path)
        self.metadata = Metadata(self.file.metadata, path)
        family = family_of(self.metadata)
        self._places: dict[str, tuple[str, Change]] = {}  # HF name: GGUF name, what to undo
        for gguf_name in self.file.tensors:
            place = family.locate(gguf_name)
            if place is not None:
                self._places[place[0]] = (gguf_name, place[1])
            elif gguf_name not in IGNORED_TENSORS:
                raise CheckpointError(
                    f"{path}: tensor {gguf_name!r} has no place in a {self.metadata.architecture!r} model"
                )
        self.config = build_config(self.file)

    def names(self) -> list[str]:
        return list(self._places)

    def file_of(self, name: str) -> str:
        return str(self.file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        entry, change = self._find(name)
        return entry.shape[::-1] if change is Change.TRANSPOSED else entry.shape

    def tensor(self, name: str, cut: Cut = ()) -> Tensor:
        entry, change = self._find(name)
        ranges = self._ranges(name, cut)
        if len(ranges) == 1:  # small: all of it is read, then cut
            row_1D = self._dense(entry, self._raw(name))
            values_D = self._undone(name, row_1D[0], change)
            return values_D[slice(*ranges[0])].clone()
        rows, columns = ranges[::-1] if change is Change.TRANSPOSED else ranges
        start = columns[0] // entry.block_len
        stop = -(-columns[1] // entry.block_len)
        block_rows = self._rows(name, rows)[:, start * entry.block_bytes : stop * entry.block_bytes]
        whole = self._dense(entry, block_rows)
        skipped = start * entry.block_len
        part = whole[:, columns[0] - skipped : columns[1] - skipped]
        part = part - 1 if change is Change.PLUS_ONE else part
        return (part.T if change is Change.TRANSPOSED else part).contiguous()

    def form(self, name: str) -> Form | None:
        entry, change = self._find(name)
        if entry.format in _FLOATS or len(entry.shape) != 2:
            return None
        if change not in _KEEPS_BLOCKS or not reads_blocks(entry.format):
            return Form(entry.format, entry.block_len, None)
        kind, zeros = kind_of_blocks(entry.format), has_zeros(entry.format)
        return Form(entry.format, group_of_blocks(entry.format), kind, zeros)

    def codes(self, name: str, cut: Cut = ()) -> Codes | None:
        entry, change = self._find(name)
        if entry.format in _FLOATS or change not in _KEEPS_BLOCKS or not reads_blocks(entry.format):
            return None
        rows, (start, stop) = self._ranges(name, cut)
        first, last = start // entry.block_len, -(-stop // entry.block_len)
        blocks = self._rows(name, rows)[:, first * entry.block_bytes : last * entry.block_bytes]
        codes = read_blocks(entry.format, torch.from_numpy(np.array(blocks)))
        skipped = first * entry.block_len
        return cut_columns(codes, start - skipped, stop - skipped)

    def _find(self, name: str) -> tuple[TensorEntry, Change]:
        if name not in self._places:
            raise CheckpointError(f"{self.file.path}: tensor {name!r}: expected, not found")
        gguf_name, change = self._places[name]
        entry = self.file.tensors[gguf_name]
        if len(entry.shape) > 2:
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r}: expected a vector or matrix, found {list(entry.shape)}"
            )
        return entry, change

    def _ranges(self, name: str, cut: Cut) -> list[_Range]:
        """The cut as (start, stop) for each dim of the tensor."""
        shape = self.shape(name)
        assert len(cut) <= len(shape), f"{name}: a cut of {len(cut)} dims for {shape}"
        full = (*cut, *(slice(None) for _ in shape[len(cut) :]))
        ranges = [(s.start or 0, size if s.stop is None else s.stop) for s, size in zip(full, shape, strict=True)]
        for (start, stop), size in zip(ranges, shape, strict=True):
            if not 0 <= start < stop <= size:
                raise CheckpointError(
                    f"{self.file.path}: tensor {name!r}: expected at least {stop} of a dim, found shape {list(shape)}"
                )
        return ranges

    def _raw(self, name: str) -> NDArray[np.uint8]:
        return self.file.rows(self._places[name][0])

    def _rows(self, name: str, rows: _Range) -> NDArray[np.uint8]:
        """Rows of blocks in Hugging Face's order: a view where that is the file's order."""
        change = self._places[name][1]
        raw = self._raw(name)
        if change in (Change.PAIRED_Q, Change.PAIRED_K):
            return raw[self._file_order(name, len(raw))[slice(*rows)]]
        return raw[slice(*rows)]

    def _undone(self, name: str, values_D: Tensor, change: Change) -> Tensor:
        """A vector as Hugging Face has it."""
        match change:
            case Change.PLUS_ONE:
                return values_D - 1
            case Change.PAIRED_Q | Change.PAIRED_K:  # the bias of a paired projection
                return values_D[torch.from_numpy(self._file_order(name, len(values_D)))]
            case _:
                return values_D

    def _file_order(self, name: str, num_rows: int) -> NDArray[np.int64]:
        """Where the file has each row: there a rotated pair (i, i + half) of a head is (2i, 2i + 1)."""
        paired_q = self._places[name][1] is Change.PAIRED_Q
        heads = self.config["num_attention_heads" if paired_q else "num_key_value_heads"]
        if heads < 1 or num_rows % (2 * heads):
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r}: expected rows in pairs for {heads} heads, found {num_rows}"
            )
        return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _dense(self, entry: TensorEntry, block_rows: NDArray[np.uint8]) -> Tensor:
        """Rows of blocks as numbers: [rows, weights], a fresh tensor."""
        if entry.format in _FLOATS:
            return torch.from_numpy(np.array(block_rows)).view(_FLOATS[entry.format])
        return torch.from_numpy(self.file.numbers(entry, block_rows))
