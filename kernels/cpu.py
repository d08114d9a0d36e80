"""`CpuOps`: the operations of `ops.py` for a CPU, where a torch call costs as much as the arithmetic of a decode step.

So the aim is few calls, on tensors that fit a core's cache. What is not here is `ReferenceOps`'. One instance serves
one rank's thread: it keeps what the layers of a step share.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, device

from .cpu_attention import AttentionPlan, Shape, plan_attention, run_attention
from .cpu_sampling import draw_rows
from .ops import Activation, AttentionBatch, AttentionSpec, Draw, KVLayer, SamplingBatch
from .reference import ReferenceOps, apply_activation


class CpuOps(ReferenceOps):
    """`Ops` in few torch calls."""

    def __init__(self, on: device) -> None:
        super().__init__(on)
        self._batch: AttentionBatch | None = None
        self._plans: dict[Shape, AttentionPlan] = {}
        self._slots = _SlotRows()
        self._angles = _Angles()
        self._roots: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        return self._scaled(x_TD, weight_D, eps).to(x_TD.dtype)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        return self._scaled(residual_TD.add_(x_TD), weight_D, eps).to(x_TD.dtype)

    def _scaled(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """The RMS norm in float32: 1 / sqrt(mean of squares + eps) is sqrt(D) / hypot(norm, sqrt(D eps))."""
        root, floor = self._norm_constants(x_TD.shape[-1], eps)
        norm: Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32)
        return (x_TD * torch.div(root, norm.hypot_(floor))).mul_(weight_D)

    def _norm_constants(self, size: int, eps: float) -> tuple[Tensor, Tensor]:
        key = (size, eps)
        if key not in self._roots:
            self._roots[key] = torch.tensor(size**0.5), torch.tensor((size * eps) ** 0.5)
        return self._roots[key]

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor:
        return F.layer_norm(x_TD.float(), weight_D.shape, weight_D, bias_D, eps).to(x_TD.dtype)

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor, *, interleaved: bool) -> None:
        dims = cos_sin_MC.shape[1]
        if interleaved or not q_THE.shape[0]:
            return super().rope(q_THE, k_TKE, positions_T, cos_sin_MC, interleaved=interleaved)
        cos_T11c, sin_T1c = self._angles.at(positions_T, cos_sin_MC)
        for x_THE in _joined(q_THE, k_TKE):
            part_THC = x_THE if x_THE.shape[-1] == dims else x_THE[..., :dims]
            x = part_THC.view(*part_THC.shape[:2], 2, dims // 2).float()
            rotated = x * cos_T11c
            first, second = x.unbind(2)
            rotated_first, rotated_second = rotated.unbind(2)
            rotated_first.addcmul_(second, sin_T1c, value=-1)
            rotated_second.addcmul_(first, sin_T1c)
            part_THC.copy_(rotated.flatten(-2))
        return None

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return apply_activation(gate, activation).mul_(up)

    def activation(self, x_TF: Tensor, activation: Activation) -> Tensor:
        return apply_activation(x_TF, activation)

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        if not is_plain(cache):
            return super().write_kv(k_TKE, v_TKE, cache, slots_T)
        rows_TK, stored = self._slots.at(slots_T, cache.k_NKBE.shape)
        for new, pages in ((k_TKE, cache.k_NKBE), (v_TKE, cache.v_NKBE)):
            new = new if stored is None else new[stored]
            pages.view(-1, pages.shape[-1])[rows_TK] = new.to(pages.dtype)
        return None

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        if spec.softcap is not None or sinks_H is not None or not is_plain(cache):
            return super().attention(q_THE, cache, batch, spec, sinks_H=sinks_H)
        if batch is not self._batch:  # held, so that no later batch can be taken for it
            # Padding rows (no tokens) come with captured graphs only: left to the plain path.
            self._batch, self._plans = batch, {}
        _, kv_heads, page_size, _ = cache.k_NKBE.shape
        shape = Shape(kv_heads, page_size, spec.window, q_THE.dtype)
        plan = self._plans.get(shape)
        if plan is None:
            if 0 in batch.kv_lens or 0 in batch.query_lens:
                return super().attention(q_THE, cache, batch, spec)
            plan = self._plans[shape] = plan_attention(batch, shape)
        return run_attention(q_THE, cache, plan, spec.scale)

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        best_R, tokens_R = logits_RV.max(dim=-1)  # a NaN is its row's maximum
        if not sampling.all_greedy:
            scores, columns = draw_rows(logits_RV, sampling, best_R, tokens_R)
            best_R, tokens_R = torch.tensor(scores), torch.tensor(columns, dtype=torch.int64)
        return tokens_R.masked_fill(~best_R.isfinite(), -1)

    def draw(
        self, logits_RV: Tensor, sampling: SamplingBatch, *, first_id: int, threshold_R: Tensor | None = None
    ) -> Draw:
        best_R, columns_R = logits_RV.max(dim=-1)
        score_R = best_R.float().nan_to_num(nan=math.inf, neginf=-math.inf, posinf=math.inf)
        if not sampling.all_greedy:
            kept_R = torch.full_like(score_R, -math.inf) if threshold_R is None else threshold_R
            scores, columns = draw_rows(logits_RV, sampling, score_R, columns_R, first_id=first_id, threshold_R=kept_R)
            score_R, columns_R = torch.tensor(scores), torch.tensor(columns, dtype=torch.int64)
        return Draw(score_R, columns_R + first_id)


def is_plain(cache: KVLayer) -> bool:
    """Numbers as they are, side by side: what the fast paths read and write."""
    return cache.k_scale_NKB is None and cache.k_NKBE.is_contiguous() and cache.v_NKBE.is_contiguous()


def _joined(q_THE: Tensor, k_TKE: Tensor) -> tuple[Tensor, ...]:
    """q and k as one tensor of heads where they are neighbours in a fused QKV: half the calls."""
    tokens, heads, dim = q_THE.shape
    strides = q_THE.stride()
    if (
        strides == k_TKE.stride()
        and strides[1:] == (dim, 1)
        and q_THE.untyped_storage().data_ptr() == k_TKE.untyped_storage().data_ptr()
        and k_TKE.storage_offset() == q_THE.storage_offset() + heads * dim
    ):
        return (q_THE.as_strided((tokens, heads + k_TKE.shape[1], dim), strides),)
    return q_THE, k_TKE


class _Angles:
    """Cosines and sines of the last positions asked for: all layers of a step ask for the same."""

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._positions = torch.empty(0)
        self._found = (self._positions, self._positions)

    def at(self, positions_T: Tensor, cos_sin_MC: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 1, 1, C/2] cosines and [T, 1, C/2] sines, float32."""
        # By content, not identity: a caller may fill the same tensor anew.
        if self._table is not cos_sin_MC or not torch.equal(self._positions, positions_T):
            cos, sin = cos_sin_MC.index_select(0, positions_T).float().chunk(2, dim=-1)
            self._found = cos[:, None, None].contiguous(), sin[:, None].contiguous()
            self._table, self._positions = cos_sin_MC, positions_T.clone()
        return self._found


class _SlotRows:
    """Where the last slots asked for lie in a cache seen as a table of N * K * B rows of E numbers."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._slots = torch.empty(0)
        self._found: tuple[Tensor, Tensor | None] = (self._slots, None)

    def at(self, slots_T: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """[stored, K] rows, and which tokens are stored (None: all)."""
        if self._shape != shape[1:] or not torch.equal(self._slots, slots_T):
            _, kv_heads, page_size, _ = shape
            kept = slots_T >= 0
            stored = None if bool(kept.all()) else kept
            slots = slots_T if stored is None else slots_T[stored]
            first = slots // page_size * (kv_heads * page_size) + slots % page_size
            self._found = first[:, None] + torch.arange(kv_heads) * page_size, stored
            self._shape, self._slots = tuple(shape[1:]), slots_T.clone()
        return self._found
