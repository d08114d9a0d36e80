"""Integer weights in safetensors: GPTQ's and AWQ's packed matrices, and compressed-tensors' (in `quantised.py` chosen).

All are groups of columns with scales; they differ in the dimension that is packed into int32 words, in the order of the
integers in a word, and in what a stored zero means.
"""

from typing import Any

import torch
from torch import Tensor

from .checkpoint import Form
from .errors import CheckpointError
from .quantised_parts import CodeMatrix, Matrix, Parts, centred, kind_of_bits, unpack, window

GPTQ_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an AWQ word is for each of its eight rows, in order: it stores rows 0 2 4 6 1 3 5 7."""


def integer(config: dict[str, Any], *keys: str, default: int | None = None) -> int:
    """A whole number of the quantization_config, under the first of the keys that is there."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"config.json: quantization_config.{keys[0]}: expected a whole number, found {value!r}")
    return value


def choice(config: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    """A word of the quantization_config out of those that are known; the first is the default."""
    value = config.get(key) or allowed[0]
    if not isinstance(value, str) or value.lower() not in allowed:
        raise CheckpointError(
            f"config.json: quantization_config.{key}: expected {' or '.join(map(repr, allowed))}, found {value!r}"
        )
    return value.lower()


def uniform_groups(columns: int, group: int) -> Tensor:
    """Each column's group where they lie side by side."""
    return torch.arange(columns) // group


class Gptq:
    """GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel save it: columns packed into words, [in * bits / 32, out].

    Stored zeros are one less than meant, but not in `gptq_v2`. g_idx gives each column's group where columns were
    quantised in the order of activations (`desc_act`).
    """

    suffixes = GPTQ_SUFFIXES

    def __init__(self, config: dict[str, Any]) -> None:
        self._bits = integer(config, "bits")
        self._group = integer(config, "group_size", default=-1)
        key = "checkpoint_format" if config.get("checkpoint_format") else "format"
        self._zero_offset = 1 if choice(config, key, ("gptq", "gptq_v2")) == "gptq" else 0
        self._any_bits = bool(config.get("dynamic"))  # GPTQModel's overrides for single modules
        if self._bits not in _GPTQ_BITS:
            raise CheckpointError(
                f"config.json: quantization_config.bits: expected one of {_GPTQ_BITS} for GPTQ, found {self._bits}"
            )

    def matrix(self, parts: Parts) -> Matrix | None:
        if not parts.has("qweight"):
            return None
        num_groups, rows = _two(parts, "scales")
        columns, bits = self._columns(parts)
        group = self._group if self._group > 0 else columns
        words = _two(parts, "qweight")[0]
        if self._any_bits and num_groups:
            group = -(-columns // num_groups)
        parts.need("qweight", (words, rows), torch.int32)
        parts.need("scales", (-(-columns // group), rows))
        parts.need("qzeros", (num_groups, rows * bits // 32), torch.int32)
        mask = (1 << bits) - 1

        def read_codes(part: slice, cols: slice) -> Tensor:
            units, inside = window(cols, 32)
            cut = slice(units.start * bits, min(units.stop * bits, words)), part
            return centred(unpack(parts.read("qweight", cut).T, bits)[:, inside], bits)

        def read_zeros(part: slice) -> Tensor:
            stored = unpack(parts.read("qzeros"), bits)[:, part].T
            return centred(stored + self._zero_offset & mask, bits)

        return CodeMatrix(
            Form(f"GPTQ {bits}-bit", group, kind_of_bits(bits)),
            (rows, columns),
            read_codes,
            lambda part: parts.read("scales")[:, part].T,
            read_zeros,
            self._groups(parts, columns, group, num_groups),
        )

    def _columns(self, parts: Parts) -> tuple[int, int]:
        """How many columns there are, and their bits. With overrides g_idx counts columns, and the words tell bits."""
        words = _two(parts, "qweight")[0]
        if not self._any_bits:
            return words * 32 // self._bits, self._bits
        if not parts.has("g_idx"):
            parts.fail("g_idx", "the tensor, since config.json has overrides in `dynamic`", "no such tensor")
        columns = parts.shape("g_idx")[0]
        bits = words * 32 // max(columns, 1)
        if bits not in _GPTQ_BITS:
            parts.fail("qweight", f"rows for {columns} columns of {_GPTQ_BITS} bits", f"{words}")
        return columns, bits

    @staticmethod
    def _groups(parts: Parts, columns: int, group: int, num_groups: int) -> Tensor:
        if not parts.has("g_idx"):
            return uniform_groups(columns, group)
        parts.need("g_idx", (columns,))
        return checked_groups(parts, "g_idx", num_groups)


def checked_groups(parts: Parts, suffix: str, num_groups: int) -> Tensor:
    """An index of groups for the columns, held to the number of groups."""
    groups = parts.read(suffix).long()
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= num_groups:
        parts.fail(suffix, f"groups from 0 to {num_groups - 1}", f"{low} to {high}")
    return groups


class Awq:
    """AWQ (arXiv:2306.00978) in AutoAWQ's `gemm` version: rows packed into words, [in, out / 8], interleaved."""

    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, config: dict[str, Any]) -> None:
        bits = integer(config, "bits", "w_bit", default=4)
        if bits != 4:
            raise CheckpointError(f"config.json: quantization_config.bits: expected 4 for AWQ, found {bits}")
        choice(config, "version" if config.get("version") else "format", ("gemm",))
        self._group = integer(config, "group_size", "q_group_size", default=128)

    def matrix(self, parts: Parts) -> Matrix | None:
        if not parts.has("qweight"):
            return None
        columns, words = _two(parts, "qweight")
        rows, group = words * 8, self._group if self._group > 0 else columns
        num_groups = -(-columns // group)
        parts.need("qweight", (columns, words), torch.int32)
        parts.need("scales", (num_groups, rows))
        parts.need("qzeros", (num_groups, words), torch.int32)

        def unpacked(suffix: str, part: slice, cols: slice) -> Tensor:
            units, inside = window(part, 8)
            words = parts.read(suffix, (cols, units))
            nibbles = unpack(words, 4).view(*words.shape, 8)[..., list(_AWQ_ORDER)]
            return nibbles.flatten(1)[:, inside].T

        return CodeMatrix(
            Form("AWQ 4-bit", group, kind_of_bits(4)),
            (rows, columns),
            lambda part, cols: unpacked("qweight", part, cols),
            lambda part: parts.read("scales")[:, part].T,
            lambda part: unpacked("qzeros", part, slice(0, num_groups)),
            uniform_groups(columns, group),
        )


def _two(parts: Parts, suffix: str) -> tuple[int, int]:
    shape = parts.shape(suffix)
    if len(shape) != 2:
        parts.fail(suffix, "a matrix", f"shape {list(shape)}")
    return shape[0], shape[1]
