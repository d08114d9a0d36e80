"""Non-linearities of the MLP, alone and as `act(gate) * up` (GLU variants, arXiv:2002.05202), elementwise."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import Activation

_BLOCK = 1024


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does
    return y


@triton.jit
def _activation_kernel(
    x_ptr, out_ptr, cols, x_stride_t, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row * x_stride_t
    y = activated(tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x_ptr + cols + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * cols + col, y.to(out_ptr.dtype.element_ty), mask=col < cols)


def activate(x_TF: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """act(x) of [T, F], or of [T, 2F], where gated, act(first half) * second half. Rows may be strided."""
    rows, cols = x_TF.shape[0], x_TF.shape[1] // (2 if gated else 1)
    out_TF = torch.empty((rows, cols), dtype=x_TF.dtype, device=x_TF.device)
    if out_TF.numel() == 0:
        return out_TF
    assert x_TF.stride(1) == 1
    _activation_kernel[(rows, triton.cdiv(cols, _BLOCK))](
        x_TF, out_TF, cols, x_TF.stride(0), ACTIVATION=activation.value, GATED=gated, BLOCK=_BLOCK
    )
    return out_TF
