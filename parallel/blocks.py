"""llama.cpp's quantised blocks as `Codes`, for the kinds of block that are codes and scales and no more.

Layouts: ggml-common.h of llama.cpp. A block is a row of bytes here: R rows of a matrix, B blocks in each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import Codes, Kind

_Unpacked = tuple[Tensor, Tensor, Tensor | None]
"""Codes [R, D], scales [R, G] and zeros [R, G] or None."""


def reads_blocks(format: str) -> bool:
    """Whether `read_blocks` knows blocks of this name."""
    return format in _READERS


def group_of_blocks(format: str) -> int:
    """Weights that share a scale."""
    return _READERS[format][1]


def kind_of_blocks(format: str) -> Kind:
    """What `read_blocks` makes of them."""
    return Kind.INT4 if format.startswith("Q4") else Kind.INT8


def read_blocks(format: str, blocks: Tensor) -> Codes:
    """Rows of a matrix in GGUF's blocks called `format`, uint8 [R, bytes of a row], without loss."""
    reader, group, block_bytes = _READERS[format]
    codes_FD, scale_FG, zero_FG = reader(blocks.view(len(blocks), -1, block_bytes))
    return Codes(codes_FD, scale_FG, zero_FG, group, codes_FD.shape[1])


def _halves(raw: Tensor) -> Tensor:
    """float16 numbers out of bytes [..., 2 n]: float32 [..., n]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(pairs: Tensor) -> Tensor:
    """Low nibbles, then high ones: [..., n] -> [..., 2 n]."""
    return torch.cat((pairs & 15, pairs >> 4), -1)


def _q4_0(raw: Tensor) -> _Unpacked:
    """d, then byte j has weights j and j + 16: w = d * (q - 8)."""
    scale = _halves(raw[..., :2]).flatten(1)
    return _nibbles(raw[..., 2:]).flatten(1), scale, torch.full_like(scale, 8)


def _q4_1(raw: Tensor) -> _Unpacked:
    """d and m, then nibbles as in Q4_0: w = d * q + m."""
    scale, minimum = (part.flatten(1) for part in _halves(raw[..., :4]).chunk(2, -1))
    return _with_minimum(_nibbles(raw[..., 4:]).flatten(1), scale, minimum)


def _q4_k(raw: Tensor) -> _Unpacked:
    """256 weights: d and dmin, 8 six-bit scales and minima in 12 bytes, nibbles: w = d * scale * q - dmin * minimum."""
    d, dmin = _halves(raw[..., :4]).chunk(2, -1)
    packed = raw[..., 4:16]
    first, second, third = packed.chunk(3, -1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    # 32 bytes hold 64 weights: a group in their low nibbles, the next in their high ones.
    codes = _nibbles(raw[..., 16:].reshape(*raw.shape[:2], 4, 32))
    return _with_minimum(codes.flatten(1), (d * scales).flatten(1), -(dmin * minima).flatten(1))


def _with_minimum(codes_FD: Tensor, scale_FG: Tensor, minimum_FG: Tensor) -> _Unpacked:
    """w = scale * code + minimum as (code - zero) * scale, where a scale is 0, too: there w = (0 + 1) * minimum."""
    flat = scale_FG == 0
    group = codes_FD.shape[1] // scale_FG.shape[1]
    if flat.any():
        codes_FD = codes_FD.masked_fill(flat.repeat_interleave(group, 1), 0)
        scale_FG = torch.where(flat, minimum_FG, scale_FG)
        flat &= scale_FG == 0
    # Zeros where all is 0, so that nothing is divided by it.
    return codes_FD, scale_FG, -minimum_FG / scale_FG.masked_fill(flat, 1)


def _q5_0(raw: Tensor) -> _Unpacked:
    """d, 32 fifth bits, nibbles as in Q4_0: w = d * (q - 16)."""
    fifth = raw[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1
    codes = _nibbles(raw[..., 6:]) | fifth.flatten(-2) << 4
    return codes.view(torch.int8).sub_(16).flatten(1), _halves(raw[..., :2]).flatten(1), None


def _q6_k(raw: Tensor) -> _Unpacked:
    """256 weights: nibbles, pairs of bits, 16 signed scales, d: w = d * scale * (q - 32)."""
    low, high = raw[..., :128].reshape(-1, 2, 2, 32), raw[..., 128:192].reshape(-1, 2, 1, 32)
    nibbles = torch.cat((low & 15, low >> 4), -2)
    pairs = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = (nibbles | pairs << 4).view(torch.int8).sub_(32).view(len(raw), -1)
    scales = raw[..., 192:208].contiguous().view(torch.int8)
    return codes, (_halves(raw[..., 208:]) * scales).flatten(1), None


def _q8_0(raw: Tensor) -> _Unpacked:
    """d, then 32 signed bytes."""
    return raw[..., 2:].contiguous().view(torch.int8).flatten(1), _halves(raw[..., :2]).flatten(1), None


_READERS: dict[str, tuple[Callable[[Tensor], _Unpacked], int, int]] = {  # name: reader, group, bytes of a block
    "Q4_0": (_q4_0, 32, 18),
    "Q4_1": (_q4_1, 32, 20),
    "Q4_K": (_q4_k, 32, 144),
    "Q5_0": (_q5_0, 32, 22),
    "Q6_K": (_q6_k, 16, 210),
    "Q8_0": (_q8_0, 32, 34),
}
