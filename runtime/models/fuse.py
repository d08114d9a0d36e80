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
    if ops.deterministic or dtype is torch.float32:
        return lambda block, _parts: block
    if ops.device.type == "cuda":
        from .gpu_blocks import gpu_fuse

        return gpu_fuse(ops, comm, dtype=dtype)
    if isinstance(ops, NativeCpuOps) and dtype is torch.bfloat16:
        from .native_block import native_fuse

        return native_fuse(ops.native, comm)
    return lambda block, _parts: block
