"""compressed-tensors checkpoints: `pack-quantized`, `int-quantized` and `float-quantized` matrices.

What each matrix is stored as is told by its own tensors, and held against the schemes of config.json. Their `targets`
and `ignore` patterns are never run: a pattern that comes with a model may take for ever, and a module that is left out
is simply stored dense.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Form
from .errors import CheckpointError
from .quantised_float import read_float8
from .quantised_int import checked_groups, uniform_groups
from .quantised_parts import CodeMatrix, Matrix, Parts, centred, kind_of_bits, unpack, window

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_OF_INPUTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One of the config's ways to store weights. group 0: not in groups of columns."""

    bits: int
    group: int
    block: tuple[int, int] | None
    round_inputs: bool

    @staticmethod
    def read(group: dict[str, Any]) -> "Scheme":
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict) or not isinstance(weights.get("num_bits"), int):
            raise CheckpointError(
                f"config.json: quantization_config.config_groups: expected weights with num_bits, found {weights!r}"
            )
        block = weights.get("block_structure")
        return Scheme(
            weights["num_bits"],
            max(weights.get("group_size") or 0, 0),
            (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else None,
            isinstance(inputs, dict) and inputs.get("num_bits") == 8,
        )


class CompressedTensors:
    """Tensors of a module: weight_packed (words along the row) or weight (int8, float8), and weight_scale [out, G]."""

    suffixes = (*_SUFFIXES, *_OF_INPUTS)

    def __init__(self, config: dict[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise CheckpointError(
                f"config.json: quantization_config.config_groups: expected an object of objects, found {groups!r}"
            )
        for format in (config.get("format"), *(group.get("format") for group in groups.values())):
            if format is not None and format not in _FORMATS:
                raise CheckpointError(
                    f"config.json: quantization_config.format: expected one of {', '.join(_FORMATS)}, found {format!r}"
                )
        sparsity = config.get("sparsity_config")
        if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
            raise CheckpointError(
                f"config.json: quantization_config.sparsity_config: expected the format 'dense', found {sparsity!r}"
            )
        self._schemes = [Scheme.read(group) for group in groups.values()]

    def matrix(self, parts: Parts) -> Matrix | None:
        if parts.has("weight_packed"):
            return self._packed(parts)
        if not parts.has("weight"):
            parts.fail("weight_packed", "the tensor, or a weight", "neither")
        dtype = parts.dtype("weight")
        if dtype is torch.int8:
            return self._int8(parts)
        if dtype.itemsize > 1:  # of a model that is only calibrated: its scales mean nothing yet
            return None
        blocks = [scheme.block for scheme in self._schemes if scheme.block is not None]
        block = blocks[0] if blocks else None
        return read_float8(parts, "weight_scale", block=block, round_inputs=self._round_inputs(8))

    def _packed(self, parts: Parts) -> Matrix:
        rows, columns = (int(size) for size in parts.read("weight_shape"))
        width = parts.shape("weight_packed")[-1]
        fitting = [scheme for scheme in self._schemes if -(-columns * scheme.bits // 32) == width]
        bits = fitting[0].bits if fitting else self._schemes[0].bits if self._schemes else 4
        if not 1 <= bits <= 8:
            parts.fail("weight_packed", "1 to 8 bits", f"{bits} by config.json")
        parts.need("weight_packed", (rows, -(-columns * bits // 32)), torch.int32)
        group = self._group(parts, bits, (rows, columns))
        num_groups = -(-columns // group)
        parts.need("weight_scale", (rows, num_groups))

        def read_codes(part: slice, cols: slice) -> Tensor:
            units, inside = window(cols, 32)
            words = slice(units.start * bits, min(units.stop * bits, width))
            return centred(unpack(parts.read("weight_packed", (part, words)), bits)[:, inside], bits)

        def read_zeros(part: slice) -> Tensor:
            if not parts.has("weight_zero_point"):
                middle = torch.full((part.stop - part.start, num_groups), 1 << bits - 1, dtype=torch.uint8)
                return centred(middle, bits)
            parts.need("weight_zero_point", (-(-rows * bits // 32), num_groups), torch.int32)
            return centred(unpack(parts.read("weight_zero_point").T, bits)[:, part].T.contiguous(), bits)

        return CodeMatrix(
            Form(f"compressed-tensors {bits}-bit", group, kind_of_bits(bits)),
            (rows, columns),
            read_codes,
            lambda part: parts.read("weight_scale", (part,)),
            read_zeros,
            self._groups(parts, columns, group),
            self._round_inputs(bits),
        )

    def _int8(self, parts: Parts) -> Matrix:
        shape = parts.shape("weight")
        if len(shape) != 2:
            parts.fail("weight", "a matrix", f"shape {list(shape)}")
        rows, columns = shape
        scale, zero = "weight_scale", "weight_zero_point"
        group = self._group(parts, 8, (rows, columns))
        num_groups = -(-columns // group)
        if parts.shape(scale) not in {(), (1,), (1, 1), (rows,)}:
            parts.need(scale, (rows, num_groups))
        if parts.has(zero):
            parts.need(zero, parts.shape(scale))

        def for_rows(suffix: str, part: slice) -> Tensor:
            return parts.read(suffix).float().reshape(-1, num_groups).expand(rows, num_groups)[part]

        return CodeMatrix(
            Form("compressed-tensors 8-bit", group if num_groups > 1 else 1, kind_of_bits(8)),
            (rows, columns),
            lambda part, cols: parts.read("weight", (part, cols)),
            lambda part: for_rows(scale, part),
            (lambda part: for_rows(zero, part)) if parts.has(zero) else None,
            self._groups(parts, columns, group),
            self._round_inputs(8),
        )

    def _group(self, parts: Parts, bits: int, shape: tuple[int, int]) -> int:
        """Columns a group: of the schemes that have such bits, the one whose scales are as many as there are."""
        found = parts.shape("weight_scale")
        num_groups = found[1] if len(found) == 2 else 1
        sizes = {scheme.group or shape[1] for scheme in self._schemes if scheme.bits == bits or parts.has("weight")}
        fitting = [size for size in sizes if -(-shape[1] // size) == num_groups]
        if not fitting:
            expected = sorted({-(-shape[1] // size) for size in sizes})
            parts.fail("weight_scale", f"{shape[0]} x {expected} scales by the config", f"shape {list(found)}")
        return fitting[0]

    @staticmethod
    def _groups(parts: Parts, columns: int, group: int) -> Tensor:
        if not parts.has("weight_g_idx"):
            return uniform_groups(columns, group)
        parts.need("weight_g_idx", (columns,))
        if int(parts.read("weight_g_idx").min()) < 0:  # never filled in: the columns are in their order
            return uniform_groups(columns, group)
        return checked_groups(parts, "weight_g_idx", -(-columns // group))

    def _round_inputs(self, bits: int) -> bool:
        return all(scheme.round_inputs for scheme in self._schemes if scheme.bits == bits)
