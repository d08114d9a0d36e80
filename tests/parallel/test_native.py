"""4-bit layers over our own kernel: the weights are the file's, rounded nowhere."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from shoal.kernels.native import load_native
from shoal.parallel.blocks import read_blocks
from shoal.parallel.native import NativeInt4Linear


def make_layer(format: str, count: int, in_features: int) -> tuple[NativeInt4Linear, torch.Tensor]:
    """Of random blocks, and what they stand for."""
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    kind = GGMLQuantizationType[format]
    blocks = quantize(np.random.default_rng(count).standard_normal((count, in_features), np.float32), kind)
    codes = read_blocks(format, torch.from_numpy(blocks))
    return NativeInt4Linear(native, codes), torch.from_numpy(dequantize(blocks, kind))


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("count", [1, 64, 65, 2000])
def test_the_weights_are_the_files(format: str, count: int) -> None:
    """Rows of the identity read them out: they are exact until the result is rounded."""
    layer, dense = make_layer(format, count, 192)
    assert (layer.out_features, layer.in_features) == dense.shape
    assert torch.equal(layer.apply(torch.eye(192).bfloat16()), dense.T.bfloat16())


def test_input_need_not_be_contiguous() -> None:
    layer, _ = make_layer("Q4_1", 64, 192)
    x = torch.randn(5, 384).bfloat16()
    for part in (x[:, 192:], x[::2, :192], x[:, ::2]):
        assert torch.equal(layer.apply(part), layer.apply(part.contiguous()))


def test_memory_is_that_of_the_blocks() -> None:
    layer, dense = make_layer("Q4_1", 256, 512)
    assert layer.num_bytes() == dense.numel() // 32 * 20
