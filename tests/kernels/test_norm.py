"""RMS norm and layer norm: the kernels against the reference, and the reference against torch's own."""

import pytest
import torch
from torch.nn import functional

from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.dtype == torch.bfloat16 and not expected.is_cuda:
        close(actual, expected)  # the interpreter cuts floats to bfloat16, where it should round
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(0, 64), (1, 64), (3, 80), (5, 576), (2, 4100)])
def test_norms(ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype, tokens: int, dim: int) -> None:
    x = torch.randn(tokens, dim, dtype=dtype, device=ops.device) * 3 + 1
    weight, bias = torch.randn(2, dim, device=ops.device)
    close(ops.rms_norm(x, weight, eps=EPS), reference.rms_norm(x, weight, eps=EPS))
    close(ops.layer_norm(x, weight, bias, eps=EPS), reference.layer_norm(x, weight, bias, eps=EPS))
    close(ops.layer_norm(x, weight, None, eps=EPS), reference.layer_norm(x, weight, None, eps=EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_add_the_residual_in_place(ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype) -> None:
    x, start = torch.randn(2, 4, 200, dtype=dtype, device=ops.device)
    weight, bias = torch.randn(2, 200, device=ops.device)
    ours, theirs = start.clone(), start.clone()
    close(ops.add_rms_norm(x, ours, weight, eps=EPS), reference.add_rms_norm(x, theirs, weight, eps=EPS))
    same_bits(ours, theirs)
    close(
        ops.add_layer_norm(x, ours, weight, bias, eps=EPS), reference.add_layer_norm(x, theirs, weight, bias, eps=EPS)
    )
    same_bits(ours, theirs)


@pytest.mark.parametrize(("heads", "dim"), [(4, 64), (3, 80), (1, 256)])
def test_rms_norm_per_head_of_a_fused_projection(ops: TritonOps, reference: ReferenceOps, heads: int, dim: int) -> None:
    qkv = torch.randn(5, (heads + 2) * dim, device=ops.device)
    heads_first = qkv[:, : heads * dim].view(5, heads, dim)  # strided: rows of the projection are longer
    weight = torch.randn(dim, device=ops.device)
    close(ops.rms_norm(heads_first, weight, eps=EPS), reference.rms_norm(heads_first, weight, eps=EPS))


def test_a_row_does_not_depend_on_the_others(ops: TritonOps) -> None:
    x, weight = torch.randn(7, 96, device=ops.device), torch.randn(96, device=ops.device)
    together = ops.rms_norm(x, weight, eps=EPS)
    assert torch.equal(together[3:4], ops.rms_norm(x[3:4], weight, eps=EPS))


def test_layer_norm_of_rows_far_from_zero(ops: TritonOps) -> None:
    x = torch.randn(2, 512, device=ops.device) + 1000
    expected = functional.layer_norm(x.double(), (512,), eps=EPS).float()
    actual = ops.layer_norm(x, torch.ones(512, device=ops.device), None, eps=EPS)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_reference_norms_are_the_textbook_ones(on_cpu: ReferenceOps) -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(40), torch.randn(40)
    close(on_cpu.rms_norm(x, weight, eps=EPS), functional.rms_norm(x, (40,), weight, EPS))
    close(on_cpu.layer_norm(x, weight, bias, eps=EPS), functional.layer_norm(x, (40,), weight, bias, EPS))
