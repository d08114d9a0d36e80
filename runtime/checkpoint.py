"""Where weights come from: one Protocol over safetensors folders and GGUF files. Names are Hugging Face's.

Nothing is read until asked for, and only the asked-for slice is: each rank maps the files and touches its own pages.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..parallel.codes import Kind, Quantised

Cut = tuple[slice, ...]
"""One slice a dim, with step 1 and bounds inside the shape; a missing tail means whole dims."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a quantised matrix is stored.

    format: its name, for messages. group: columns that share a scale, between which cuts are best made; 1: anywhere.
    kind: what `Checkpoint.codes` gives; None: there are no codes, only numbers. has_zeros: of 8 bits, with zeros.
    """

    format: str
    group: int
    kind: Kind | None
    has_zeros: bool = False


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
        """The slice, dense, on the CPU, in the stored dtype (dequantised: float32)."""
        ...

    def form(self, name: str) -> Form | None:
        """How a matrix is quantised; None if it is stored dense."""
        ...

    def codes(self, name: str, cut: Cut = ()) -> Quantised | None:
        """The slice of a quantised matrix as codes, on the CPU; None if it is stored dense or has no codes."""
        ...
