"""`NativeCpuOps`: `CpuOps` with the C++ kernels of `csrc/` wherever they fit the shapes, and torch wherever not."""

from typing import NamedTuple

import torch
from torch import Tensor, device

from .cpu import CpuOps, is_plain
from .cpu_attention import Prefill, Shape, plan_prefills, run_prefills
from .native import STEP, DecodeShape, Native, PrefillShape, decode_shape, prefill_shapes, reads_cache
from .ops import Activation, AttentionBatch, AttentionSpec, KVLayer


class _Plan(NamedTuple):
    """What layers of one shape share in a step."""

    decodes: DecodeShape
    prefills: list[PrefillShape]
    torch_prefills: list[Prefill]  # instead, where there is no kernel


class NativeCpuOps(CpuOps):
    """`Ops` of a CPU that has a compiler. A row's results depend on that row alone, except where torch computes."""

    def __init__(self, on: device, native: Native) -> None:
        super().__init__(on)
        self.native = native
        self._planned: AttentionBatch | None = None
        self._by_layer: dict[tuple[object, ...], _Plan] = {}

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        if not (x_TD.dim() in (2, 3) and _fits(x_TD) and _is_plain(weight_D)):
            return super().rms_norm(x_TD, weight_D, eps=eps)
        out = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self.native.rms_norm(out, x_TD, weight_D, eps=eps)
        return out

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        if not (x_TD.dim() == 2 and _fits(x_TD) and _is_plain(residual_TD) and _is_plain(weight_D)):
            return super().add_rms_norm(x_TD, residual_TD, weight_D, eps=eps)
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self.native.rms_norm(out_TD, x_TD, weight_D, eps=eps, residual_TD=residual_TD)
        return out_TD

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor, *, interleaved: bool) -> None:
        fits = _fits(q_THE) and _fits(k_TKE) and q_THE.dtype is k_TKE.dtype and cos_sin_MC.shape[1] % 32 == 0
        if interleaved or not (fits and positions_T.dtype is torch.int64 and _is_plain(cos_sin_MC)):
            return super().rope(q_THE, k_TKE, positions_T, cos_sin_MC, interleaved=interleaved)
        return self.native.rope(q_THE, k_TKE, positions_T.contiguous(), cos_sin_MC)

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        fits = gate_up_T2F.dim() == 2 and gate_up_T2F.shape[-1] % 32 == 0 and _fits(gate_up_T2F)
        if activation is not Activation.SILU or not fits:
            return super().gated_activation(gate_up_T2F, activation)
        return self.native.swiglu(gate_up_T2F)

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        rows_fit = all(x.stride()[1:] == (x.shape[2], 1) and reads_cache(cache, x.dtype) for x in (k_TKE, v_TKE))
        whole = cache.k_scale_NKB is None or k_TKE.shape[2] % 16 == 0  # vectors of numbers that become codes
        if not (rows_fit and whole and slots_T.dtype is torch.int64):
            return super().write_kv(k_TKE, v_TKE, cache, slots_T)
        return self.native.write_kv(k_TKE, v_TKE, cache, slots_T.contiguous())

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        fits = _fits(q_THE) and q_THE.stride(1) == q_THE.shape[2] and reads_cache(cache, q_THE.dtype)
        plan = self._plan(q_THE, cache, batch, spec) if fits and sinks_H is None else None
        if plan is None:
            return super().attention(q_THE, cache, batch, spec, sinks_H=sinks_H)
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
        self.native.decode_attention(out_THE, q_THE, cache, plan.decodes)
        start = batch.num_decodes
        for shape in plan.prefills:
            self.native.prefill_attention(out_THE[start:], q_THE[start:], cache, shape)
            start += shape.tokens
        run_prefills(out_THE, q_THE, cache, plan.torch_prefills, scale=spec.scale)
        return out_THE

    def _plan(self, q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec) -> _Plan | None:
        """Made by the first of the layers that are alike. None: steps that are left to torch."""
        if 0 in batch.query_lens:  # padding rows come with captured graphs only
            return None
        tiles = q_THE.dtype is torch.bfloat16 and q_THE.shape[2] % STEP == 0
        by_torch = batch.num_decodes < len(batch.kv_lens) and not tiles
        if by_torch and (spec.softcap is not None or not batch.num_decodes or not is_plain(cache)):
            return None
        if batch is not self._planned:  # held, so that no later batch can be taken for it, nor its tensors be freed
            self._planned, self._by_layer = batch, {}
        key = (spec, q_THE.shape[1], q_THE.stride(0), cache.k_NKBE.shape[1:], q_THE.dtype)
        plan = self._by_layer.get(key)
        if plan is None:
            shape = Shape(cache.k_NKBE.shape[1], cache.k_NKBE.shape[2], spec.window, q_THE.dtype)
            sizes = {"heads": q_THE.shape[1], "query_stride": q_THE.stride(0)}
            plan = self._by_layer[key] = _Plan(
                decode_shape(cache, batch, spec, **sizes),
                prefill_shapes(cache, batch, spec, **sizes) if tiles else [],
                [] if tiles else plan_prefills(batch, shape),
            )
        return plan


def _fits(x: Tensor) -> bool:
    return Native.supports(x, size=x.shape[-1])


def _is_plain(x: Tensor) -> bool:
    """As the kernels read what is float32 for every dtype of activations."""
    return x.dtype is torch.float32 and x.is_contiguous()
