"""`NativeCpuOps`: `CpuOps` with the C++ kernels of `csrc/` wherever they fit the shapes, and torch wherever not."""

from typing import NamedTuple

import torch
from torch import Tensor, device

from .cpu import CpuOps
from .cpu_attention import Prefill, Shape, plan_prefills, run_prefills
from .native import DecodeShape, Native
from .ops import Activation, AttentionBatch, AttentionSpec, KVLayer


class _Plan(NamedTuple):
    """What layers of one shape share in a step."""

    decodes: DecodeShape
    prefills: list[Prefill]


class NativeCpuOps(CpuOps):
    """`Ops` of a CPU that has a compiler. Results of a row depend on that row alone, but for prompts' attention."""

    def __init__(self, on: device, native: Native) -> None:
        super().__init__(on)
        self._native = native
        self._planned: AttentionBatch | None = None
        self._by_layer: dict[tuple[object, ...], _Plan] = {}

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        if not (x_TD.dim() in (2, 3) and _fits(x_TD) and _is_plain(weight_D)):
            return super().rms_norm(x_TD, weight_D, eps=eps)
        out = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self._native.rms_norm(out, x_TD, weight_D, eps=eps)
        return out

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        if not (x_TD.dim() == 2 and _fits(x_TD) and _is_plain(residual_TD) and _is_plain(weight_D)):
            return super().add_rms_norm(x_TD, residual_TD, weight_D, eps=eps)
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self._native.rms_norm(out_TD, x_TD, weight_D, eps=eps, residual_TD=residual_TD)
        return out_TD

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor, *, interleaved: bool) -> None:
        fits = _fits(q_THE) and _fits(k_TKE) and q_THE.dtype is k_TKE.dtype and cos_sin_MC.shape[1] % 32 == 0
        if interleaved or not (fits and positions_T.dtype is torch.int64 and _is_plain(cos_sin_MC)):
            return super().rope(q_THE, k_TKE, positions_T, cos_sin_MC, interleaved=interleaved)
        return self._native.rope(q_THE, k_TKE, positions_T.contiguous(), cos_sin_MC)

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        fits = gate_up_T2F.dim() == 2 and gate_up_T2F.shape[-1] % 32 == 0 and _fits(gate_up_T2F)
        if activation is not Activation.SILU or not fits:
            return super().gated_activation(gate_up_T2F, activation)
        return self._native.swiglu(gate_up_T2F)

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        rows_fit = all(x.stride()[1:] == (x.shape[2], 1) and x.dtype is cache.k_NKBE.dtype for x in (k_TKE, v_TKE))
        if not (rows_fit and _is_contiguous(cache) and slots_T.dtype is torch.int64):
            return super().write_kv(k_TKE, v_TKE, cache, slots_T)
        return self._native.write_kv(k_TKE, v_TKE, cache, slots_T.contiguous())

    def attention(self, q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec) -> Tensor:
        fits = _fits(q_THE) and q_THE.stride(1) == q_THE.shape[2] and q_THE.dtype is cache.k_NKBE.dtype
        plan = self._plan(q_THE, cache, batch, spec) if fits and _is_contiguous(cache) else None
        if plan is None:
            return super().attention(q_THE, cache, batch, spec)
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
        self._native.decode_attention(out_THE, q_THE, cache, plan.decodes)
        if plan.prefills:
            run_prefills(out_THE, q_THE, cache, plan.prefills, scale=spec.scale)
        return out_THE

    def _plan(self, q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec) -> _Plan | None:
        """Made by the first of the layers that are alike. None: steps that are left to torch."""
        if not batch.num_decodes or 0 in batch.query_lens:  # padding rows come with captured graphs only
            return None
        if spec.softcap is not None and batch.num_decodes < len(batch.kv_lens):
            return None
        if batch is not self._planned:  # held, so that no later batch can be taken for it, nor its tensors be freed
            self._planned, self._by_layer = batch, {}
        key = (spec, q_THE.shape[1], q_THE.stride(0), cache.k_NKBE.shape[1:], q_THE.dtype)
        plan = self._by_layer.get(key)
        if plan is None:
            shape = Shape(cache.k_NKBE.shape[1], cache.k_NKBE.shape[2], spec.window, q_THE.dtype)
            plan = self._by_layer[key] = _Plan(_decode_shape(q_THE, cache, batch, spec), plan_prefills(batch, shape))
        return plan


def _fits(x: Tensor) -> bool:
    return Native.supports(x, size=x.shape[-1])


def _is_plain(x: Tensor) -> bool:
    """As the kernels read what is float32 for every dtype of activations."""
    return x.dtype is torch.float32 and x.is_contiguous()


def _is_contiguous(cache: KVLayer) -> bool:
    return cache.k_NKBE.is_contiguous() and cache.v_NKBE.is_contiguous()


def _decode_shape(q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec) -> DecodeShape:
    """Points into the batch's tensors: they must outlive it."""
    table_SP, lens_S = batch.block_table_SP, batch.kv_lens_S
    assert table_SP.dtype is lens_S.dtype is torch.int32, "the kernel reads 32-bit integers"
    assert table_SP.stride(1) == lens_S.stride(0) == 1, "the kernel reads them side by side"
    _, kv_heads, page_size, dim = cache.k_NKBE.shape
    return DecodeShape(
        table=table_SP.data_ptr(),
        lens=lens_S.data_ptr(),
        seqs=batch.num_decodes,
        table_stride=table_SP.stride(0),
        heads=q_THE.shape[1],
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        query_stride=q_THE.stride(0),
        window=spec.window or 0,
        max_len=max(batch.kv_lens[: batch.num_decodes]),
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
    )
