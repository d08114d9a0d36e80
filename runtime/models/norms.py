"""Norms of one model as plain callables, and those of queries and keys that `Ops.rotate_and_store` does not know."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels.ops import NormWeight, Ops
from ...parallel.comm import Comm
from ...parallel.linear import Layer
from .spec import NormKind, NormSpec

Normalise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q_THE, k_TKE) -> the same, normalised."""


class Norm:
    """One norm's weights; gives the two forms that blocks use."""

    def __init__(self, spec: NormSpec, *, ops: Ops, weight_D: Tensor, bias_D: Tensor | None = None) -> None:
        self._spec = spec
        self._ops = ops
        self._weight_D = weight_D
        self._bias_D = bias_D

    def rms(self) -> NormWeight | None:
        """Its weight if it is an RMS norm."""
        return NormWeight(self._weight_D, self._spec.eps) if self._spec.kind is NormKind.RMS else None

    def alone(self) -> Callable[[Tensor], Tensor]:
        """x -> norm(x)."""
        eps, weight_D = self._spec.eps, self._weight_D
        if self._spec.kind is NormKind.RMS:
            return partial(self._ops.rms_norm, weight_D=weight_D, eps=eps)
        return partial(self._ops.layer_norm, weight_D=weight_D, bias_D=self._bias_D, eps=eps)

    def after_add(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(delta, residual) -> norm(residual + delta), the sum stored in the residual."""
        eps, weight_D = self._spec.eps, self._weight_D
        if self._spec.kind is NormKind.RMS:
            return partial(self._ops.add_rms_norm, weight_D=weight_D, eps=eps)
        return partial(self._ops.add_layer_norm, weight_D=weight_D, bias_D=self._bias_D, eps=eps)


def add_only(delta_TD: Tensor, residual_TD: Tensor) -> Tensor:
    """Where a part has no norm before it: it reads the residual itself."""
    return residual_TD.add_(delta_TD).to(delta_TD.dtype)


def normalised(qkv: Layer, normalise: Normalise, *, num_query: int, num_kv: int, head_dim: int) -> Layer:
    """A fused projection of H + 2 K heads, its queries and keys normalised where they lie."""

    def project(x_TD: Tensor) -> Tensor:
        qkv_TF = qkv(x_TD)
        heads_TNE = qkv_TF.view(x_TD.shape[0], -1, head_dim)
        q_THE, k_TKE, _ = heads_TNE.split_with_sizes((num_query, num_kv, num_kv), dim=1)
        for heads, changed in zip((q_THE, k_TKE), normalise(q_THE, k_TKE), strict=True):
            heads.copy_(changed)
        return qkv_TF

    return project


class HeadNorm:
    """Each head alone, all with the weights of one: layer norms, RMS norms being fused with the rotation."""

    def __init__(self, q: Norm, k: Norm) -> None:
        self._q = q.alone()
        self._k = k.alone()

    def __call__(self, q_THE: Tensor, k_TKE: Tensor) -> tuple[Tensor, Tensor]:
        return self._q(q_THE), self._k(k_TKE)


class EachHeadNorm:
    """Each head alone, with weights of its own: normalised with weights of one, then scaled."""

    def __init__(self, spec: NormSpec, *, ops: Ops, q_weight_HE: Tensor, k_weight_KE: Tensor) -> None:
        plain = Norm(spec, ops=ops, weight_D=torch.ones_like(q_weight_HE[0]))
        self._plain = plain.alone()
        self._q_weight_HE = q_weight_HE
        self._k_weight_KE = k_weight_KE

    def __call__(self, q_THE: Tensor, k_TKE: Tensor) -> tuple[Tensor, Tensor]:
        dtype = q_THE.dtype
        q = self._plain(q_THE) * self._q_weight_HE
        k = self._plain(k_TKE) * self._k_weight_KE
        return q.to(dtype), k.to(dtype)


class FullRMSNorm:
    """All heads of all ranks together (OLMo 2): the ranks sum their squares first.

    copies: how many ranks hold these KV heads; each counts for its share.
    """

    def __init__(
        self,
        spec: NormSpec,
        *,
        comm: Comm,
        q_weight_HE: Tensor,
        k_weight_KE: Tensor,
        totals: tuple[int, int],
        copies: int,
    ) -> None:
        self._eps = spec.eps
        self._comm = comm
        self._weights = (q_weight_HE, k_weight_KE)
        self._shares = torch.tensor([1 / totals[0], 1 / (totals[1] * copies)], device=q_weight_HE.device)

    def __call__(self, q_THE: Tensor, k_TKE: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q_THE.float(), k_TKE.float()
        squares_T2 = torch.stack([q.square().sum((1, 2)), k.square().sum((1, 2))], dim=-1)
        means_T2 = self._comm.all_reduce(squares_T2 * self._shares)
        by_T211 = torch.rsqrt(means_T2 + self._eps)[:, :, None, None]
        q, k = q * by_T211[:, 0] * self._weights[0], k * by_T211[:, 1] * self._weights[1]
        return q.to(q_THE.dtype), k.to(k_TKE.dtype)
