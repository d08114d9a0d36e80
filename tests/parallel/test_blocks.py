"""llama.cpp's blocks as codes: the numbers are those of the gguf package."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from shoal.parallel.blocks import group_of_blocks, kind_of_blocks, read_blocks, reads_blocks

SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q8_0": (0,), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Formats that are read, and at which bytes of their blocks the float16 numbers lie."""


def random_blocks(format: str, rows: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Any bytes are sound codes; the float16 numbers are of a usual size."""
    rng = np.random.default_rng(seed)
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    blocks = rng.integers(0, 256, (rows, 2, block_bytes), dtype=np.uint8)
    for at in SCALES[format]:
        numbers = rng.standard_normal((rows, 2, 1)).astype(np.float16)
        blocks[..., at : at + 2] = numbers.view(np.uint8)
    return blocks.reshape(rows, -1)


def expected(format: str, blocks: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[format]))


@pytest.mark.parametrize("format", SCALES)
def test_numbers_are_the_packages(format: str) -> None:
    blocks = random_blocks(format, 20)
    codes, numbers = read_blocks(format, torch.from_numpy(blocks)), expected(format, blocks)
    assert codes.group == group_of_blocks(format)
    assert codes.kind is kind_of_blocks(format)
    torch.testing.assert_close(codes.dense(), numbers, rtol=0, atol=1e-6 * float(numbers.abs().max()))


@pytest.mark.parametrize("format", ["Q4_1", "Q4_K", "Q5_1", "Q5_K"])
@pytest.mark.parametrize("minimum", [0.5, 0.0])
def test_a_block_of_one_number(format: str, minimum: float) -> None:
    """Its scale is 0, and nothing may be divided by it."""
    blocks = random_blocks(format, 4)
    split = blocks.reshape(8, -1)
    split[:, :2] = 0
    split[:, 2:4] = np.array([minimum], np.float16).view(np.uint8)
    codes, numbers = read_blocks(format, torch.from_numpy(blocks)), expected(format, blocks)
    torch.testing.assert_close(codes.dense(), numbers)
    assert codes.zero_FG is not None
    assert codes.zero_FG.isfinite().all()


def test_others_are_not_read() -> None:
    assert not any(reads_blocks(format) for format in ("Q2_K", "IQ3_S", "F16"))
