"""Quantised safetensors as a `Checkpoint`: what several tensors store is one matrix again (station: start-up).

Which matrices are quantised is told by the tensors that there are; how, by config.json's quantization_config.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ..parallel.codes import Quantised
from .checkpoint import Checkpoint, Cut, Form
from .errors import CheckpointError
from .quantised_float import BitsAndBytes, Fp8
from .quantised_int import Awq, Gptq
from .quantised_parts import Matrix, Parts, Shape
from .quantised_tensors import CompressedTensors


class Format(Protocol):
    """How a kind of checkpoint stores matrices."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the tensors, other than `weight`, that belong to a quantised matrix."""
        ...

    def matrix(self, parts: Parts) -> Matrix | None:
        """The matrix, its tensors held against one another; None if it is dense. Raises: CheckpointError."""
        ...


FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8,
    "fp8": Fp8,
    "gptq": Gptq,
    "modelopt": Fp8,
}


def unquantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each matrix under its plain name, whatever it is stored as.

    Raises: CheckpointError: a format that is unknown.
    """
    config = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if not config:
        return checkpoint
    method = config.get("quant_method", "compressed-tensors") if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"config.json: quantization_config.quant_method: expected one of {', '.join(FORMATS)}, found {method!r}: "
            "use a checkpoint in one of these formats, an unquantised one, or a GGUF file"
        )
    return QuantisedCheckpoint(checkpoint, FORMATS[method](config))


class QuantisedCheckpoint:
    """A `Checkpoint` over another one in which some matrices are quantised."""

    def __init__(self, stored: Checkpoint, format: Format) -> None:
        self.config = stored.config
        self._stored = stored
        self._format = format
        self._stored_names = frozenset(stored.names())
        self._modules = {name: module for name in self._stored_names if (module := self._module(name)) is not None}
        weights = (f"{module}.weight" for module in self._modules.values())
        self._names = list(dict.fromkeys((*(n for n in stored.names() if n not in self._modules), *weights)))
        self._matrices: dict[str, Matrix | None] = {}

    def _module(self, name: str) -> str | None:
        """Whose matrix the tensor is a part of, beside its weight."""
        suffix = next((suffix for suffix in self._format.suffixes if name.endswith(f".{suffix}")), None)
        return None if suffix is None else name.removesuffix(f".{suffix}")

    def _matrix(self, name: str) -> Matrix | None:
        module, dot, last = name.rpartition(".")
        if not dot or last != "weight":
            return None
        if module not in self._matrices:
            self._matrices[module] = self._format.matrix(Parts(self._stored, self._stored_names, module))
            if self._matrices[module] is None and name not in self._stored_names:
                found = sorted(part for part, owner in self._modules.items() if owner == module)
                raise CheckpointError(
                    f"{self.file_of(name)}: tensor {name!r}: expected it, or its codes beside their scales, "
                    f"found {', '.join(found) or 'no such tensor'}"
                )
        return self._matrices[module]

    def names(self) -> list[str]:
        return self._names

    def file_of(self, name: str) -> str:
        module = name.removesuffix(".weight")
        own = (part for part, owner in self._modules.items() if owner == module)
        return self._stored.file_of(name if name in self._stored_names else next(own, name))

    def shape(self, name: str) -> Shape:
        matrix = self._matrix(name)
        return self._stored.shape(name) if matrix is None else matrix.shape

    def tensor(self, name: str, cut: Cut = ()) -> Tensor:
        matrix = self._matrix(name)
        return self._stored.tensor(name, cut) if matrix is None else matrix.dense(*_whole(cut, matrix.shape))

    def form(self, name: str) -> Form | None:
        matrix = self._matrix(name)
        return None if matrix is None else matrix.form

    def codes(self, name: str, cut: Cut = ()) -> Quantised | None:
        matrix = self._matrix(name)
        return None if matrix is None else matrix.codes(*_whole(cut, matrix.shape))


def _whole(cut: Cut, shape: Shape) -> tuple[slice, slice]:
    """The cut with bounds for both dims."""
    bounds = [part.indices(size)[:2] for part, size in zip((*cut, slice(None), slice(None)), shape, strict=False)]
    return slice(*bounds[0]), slice(*bounds[1])
