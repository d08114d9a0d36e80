"""Layers over our own kernels: the weights are the file's, rounded nowhere."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from shoal.kernels.native import load_native
from shoal.parallel.blocks import read_blocks
from shoal.parallel.codes import cut_columns
from shoal.parallel.native import NativeDenseLinear, NativeInt4Linear, NativeInt8Linear
from shoal.parallel.quant import CpuKernels

from .test_blocks import expected, random_blocks


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


@pytest.mark.parametrize("format", ["Q3_K", "IQ4_NL", "IQ4_XS", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"])
def test_blocks_that_are_no_four_bits_stay_codes(format: str) -> None:
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    blocks = random_blocks(format, 70)
    codes, dense = read_blocks(format, torch.from_numpy(blocks)), expected(format, blocks)
    layer = CpuKernels(native, None, deterministic=False).make(codes)
    assert isinstance(layer, NativeInt8Linear)
    assert layer.num_bytes() <= 96 * dense.shape[1] * 10 / 8  # in whole tiles
    found = layer.apply(torch.eye(layer.in_features).bfloat16()).T
    if codes.zero_FG is None:
        assert torch.equal(found, dense.bfloat16())
    else:  # the sum of two products: rounded once more
        torch.testing.assert_close(found.float(), dense, rtol=2**-8, atol=1e-6 * float(dense.abs().max()))


@pytest.mark.parametrize(("start", "stop"), [(0, 256), (16, 272), (64, 112), (256, 512)])
def test_a_cut_of_q6_k_keeps_its_groups(start: int, stop: int) -> None:
    """Groups of 16: a rank that holds some columns pads nothing, and dequantises nothing."""
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    blocks = random_blocks("Q6_K", 40)
    codes = cut_columns(read_blocks("Q6_K", torch.from_numpy(blocks)), start, stop)
    layer = CpuKernels(native, None, deterministic=False).make(codes)
    assert layer is not None
    dense = expected("Q6_K", blocks)[:, start:stop]
    assert torch.equal(layer.apply(torch.eye(stop - start).bfloat16()), dense.T.bfloat16())


def test_input_need_not_be_contiguous() -> None:
    layer, _ = make_layer("Q4_1", 64, 192)
    x = torch.randn(5, 384).bfloat16()
    for part in (x[:, 192:], x[::2, :192], x[:, ::2]):
        assert torch.equal(layer.apply(part), layer.apply(part.contiguous()))


def test_memory_is_that_of_the_blocks() -> None:
    layer, dense = make_layer("Q4_1", 256, 512)
    assert layer.num_bytes() == dense.numel() // 32 * 20


def test_numbers_are_packed_where_that_takes_no_more_memory() -> None:
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    kernels = CpuKernels(native, None, deterministic=False)
    weight = torch.randn(96, 160).bfloat16()
    layer = kernels.dense(weight)
    assert isinstance(layer, NativeDenseLinear)
    assert layer.num_bytes() == weight.nbytes
    assert torch.equal(layer.apply(torch.eye(160).bfloat16()), weight.T)
    for odd in (weight[:95], weight[:, :159], weight.half(), weight.float()):
        assert kernels.dense(odd) is None
    assert CpuKernels(None, None, deterministic=False).dense(weight) is None
