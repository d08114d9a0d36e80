"""The product of a layer with one order of sums for every number of rows: `TritonOps(deterministic=True)`.

cuBLAS picks tiles and splits of the inner dim by the number of rows, so a row's bits change with its company. Here one
tile shape serves decode and prefill, no sum is split, and K is walked in one order (the batch-invariant products of
Thinking Machines' "Defeating Nondeterminism in LLM Inference", 2025). The price is a tile that is tall for decoding and
small for prefill.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import torch
import triton
import triton.language as tl
from torch import Tensor


# The number of rows must not even choose between compiled variants.
@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    out_features,
    in_features,
    x_stride_t,
    weight_stride_f,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Rows vary fastest: the programs that run together read the same weights.
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, in_features, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        x_at = x_ptr + row_M[:, None] * x_stride_t + inner_K[None, :]
        x_MK = tl.load(x_at, mask=(row_M < num_rows)[:, None] & (inner_K < in_features)[None, :], other=0.0)
        weight_at = weight_ptr + col_N[:, None] * weight_stride_f + inner_K[None, :]
        weight_mask = (col_N < out_features)[:, None] & (inner_K < in_features)[None, :]
        weight_NK = tl.load(weight_at, mask=weight_mask, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            x_MK = x_MK.to(tl.float32)
            weight_NK = weight_NK.to(tl.float32)
        # "ieee": without it, float32 would be multiplied as tf32.
        acc_MN = tl.dot(x_MK, tl.trans(weight_NK), acc_MN, input_precision="ieee")
    out_mask = (row_M < num_rows)[:, None] & (col_N < out_features)[None, :]
    out_at = out_ptr + row_M[:, None] * out_features + col_N[None, :]
    tl.store(out_at, acc_MN.to(out_ptr.dtype.element_ty), mask=out_mask)


def matmul(x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor:
    """`kernels.linear.Linear`. A row's bits depend on the row and the weight alone. The last dims are contiguous."""
    rows, inner = x_TD.shape
    features = weight_FD.shape[0]
    out_TF = torch.empty((rows, features), dtype=dtype or x_TD.dtype, device=x_TD.device)
    if out_TF.numel() == 0:
        return out_TF
    assert x_TD.dtype == weight_FD.dtype
    assert x_TD.stride(1) == weight_FD.stride(1) == 1
    is_half = x_TD.element_size() <= 2
    block_m, block_n = (64, 64) if is_half else (32, 32)  # float32 has no tensor cores: its dots unroll
    _matmul_kernel[(triton.cdiv(rows, block_m), triton.cdiv(features, block_n))](
        x_TD,
        weight_FD,
        out_TF,
        rows,
        features,
        inner,
        x_TD.stride(0),
        weight_FD.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if is_half else 32,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=3 if is_half else 1,
    )
    return out_TF
