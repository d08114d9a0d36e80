"""RMS norm and layer norm, with the residual add folded in: one read and one write of each row.

RMS norm: arXiv:1910.07467; layer norm: arXiv:1607.06450. A row lies whole in one program's registers, so the layer
norm's variance is that of the centred row (two passes over registers, not the cancelling E[x^2] - E[x]^2).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program should hold: narrow rows (norms per head) share one.
_PROGRAM_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    heads,
    x_stride_t,
    x_stride_h,
    residual_stride_t,
    eps,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, DIM_P2)[None, :]
    mask = (row < num_rows) & (col < DIM)
    x = tl.load(x_ptr + row // heads * x_stride_t + row % heads * x_stride_h + col, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual_ptr + row * residual_stride_t + col
        # Rounded to storage before the norm, so that the norm is of what later layers will read.
        total = (x + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, total, mask=mask)
        x = total.to(tl.float32)
    if CENTRED:
        x = tl.where(mask, x - (tl.sum(x, axis=1) / DIM)[:, None], 0.0)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / DIM + eps))[:, None]
    y *= tl.load(weight_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * DIM + col, y.to(out_ptr.dtype.element_ty), mask=mask)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float, centred: bool
) -> Tensor:
    """Norm over the last dim of x [..., D], 2 or 3 dims, the last contiguous; a residual [T, D] is updated in place."""
    dim = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * heads
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    assert x.stride(-1) == 1
    assert residual is None or (x.dim() == 2 and residual.stride(-1) == 1)
    dim_p2 = triton.next_power_of_2(dim)
    # Not by the number of rows: how a row's sum is spread over threads would then depend on its company.
    block_rows = min(max(1, _PROGRAM_ELEMENTS // dim_p2), 16)
    _norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        residual,
        weight,
        bias,
        out,
        num_rows,
        heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        DIM=dim,
        DIM_P2=dim_p2,
        BLOCK_ROWS=block_rows,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        CENTRED=centred,
        num_warps=min(max(dim_p2 * block_rows // 512, 1), 16),
    )
    return out
