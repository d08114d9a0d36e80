"""Weights in 8- and 4-bit floating point in safetensors: fp8 with scales of several shapes, and bitsandbytes'."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..parallel.codes import Float8, Kind
from .checkpoint import Form
from .errors import CheckpointError
from .quantised_parts import CodeMatrix, Matrix, Parts, Shape, window


@dataclass(frozen=True, slots=True, eq=False)
class Float8Matrix:
    """fp8 with a scale for all [1, 1], for each row [out, 1], or for each block of (rows, columns)."""

    form: Form
    shape: Shape
    parts: Parts
    scale: Tensor
    block: tuple[int, int] | None
    round_inputs: bool

    def codes(self, rows: slice, cols: slice) -> Float8 | None:
        codes_FD = self.parts.read("weight", (rows, cols))
        if codes_FD.dtype is not torch.float8_e4m3fn:
            return None
        if self.block is None:
            return Float8(codes_FD, self.scale if len(self.scale) == 1 else self.scale[rows], None, self.round_inputs)
        (row_blocks, _), (col_blocks, _) = window(rows, self.block[0]), window(cols, self.block[1])
        if self.block[0] != self.block[1] or not all(map(_whole, (rows, cols), self.block, self.shape)):
            return None
        return Float8(codes_FD, self.scale[row_blocks, col_blocks], self.block[0], self.round_inputs)

    def dense(self, rows: slice, cols: slice) -> Tensor:
        numbers = self.parts.read("weight", (rows, cols)).float()
        if self.block is None:
            return numbers.mul_(self.scale if len(self.scale) == 1 else self.scale[rows])
        by_row = self.scale[torch.arange(rows.start, rows.stop) // self.block[0]]
        return numbers.mul_(by_row[:, torch.arange(cols.start, cols.stop) // self.block[1]])


def _whole(part: slice, block: int, size: int) -> bool:
    """Whether the part begins and ends between blocks, or with the matrix."""
    start, stop = part.indices(size)[:2]
    return start % block == 0 and (stop % block == 0 or stop == size)


def read_float8(parts: Parts, scale: str, *, block: tuple[int, int] | None, round_inputs: bool) -> Matrix:
    """weight in float8 and its scales, which multiply, in the tensor of that suffix.

    A static scale of the inputs is not used: where inputs are rounded at all, each token has its own, which is finer.
    """
    shape = parts.shape("weight")
    if len(shape) != 2 or parts.dtype("weight").itemsize != 1 or not parts.dtype("weight").is_floating_point:
        parts.fail("weight", "a matrix in float8", f"{list(shape)} in {parts.dtype('weight')}")
    rows, columns = shape
    found = parts.shape(scale)
    numbers = parts.read(scale).float()
    if found in {(), (1,), (1, 1)}:
        numbers, block = numbers.reshape(1, 1), None
    elif found in {(rows,), (rows, 1)}:
        numbers, block = numbers.reshape(rows, 1), None
    elif block is None:
        parts.fail(scale, f"one scale, or one for each of {rows} rows", f"shape {list(found)}")
    else:
        parts.need(scale, (-(-rows // block[0]), -(-columns // block[1])))
    form = Form("fp8", block[1] if block else 1, Kind.FLOAT8)
    return Float8Matrix(form, shape, parts, numbers, block, round_inputs)


class Fp8:
    """`fp8` as transformers and vLLM save it: weight_scale_inv for blocks, weight_scale for less. Both multiply."""

    suffixes = ("weight_scale_inv", "weight_scale", "activation_scale", "input_scale", "input_scale_ub")

    def __init__(self, config: dict[str, Any]) -> None:
        algorithm = config.get("quant_algo", "FP8")
        if algorithm != "FP8":
            raise CheckpointError(f"config.json: quantization_config.quant_algo: expected 'FP8', found {algorithm!r}")
        size = config.get("weight_block_size")
        whole = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        if size is not None and not whole:
            raise CheckpointError(
                f"config.json: quantization_config.weight_block_size: expected two sizes, found {size!r}"
            )
        self._block = (size[0], size[1]) if size else None

    def matrix(self, parts: Parts) -> Matrix | None:
        if not parts.has("weight") or parts.dtype("weight").itemsize > 1:
            return None
        scale = "weight_scale_inv" if parts.has("weight_scale_inv") else "weight_scale"
        return read_float8(parts, scale, block=self._block, round_inputs=True)


@dataclass(frozen=True, slots=True, eq=False)
class TableMatrix:
    """Nibbles that index a table of 16 numbers, the first of a byte high; a scale for each block of the flat matrix."""

    form: Form
    shape: Shape
    parts: Parts
    block: int
    absmax: Tensor

    def codes(self, rows: slice, cols: slice) -> None:
        return None

    def dense(self, rows: slice, cols: slice) -> Tensor:
        columns = self.shape[1]
        flat = slice(rows.start * columns, rows.stop * columns)
        raw, inside = window(flat, 2)
        pairs = self.parts.read("weight").flatten().view(torch.uint8)[raw]
        nibbles = torch.stack((pairs >> 4, pairs & 15), 1).flatten()[inside]
        blocks = torch.arange(flat.start, flat.stop) // self.block
        numbers = self.parts.read("weight.quant_map")[nibbles.long()] * self.absmax[blocks]
        return numbers.view(-1, columns)[:, cols]


class BitsAndBytes:
    """bitsandbytes as transformers saves it: nf4 and fp4 (arXiv:2305.14314), whose scales may be quantised once more,
    and LLM.int8 (arXiv:2208.07339) by rows."""

    _STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
    suffixes = (
        *_STATES,
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "SCB",
        "weight_format",
    )

    def __init__(self, config: dict[str, Any]) -> None:
        pass

    def matrix(self, parts: Parts) -> Matrix | None:
        for state in self._STATES:
            if parts.has(state):
                return self._four_bits(parts, state)
        return self._int8(parts) if parts.has("SCB") else None

    @staticmethod
    def _four_bits(parts: Parts, suffix: str) -> Matrix:
        try:
            state = json.loads(bytes(parts.read(suffix).tolist()))
            rows, columns = (int(size) for size in state["shape"])
            block, dtype = int(state["blocksize"]), str(state["quant_type"])
        except (ValueError, KeyError, TypeError) as error:
            parts.fail(suffix, "JSON with shape [out, in], blocksize and quant_type", repr(error))
        if min(rows, columns, block) < 1:
            parts.fail(suffix, "a shape and a blocksize above 0", f"[{rows}, {columns}], {block}")
        parts.need("weight.quant_map", (16,))
        stored = parts.read("weight").nbytes
        if stored != -(-rows * columns // 2):
            parts.fail("weight", f"{-(-rows * columns // 2)} bytes for {rows} x {columns}", f"{stored}")
        parts.need("weight.absmax", (-(-rows * columns // block),))
        return TableMatrix(Form(dtype, 1, None), (rows, columns), parts, block, _absmax(parts, state, suffix))

    @staticmethod
    def _int8(parts: Parts) -> Matrix:
        shape = parts.shape("weight")
        if len(shape) != 2 or parts.dtype("weight") is not torch.int8:
            parts.fail("weight", "a matrix in int8", f"{list(shape)} in {parts.dtype('weight')}")
        parts.need("SCB", shape[:1])
        if parts.has("weight_format") and int(parts.read("weight_format")) != 0:
            parts.fail("weight_format", "0 (by rows)", str(int(parts.read("weight_format"))))
        return CodeMatrix(
            Form("bitsandbytes int8", 1, Kind.INT8),
            shape,
            lambda rows, cols: parts.read("weight", (rows, cols)),
            lambda rows: parts.read("SCB", (rows,))[:, None].float() / 127,
            None,
            torch.zeros(shape[1], dtype=torch.int64),
        )


def _absmax(parts: Parts, state: dict[str, Any], suffix: str) -> Tensor:
    """Each block's scale, float32."""
    absmax = parts.read("weight.absmax")
    if not parts.has("weight.nested_absmax"):
        return absmax.float()
    try:
        block, offset = int(state["nested_blocksize"]), float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        parts.fail(suffix, "nested_blocksize and nested_offset", repr(error))
    parts.need("weight.nested_quant_map", (256,))
    parts.need("weight.nested_absmax", (-(-len(absmax) // block),))
    scales = parts.read("weight.nested_absmax").float().repeat_interleave(block)[: len(absmax)]
    return parts.read("weight.nested_quant_map")[absmax.long()] * scales + offset
