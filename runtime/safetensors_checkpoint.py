"""A folder of safetensors files as a `Checkpoint`: one file, or shards with an index. Quantised: see `quantised.py`.

Format: https://huggingface.co/docs/safetensors (8 bytes with the header's length, a JSON header, the data). Files are
mapped; a slice of a tensor is a view of the map, so what is not asked for is never read.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Cut
from .errors import CheckpointError
from .model_config import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 << 20  # bytes; the format's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """One mapped file and the checked directory of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # A private writable map: torch wants writable memory, and nothing can reach the file through it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        self.entries = _directory(path, self._map)

    def view(self, name: str) -> Tensor:
        """The whole tensor, in place."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)


def _directory(path: Path, data: mmap.mmap) -> dict[str, Entry]:
    if len(data) < 8:
        raise CheckpointError(f"{path}: expected a safetensors header, found a file of {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise CheckpointError(
            f"{path}: expected a header of {length} bytes, found a file of {len(data)} bytes: "
            "truncated, or not safetensors"
        )
    try:
        header = json.loads(data[8 : 8 + length])
        fields = {name: field for name, field in header.items() if name != "__metadata__"}
        return {name: _entry(path, name, field, range(8 + length, len(data))) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the header is not valid safetensors: {error!r}") from error


def _entry(path: Path, name: str, field: dict[str, Any], data: range) -> Entry:
    dtype, shape = DTYPES.get(field["dtype"]), tuple(int(n) for n in field["shape"])
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected a dtype of {', '.join(DTYPES)}, found {field['dtype']!r}"
        )
    begin, end = (int(offset) for offset in field["data_offsets"])
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected {expected} bytes for shape {list(shape)} in {field['dtype']}, "
            f"found offsets {begin} to {end}"
        )
    if end > len(data):
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected data up to byte {data.start + end}, found a file of {data.stop} bytes: "
            "truncated"
        )
    return Entry(dtype, shape, data.start + begin)


class SafetensorsCheckpoint:
    """`Checkpoint` over a folder with `config.json` and safetensors files. Files are opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._files: dict[Path, SafetensorsFile] = {}
        self._where = self._locate()

    def names(self) -> list[str]:
        return list(self._where)

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, or the one that should say where it is."""
        return str(self._where.get(name) or self._directory_file())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name].shape

    def tensor(self, name: str, cut: Cut = ()) -> Tensor:
        """A view of the mapped file: to be copied from, never written to."""
        return self._file(name).view(name)[cut]

    def form(self, name: str) -> None:
        return None

    def codes(self, name: str, cut: Cut = ()) -> None:
        return None

    def _directory_file(self) -> Path:
        return next((path for path in (self.folder / SINGLE, self.folder / INDEX) if path.is_file()), self.folder)

    def _locate(self) -> dict[str, Path]:
        directory = self._directory_file()
        if directory.name == INDEX:
            return self._indexed(directory)
        if directory.name != SINGLE:
            found = sorted(path.name for path in self.folder.iterdir())
            raise CheckpointError(
                f"{self.folder}: expected {SINGLE} or {INDEX}, found {', '.join(found[:20]) or 'nothing'}"
            )
        return dict.fromkeys(self._open(directory).entries, directory)

    def _indexed(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: expected an object 'weight_map', found {type(weight_map).__name__}")
        return {name: self._inside(index, name, file) for name, file in weight_map.items()}

    def _inside(self, index: Path, name: str, file: Any) -> Path:
        # Lexically: in the hub's cache the files themselves are links that lead out of the folder.
        parts = PurePosixPath(file).parts if isinstance(file, str) else ()
        if not parts or ".." in parts or parts[0] == "/" or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index}: tensor {name!r}: expected a file inside the folder, found {file!r}")
        return self.folder.joinpath(*parts)

    def _file(self, name: str) -> SafetensorsFile:
        path = self._where.get(name)
        if path is None:
            raise CheckpointError(
                f"{self._directory_file()}: tensor {name!r}: expected by the config, found no such tensor"
            )
        file = self._open(path)
        if name not in file.entries:
            raise CheckpointError(f"{path}: tensor {name!r}: expected by {INDEX}, found no such tensor in the file")
        return file

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        return self._files[path]
