"""Faster blocks that mean the same as the composed ones: chosen by the loader, layer by layer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.cpu_native import NativeCpuOps
from ...kernels.ops import HeadSpec, NormWeight, Ops
from ...parallel.comm import Comm
from ...parallel.quant import LinearMethod
from .decoder import Block
from .spec import LayerSpec

Weights = tuple[LinearMethod, Tensor | None]
"""A matrix and its bias."""


class LayerWeights(NamedTuple):
    """A layer's matrices on this rank."""

    qkv: Weights
    out: Weights
    up: Weights
    down: Weights


class LayerParts(NamedTuple):
    """What a layer is made of whose parts' outputs go into the residual as they are."""

    norms: tuple[NormWeight | None, NormWeight | None]  # before attention, before the MLP; None: none, or another kind
    weights: LayerWeights
    heads: HeadSpec
    head_dim: int
    spec: LayerSpec


Fuse = Callable[[Block, LayerParts], Block]
"""Gives the block, or a faster one that means the same."""


def select_fuse(ops: Ops, comm: Comm, *, dtype: torch.dtype) -> Fuse:
    """What a rank does with its blocks: nothing, where there are no kernels for activations of `dtype`."""
    if dtype is torch.bfloat16 and not ops.deterministic:
        if isinstance(ops, NativeCpuOps):
            from .native_block import native_fuse

            return native_fuse(ops.native, comm)
        if ops.device.type == "cuda":
            from .few_rows_block import few_rows_fuse

            return few_rows_fuse(ops, comm)
    return lambda block, _parts: block
