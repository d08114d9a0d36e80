"""Writes a folder of safetensors as its tensors are made: nothing waits in memory for a file to be complete.

Format: https://huggingface.co/docs/safetensors. The header stands first and is known last, so room is left for it and
what is too much becomes spaces, which the format allows.
"""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .safetensors_checkpoint import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 << 30
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = 140  # bytes of a header's entry, at most, without its name
_WIDEST = 8  # bytes of the widest dtype: at multiples of it every tensor lies aligned


class SafetensorsWriter:
    """A folder's `model.safetensors`, or its shards and their index. `close` completes them."""

    def __init__(self, folder: Path, *, header_room: int, shard_bytes: int = SHARD_BYTES) -> None:
        """header_room: `header_room(names)` of all tensors that may come."""
        self._folder = folder
        self._room = header_room
        self._limit = shard_bytes
        self._shards: list[_Shard] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises OSError: the disk is full, say."""
        size = tensor.numel() * tensor.element_size()
        if not self._shards or (self._shards[-1].size and self._shards[-1].size + size > self._limit):
            self._finish_shard()
            path = self._folder / f"{len(self._shards) + 1}.partial"
            self._shards.append(_Shard(path, self._room))
        self._shards[-1].add(name, tensor)
        self.num_bytes += size

    def close(self) -> None:
        self._finish_shard()
        count = len(self._shards)
        if count == 1:
            self._shards[0].path.rename(self._folder / SINGLE)
            return
        where: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self._folder / name)
            where |= dict.fromkeys(shard.entries, name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(where.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _finish_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()


def header_room(names: list[str]) -> int:
    """Bytes that the header of tensors of these names takes at most, a multiple of 8."""
    size = 64 + sum(_ENTRY + len(json.dumps(name)) for name in names)
    return -(-size // _WIDEST) * _WIDEST


class _Shard:
    """One file in the making."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.size = 0  # of the data
        self.entries: dict[str, dict[str, object]] = {}
        self._room = room
        self._waiting: list[tuple[str, Tensor]] = []
        self._file: BinaryIO = path.open("wb")
        self._file.write(room.to_bytes(8, "little") + b" " * room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Sizes that would put what follows out of line wait for the end, where the widest numbers go first."""
        if tensor.numel() * tensor.element_size() % _WIDEST:
            self._waiting.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + size],
        }
        if size:
            self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.size += size

    def close(self) -> None:
        if self._file.closed:
            return
        with self._file:
            for name, tensor in sorted(self._waiting, key=lambda item: -item[1].element_size()):
                self._write(name, tensor)
            header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
            assert len(header) <= self._room, f"a header of {len(header)} bytes for {self._room}"
            self._file.seek(8)
            self._file.write(header)
