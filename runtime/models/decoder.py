"""The decoder of all dense families: entry, blocks, exit. Built by `loader.py`; `forward` is the whole step.

How families differ is settled when the parts are put together: a block holds callables, never a flag. Calls cost as
much as small kernels do, so each part does as few of them as it can. Shape letters are those of `kernels/ops.py`.

A block's output is not added to the residual at once. It travels as `delta` to the next norm, which adds and
normalises in one kernel.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.ops import AttentionBatch, AttentionSpec, HeadSpec, KVLayer, Ops
from ...parallel.comm import Comm
from ...parallel.linear import Layer
from ...parallel.stage import Embed, Head
from ...parallel.station import Station
from .spec import ModelSpec

Enter = Callable[[Tensor, Tensor], Tensor]
"""(delta, residual) -> the next part's input. Adds delta to the residual, in place."""


class Step(NamedTuple):
    """What all layers share in one step."""

    positions_T: Tensor
    slots_T: Tensor
    attention: AttentionBatch


class Block(Protocol):
    """One layer. Takes the former block's delta, which it may overwrite, and gives its own; adds to the residual."""

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor: ...


X = TypeVar("X")
"""What a part's first product reads: activations [T, D], or what kernels make of them."""


class Attention(Generic[X]):
    """Fused QKV, what lies between it and attention in one operation, the paged cache, and the output projection."""

    __slots__ = ("_attend", "_dim", "_heads", "_out", "_prepare", "_qkv", "_spec")

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        ops: Ops,
        heads: HeadSpec,
        head_dim: int,
        qkv: Callable[[X], Tensor],
        out: Layer,
    ) -> None:
        """heads: this rank's. qkv: gives their queries, keys and values side by side, [T, (H + 2 K) * E]."""
        self._spec = spec
        self._heads = heads
        self._dim = head_dim
        self._prepare = ops.rotate_and_store
        self._attend = ops.attention
        self._qkv = qkv
        self._out = out

    def __call__(self, x: X, step: Step, cache: KVLayer) -> Tensor:
        qkv_TF = self._qkv(x)
        qkv_TNE = qkv_TF.view(qkv_TF.shape[0], -1, self._dim)
        q_THE = self._prepare(qkv_TNE, cache, self._heads, positions_T=step.positions_T, slots_T=step.slots_T)
        return self._out(self._attend(q_THE, cache, step.attention, self._spec).flatten(1))


class SequentialBlock(Generic[X]):
    """x += attention(x); x += mlp(x), with whatever norms before and after."""

    __slots__ = ("_attention", "_before_attention", "_before_mlp", "_mlp")

    def __init__(
        self,
        *,
        before_attention: Callable[[Tensor, Tensor], X],
        attention: Attention[X],
        before_mlp: Callable[[Tensor, Tensor], X],
        mlp: Callable[[X], Tensor],
    ) -> None:
        """before_attention, before_mlp: as `Enter`, giving what the part reads."""
        self._before_attention = before_attention
        self._attention = attention
        self._before_mlp = before_mlp
        self._mlp = mlp

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        attended_TD = self._attention(self._before_attention(delta_TD, residual_TD), step, cache)
        return self._mlp(self._before_mlp(attended_TD, residual_TD))


class ParallelBlock:
    """x += attention(x) + mlp(x). Both give partial sums, so a layer needs one all-reduce."""

    __slots__ = ("_attention", "_before_attention", "_before_mlp", "_comm", "_mlp")

    def __init__(
        self, *, before_attention: Enter, attention: Attention[Tensor], before_mlp: Enter, mlp: Layer, comm: Comm
    ) -> None:
        """before_mlp: (the attention's input, residual) -> the MLP's input; here it adds nothing."""
        self._before_attention = before_attention
        self._attention = attention
        self._before_mlp = before_mlp
        self._mlp = mlp
        self._comm = comm

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        x_TD = self._before_attention(delta_TD, residual_TD)
        mlp_TD = self._mlp(self._before_mlp(x_TD, residual_TD))
        return self._comm.all_reduce(self._attention(x_TD, step, cache).add_(mlp_TD))


class Decoder:
    """A stage's share of a model: the layers `layers`, the entry if they are the first, the exit if the last.

    embeds, has_head: whether it has the one, the other. Runs under `torch.inference_mode`. The cache has one `KVLayer`
    for each of the stage's layers, in order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        layers: range,
        blocks: Sequence[Block],
        entry: Embed | None,
        exit: Head | None,
        dtype: torch.dtype,
        weight_bytes: int = 0,
        station: Station | None = None,
    ) -> None:
        """dtype: of activations; the residual stream is float32. station: is told of every layer."""
        self.spec = spec
        self.layers = layers
        self.weight_bytes = weight_bytes
        self._dtype = dtype
        self._blocks = tuple(blocks)
        self.embeds = entry is not None
        self.has_head = exit is not None
        self._entry = entry
        self._exit = exit
        self._station = station or Station()

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attention: AttentionBatch,
        kv: Sequence[KVLayer],
    ) -> Tensor:
        """Hidden states [T, D], float32, before the final norm, of a model in one stage."""
        return self.run(self.embed(token_ids_T, positions_T), Step(positions_T, slots_T, attention), kv)

    def embed(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Hidden states [T, D], float32, that enter the first layer. Fresh."""
        assert self._entry is not None, "only the first stage embeds"
        return self._entry(token_ids_T, positions_T)

    def run(self, residual_TD: Tensor, step: Step, kv: Sequence[KVLayer]) -> Tensor:
        """This stage's layers. Overwrites its argument and returns it."""
        # Adding nothing spares the first layer a special case.
        delta_TD = torch.zeros_like(residual_TD, dtype=self._dtype)
        at = self._station.at
        for block, cache in zip(self._blocks, kv, strict=True):
            at("layer")
            delta_TD = block(delta_TD, residual_TD, step, cache)
        return residual_TD.add_(delta_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, this rank's V] float32, fresh: final norm, head, scale, softcap. Asked only for rows that need it."""
        assert self._exit is not None, "only the last stage has a head"
        return self._exit(hidden_RD)
