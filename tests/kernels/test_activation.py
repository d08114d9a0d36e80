"""Non-linearities: the kernels against the reference, and the reference against their formulas."""

import math

import pytest
import torch

from shoal.kernels.ops import Activation
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 100), (2, 1500)])
def test_activations(
    ops: TritonOps,
    reference: ReferenceOps,
    activation: Activation,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    tokens, columns = shape
    x = torch.randn(tokens, 2 * columns, dtype=dtype, device=ops.device) * 4
    tolerance = TOLERANCE[dtype]
    for actual, expected in (
        (ops.activation(x, activation), reference.activation(x, activation)),
        (ops.gated_activation(x, activation), reference.gated_activation(x, activation)),
        (ops.activation(x[:, :columns], activation), reference.activation(x[:, :columns], activation)),  # strided rows
    ):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", Activation)
def test_ends_of_the_range(ops: TritonOps, reference: ReferenceOps, activation: Activation) -> None:
    x = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e30, -1e30, float("nan")]], device=ops.device)
    torch.testing.assert_close(ops.activation(x, activation), reference.activation(x, activation), equal_nan=True)


def test_reference_formulas(on_cpu: ReferenceOps) -> None:
    formulas = {
        Activation.SILU: lambda x: x / (1 + math.exp(-x)),
        Activation.GELU: lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        Activation.GELU_TANH: lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        Activation.RELU: lambda x: max(x, 0.0),
    }
    x = torch.linspace(-4, 4, 9)[None]
    for activation, formula in formulas.items():
        expected = torch.tensor([[formula(value) for value in x[0].tolist()]])
        torch.testing.assert_close(on_cpu.activation(x, activation), expected)
        gated = on_cpu.gated_activation(torch.cat([x, x + 1], dim=1), activation)
        torch.testing.assert_close(gated, expected * (x + 1))
