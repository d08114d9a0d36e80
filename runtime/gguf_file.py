"""The GGUF container: metadata and tensor directory of one mapped file (station: start-up, under `gguf.py`).

A file comes from anywhere, so nothing in it is believed: every count and length is held against the bytes that are left
before anything is allocated, and what does not fit raises `CheckpointError`.

Layout (little-endian): magic, version u32, tensors u64, pairs u64; the pairs (key, type u32, value); the directory
(name, dims u32, dim u64 each, type u32, offset u64); padding; data. A string is a u64 length and UTF-8.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

MetaValue = int | float | bool | str | list[str] | NDArray[np.generic]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {  # metadata type: numpy's name
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
# The fewest bytes an entry can take: what bounds a count before it is believed.
_MIN_PAIR, _MIN_TENSOR, _MIN_STRING = 8 + 4 + 1, 8 + 4 + 4 + 8, 8

BLOCKS = {  # tensor type: name, weights in a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the directory. `shape` has the slowest dim first (the file says the fastest first)."""

    shape: tuple[int, ...]
    format: str
    block_len: int
    block_bytes: int
    offset: int  # from the start of the file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block_len * self.block_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """An open file: `metadata` by key, `tensors` by the file's own names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from error
        self.size = len(self._map)
        cursor = _Cursor(self._map, path)
        num_tensors, num_pairs = _header(cursor)
        self.metadata = _pairs(cursor, num_pairs)
        self.tensors = _directory(cursor, num_tensors, self.metadata)

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, [rows, bytes of a row], read-only and mapped: pages are read when they are touched."""
        entry = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)
        return raw.reshape(-1, entry.row_bytes)

    def numbers(self, entry: TensorEntry, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows of its blocks as numbers: [rows, weights]. Raises CheckpointError."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values: NDArray[np.float32] = dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[entry.format])
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: cannot read {entry.format} blocks: {error}") from error
        return values


class _Cursor:
    """Reads forward over the mapped file, never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.size = len(data)

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: not a sound GGUF file: {what} (at byte {self.position} of {self.size})")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.size - self.position:
            self.fail(f"{what} needs {num_bytes} bytes, {self.size - self.position} are left")

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start, self.position = self.position, self.position + num_bytes
        return self.data[start : self.position]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}")

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings: the one loop of the reader that is long (a vocabulary), hence the local names."""
        self.need(count * _MIN_STRING, what)
        data, position, end = self.data, self.position, self.size
        length_at = struct.Struct("<Q").unpack_from
        found: list[bytes] = []
        for _ in range(count):
            if position + 8 > end:
                self.fail(f"{what} ends after {len(found)} of {count} strings")
            start = position + 8
            position = start + length_at(data, position)[0]
            if position > end:
                self.fail(f"string {len(found)} of {what} is longer than the file")
            found.append(data[start:position])
        self.position = position
        try:
            return [raw.decode() for raw in found]
        except UnicodeDecodeError as error:
            self.fail(f"{what} holds a string that is not UTF-8: {error.reason}")

    def numbers(self, kind: int, count: int, what: str) -> NDArray[np.generic]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _header(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic")
    if magic != _MAGIC:
        cursor.fail(f"expected the magic {_MAGIC!r}, found {magic!r}")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        big_endian = " (a big-endian file?)" if version >> 16 else ""
        cursor.fail(f"expected version 2 or 3, found {version}{big_endian}")
    num_tensors, num_pairs = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    cursor.need(num_tensors * _MIN_TENSOR + num_pairs * _MIN_PAIR, f"{num_tensors} tensors and {num_pairs} pairs")
    return num_tensors, num_pairs


def _pairs(cursor: _Cursor, count: int) -> dict[str, MetaValue]:
    metadata: dict[str, MetaValue] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
    return metadata


def _value(cursor: _Cursor, key: str) -> MetaValue:
    kind = cursor.u32(key)
    if kind == _STRING:
        return cursor.string(key)
    if kind == _ARRAY:
        kind, count = cursor.u32(key), cursor.u64(key)
        if kind == _STRING:
            return cursor.strings(count, key)
        if kind not in _SCALARS:
            cursor.fail(f"{key!r} is an array of type {kind}, expected numbers or strings")
        return cursor.numbers(kind, count, key)
    if kind not in _SCALARS:
        cursor.fail(f"{key!r} has the unknown type {kind}")
    value: int | float = cursor.numbers(kind, 1, key)[0].item()
    return bool(value) if kind == _BOOL else value


def _directory(cursor: _Cursor, count: int, metadata: dict[str, MetaValue]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for _ in range(count):
        name = cursor.string("a tensor name")
        if name in tensors:
            cursor.fail(f"tensor {name!r} occurs twice")
        tensors[name] = _entry(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        cursor.fail(f"expected a positive general.alignment, found {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return {name: _placed(cursor, name, entry, start) for name, entry in tensors.items()}


def _entry(cursor: _Cursor, name: str) -> TensorEntry:
    num_dims = cursor.u32(name)
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail(f"tensor {name!r}: expected 1 to {_MAX_DIMS} dims, found {num_dims}")
    shape = tuple(cursor.u64(name) for _ in range(num_dims))[::-1]
    kind, offset = cursor.u32(name), cursor.u64(name)
    if kind not in BLOCKS:
        cursor.fail(f"tensor {name!r} has the unsupported type {kind}")
    entry = TensorEntry(shape, *BLOCKS[kind], offset)
    if min(shape) < 1 or shape[-1] % entry.block_len:
        cursor.fail(f"tensor {name!r}: shape {list(shape)} is not whole blocks of {entry.block_len} ({entry.format})")
    return entry


def _placed(cursor: _Cursor, name: str, entry: TensorEntry, start: int) -> TensorEntry:
    """The entry with its offset counted from the start of the file, all of it inside the file."""
    offset = start + entry.offset
    if offset + entry.num_bytes > cursor.size:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} {list(entry.shape)} ({entry.format}) expects bytes {offset} to "
            f"{offset + entry.num_bytes}, found a file of {cursor.size}: truncated?"
        )
    return TensorEntry(entry.shape, entry.format, entry.block_len, entry.block_bytes, offset)
