"""`DeterministicCpuOps`: a row's bits depend on its own sequence alone. Chosen in `select.py` for `--deterministic`.

What makes a row's bits depend on its company, on a CPU, and what is done about it:

- Products: oneDNN and MKL choose kernels, and with them the order of sums, by the number of rows. Here every product
  has the same number: tiles of `TILE` rows, the last one padded.
- Attention: the same, and paths for decode and prefill. Here every token alone: see `row_attention.py`.
- Functions like exp: a tensor's last elements do not fill a vector and go through the C library, which rounds
  differently; which elements those are depends on the number of rows (and threads). Here all of them go there.
- Sums over the last dim (norms, softmax) are taken row by row as they are; the fast norm ends in a `hypot` over all
  rows, here in a root, which is the same to the last bit either way.

The number of threads is fixed while a replica runs. What holds of torch's kernels is held by tests, at shapes that
meet their seams (`tests/kernels/test_deterministic.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import CpuOps, is_plain
from .cpu_attention import Shape
from .ops import Activation, AttentionBatch, AttentionSpec, KVLayer
from .reference import apply_activation, attend, gather_pages
from .row_attention import Gather, plan_attention, run_attention

# A product of one row costs as much as one of this many; a long prompt's costs twice what it would in one piece.
TILE = 16


class DeterministicCpuOps(CpuOps):
    """`Ops` of a CPU with one order of sums for every batch."""

    deterministic = True

    def __init__(self, on: torch.device) -> None:
        super().__init__(on)
        self._step: AttentionBatch | None = None
        self._gathers: dict[Shape, list[Gather]] = {}

    def linear(self, x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor:
        rows = x_TD.shape[0]
        padded = F.pad(x_TD, (0, 0, 0, -rows % TILE)).contiguous()
        tiles = [F.linear(tile, weight_FD) for tile in torch.split(padded, TILE)]
        y_TF = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return y_TF[:rows].to(dtype or x_TD.dtype)

    def _scaled(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        size = x_TD.shape[-1]
        norm: Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32)
        root = norm.square_().div_(size).add_(eps).sqrt_()
        return (x_TD / root).mul_(weight_D)

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return self.activation(gate, activation).mul_(up)

    def activation(self, x_TF: Tensor, activation: Activation) -> Tensor:
        # Two apart in memory, numbers are never taken as vectors.
        apart = x_TF.new_empty(*x_TF.shape, 2)[..., 0].copy_(x_TF)
        return apply_activation(apart, activation).contiguous()

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        special = spec.softcap is not None or sinks_H is not None or not is_plain(cache)
        if special or 0 in batch.kv_lens or 0 in batch.query_lens:
            return _one_by_one(q_THE, cache, batch, spec, sinks_H)
        if batch is not self._step:  # held, so that no later batch can be taken for it
            self._step, self._gathers = batch, {}
        _, kv_heads, page_size, _ = cache.k_NKBE.shape
        shape = Shape(kv_heads, page_size, spec.window, q_THE.dtype)
        plan = self._gathers.get(shape)
        if plan is None:
            plan = self._gathers[shape] = plan_attention(batch, shape)
        return run_attention(q_THE, cache, plan, spec.scale)


def _one_by_one(
    q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec, sinks_H: Tensor | None
) -> Tensor:
    """Each token over exactly the keys up to its own: the plain way, for what the flash kernel cannot do."""
    out_THE = torch.zeros(q_THE.shape, dtype=q_THE.dtype)
    token = 0
    for row_P, query_len, kv_len in zip(batch.block_table_SP, batch.query_lens, batch.kv_lens, strict=True):
        for seen in range(kv_len - query_len + 1, kv_len + 1):
            if kv_len:  # a padding row of a captured graph has no tokens: zeros
                one = slice(token, token + 1)
                out_THE[one] = attend(q_THE[one], *gather_pages(cache, row_P, seen), spec, sinks_H=sinks_H)
            token += 1
    return out_THE
