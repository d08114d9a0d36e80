"""The paged KV cache as tensors: one pair a layer. Which page is whose is `blocks.py`'s affair.

A pair a layer and not one tensor for all: in-place writes then touch a tensor that no other layer's view shares.
"""

import math
import mmap
from functools import partial

import torch

from ..kernels.ops import KVLayer
from .share import Share


def bytes_per_block(share: Share, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over the rank's layers and heads, keys and values."""
    num_kv_heads, head_dim = share.kv_shape
    return 2 * len(share.layers) * num_kv_heads * block_size * head_dim * dtype.itemsize


def allocate(
    share: Share, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVLayer]:
    """[num_blocks, kv heads, block_size, head dim] for keys and for values of each of the rank's layers.

    Zeroed, since a masked slot still meets the arithmetic (0 * NaN is NaN). On a CPU memory is taken as it is written.
    """
    num_kv_heads, head_dim = share.kv_shape
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    zeros = _untouched_zeros if device.type == "cpu" else partial(torch.zeros, device=device)
    return [KVLayer(zeros(shape, dtype=dtype), zeros(shape, dtype=dtype)) for _ in share.layers]


def _untouched_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """Zero pages of the system, which become memory when they are written; `torch.zeros` writes them all at once."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
