"""The paged KV cache as tensors: one pair a layer. Which page is whose is `blocks.py`'s affair.

A pair a layer and not one tensor for all: in-place writes then touch a tensor that no other layer's view shares.
"""

import math
import mmap
from functools import partial

import torch

from ..kernels.kv_codes import largest_code
from ..kernels.ops import KVLayer
from .config import EngineConfig
from .errors import ConfigError
from .share import Share

_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SCALE = torch.float32
_FP8_CAPABILITY = (8, 9)  # of a GPU; before it there are no instructions for it


def cache_dtype(config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
    """What `--kv-cache-dtype` stands for."""
    return _DTYPES.get(config.kv_cache_dtype, model_dtype)


def bytes_per_block(share: Share, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over the rank's layers and heads, keys and values, and the scales of 8-bit ones."""
    num_kv_heads, head_dim = share.kv_shape
    scale = _SCALE.itemsize if largest_code(dtype) else 0
    return 2 * len(share.layers) * num_kv_heads * block_size * (head_dim * dtype.itemsize + scale)


def allocate(
    share: Share, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVLayer]:
    """[num_blocks, kv heads, block_size, head dim] for keys and for values of each of the rank's layers.

    Zeroed, since a masked slot still meets the arithmetic (0 * NaN is NaN). On a CPU memory is taken as it is written.

    Raises: ConfigError where the device cannot compute with the dtype.
    """
    _check(device, dtype)
    num_kv_heads, head_dim = share.kv_shape
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    zeros = _untouched_zeros if device.type == "cpu" else partial(torch.zeros, device=device)

    def layer() -> KVLayer:
        keys, values = zeros(shape, dtype=dtype), zeros(shape, dtype=dtype)
        if not largest_code(dtype):
            return KVLayer(keys, values)
        return KVLayer(keys, values, zeros(shape[:3], dtype=_SCALE), zeros(shape[:3], dtype=_SCALE))

    return [layer() for _ in share.layers]


def _check(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and dtype is torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            raise ConfigError(
                f"--kv-cache-dtype fp8: the GPU's compute capability is {capability[0]}.{capability[1]}, needed is "
                f"{_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or more: use int8, which takes as many bytes"
            )


def _untouched_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """Zero pages of the system, which become memory when they are written; `torch.zeros` writes them all at once."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
