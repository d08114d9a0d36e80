"""Linear methods over the Triton products, run by the interpreter where there is no GPU. The products' own tests are
`tests/kernels/test_quant_matmul.py`: here is what is chosen, and that it is given the right weights."""

import pytest
import torch

from shoal.parallel.codes import Float8, Quantised, in_groups
from shoal.parallel.gpu import GpuKernels

from .test_quant import random_codes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER, AMPERE = (9, 0), (8, 0)


def product(
    weight: Quantised, tokens: int, *, capability: tuple[int, int] = HOPPER, deterministic: bool = False
) -> float:
    """The error of the method for the weight, relative to the product of the dense numbers."""
    method = GpuKernels(DEVICE, capability=capability, deterministic=deterministic).make(weight)
    assert method is not None
    assert (method.out_features, method.in_features) == (weight.out_features, weight.in_features)
    assert method.num_bytes() < 1.6 * weight.out_features * weight.in_features
    torch.manual_seed(0)
    x = torch.randn(tokens, weight.in_features).to(DEVICE, torch.float16)
    found = method.apply(x)
    assert found.dtype == torch.float16
    expected = x.cpu().float() @ weight.dense().T
    assert found.shape == expected.shape
    return float((found.cpu().float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_four_bits(*, zeros: bool, deterministic: bool) -> None:
    weight, _ = random_codes(4, 96, 256, 64, zeros=zeros)
    assert product(weight, 3, deterministic=deterministic) < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_an_order_of_columns_that_was_cut(bits: int) -> None:
    whole, _ = random_codes(bits, 64, 256, 64, zeros=bits == 4)
    at = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:200]
    assert product(in_groups(whole.codes_FD[:, at], whole.scale_FG, whole.zero_FG, at // 64), 3) < 5e-3


@pytest.mark.parametrize("group", [16, 32, 64, 256])
def test_eight_bits(group: int) -> None:
    weight, _ = random_codes(8, 64, 256, group, zeros=False)
    assert product(weight, 3) < 5e-3


def test_what_is_left_dense() -> None:
    kernels = GpuKernels(DEVICE, capability=HOPPER, deterministic=False)
    assert kernels.make(random_codes(8, 64, 256, 64, zeros=True)[0]) is None
    assert kernels.make(random_codes(4, 64, 256, 16, zeros=True)[0]) is None
    assert kernels.make(float8((8, 8), block=32)) is None


def float8(scales: tuple[int, int], *, block: int | None = None, round_inputs: bool = False) -> Float8:
    torch.manual_seed(1)
    codes_FD = torch.randn(256, 256).to(torch.float8_e4m3fn)
    return Float8(codes_FD, 0.1 + torch.rand(scales), block, round_inputs)


@pytest.mark.parametrize(("scales", "block"), [((1, 1), None), ((256, 1), None), ((2, 2), 128)])
def test_fp8(scales: tuple[int, int], block: int | None) -> None:
    assert product(float8(scales, block=block), 3) < 5e-3


def test_inputs_are_rounded_where_the_checkpoint_asks_and_the_gpu_can() -> None:
    """Rounding costs precision, and is so seen."""
    rounded = float8((256, 1), round_inputs=True)
    assert 5e-3 < product(rounded, 70) < 5e-2
    assert product(rounded, 70, capability=AMPERE) < 5e-3
    assert product(rounded, 70, deterministic=True) < 5e-3
    assert product(float8((256, 1)), 70) < 5e-3
