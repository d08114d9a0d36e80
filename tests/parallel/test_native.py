"""4-bit layers over our own kernel: the weights are the file's, rounded nowhere."""

from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from shoal.kernels.native import load_native
from shoal.parallel.native import NativeInt4Linear
from shoal.parallel.quant import _read_q4_blocks, packed_linear

CPU = torch.device("cpu")


def make_layer(format: str, counts: list[int], in_features: int) -> tuple[NativeInt4Linear, torch.Tensor]:
    """Of random blocks, and what they stand for."""
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    kind = GGMLQuantizationType[format]
    rows = [quantize(np.random.default_rng(n).standard_normal((n, in_features), np.float32), kind) for n in counts]
    dense = torch.cat([torch.from_numpy(dequantize(part, kind)) for part in rows])
    return NativeInt4Linear(native, partial(_read_q4_blocks, format), rows, in_features), dense


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("counts", [[1], [5, 60], [64], [2000]])
def test_the_weights_are_the_files(format: str, counts: list[int]) -> None:
    """Rows of the identity read them out: they are exact until the result is rounded."""
    layer, dense = make_layer(format, counts, 192)
    assert (layer.out_features, layer.in_features) == dense.shape
    assert torch.equal(layer.apply(torch.eye(192).bfloat16()), dense.T.bfloat16())


def test_input_need_not_be_contiguous() -> None:
    layer, _ = make_layer("Q4_1", [64], 192)
    x = torch.randn(5, 384).bfloat16()
    for part in (x[:, 192:], x[::2, :192], x[:, ::2]):
        assert torch.equal(layer.apply(part), layer.apply(part.contiguous()))


def test_memory_is_that_of_the_blocks() -> None:
    layer, dense = make_layer("Q4_1", [256], 512)
    assert layer.num_bytes() == dense.numel() // 32 * 20


@pytest.mark.parametrize("deterministic", [True, False])
def test_it_is_chosen_where_it_can_be_built(*, deterministic: bool) -> None:
    make_layer("Q4_0", [1], 32)
    rows = [np.zeros((64, 40), np.uint8)]
    chosen = packed_linear("Q4_1", rows, in_features=64, device=CPU, dtype=torch.bfloat16, deterministic=deterministic)
    assert isinstance(chosen, NativeInt4Linear)
