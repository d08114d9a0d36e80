"""Where weights come from: one Protocol over safetensors folders and GGUF files. Names are Hugging Face's.

Nothing is read until asked for, and only the asked-for slice is: each rank maps the files and touches its own pages.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Cut = tuple[slice, ...]
"""One slice a dim, with step 1 and bounds inside the shape; a missing tail means whole dims."""


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Rows of a matrix as the file's own quantised blocks.

    data: uint8 [rows, bytes of a row], a view of the mapped file. Each row is a whole number of blocks of
    `block_len` weights in `block_bytes` bytes, laid out as `format` says (GGUF's name: "Q4_1", "Q8_0", ...).
    """

    format: str
    data: NDArray[np.uint8]
    block_len: int
    block_bytes: int


class Checkpoint(Protocol):
    """The tensors of one model.

    What is missing, truncated or mis-shaped raises `CheckpointError` with file, tensor, expected and found.
    """

    config: dict[str, Any]
    """What `config.json` says, or the same made from GGUF metadata."""

    def names(self) -> list[str]: ...

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, or that should: for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str, cut: Cut = ()) -> Tensor:
        """The slice, dense, on the CPU, in the stored dtype (dequantised blocks: float32)."""
        ...

    def blocks(self, name: str, cut: Cut = ()) -> PackedBlocks | None:
        """The slice of a matrix as packed blocks; None if it is stored dense or the cut splits a block."""
        ...
