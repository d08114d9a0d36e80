"""llama.cpp's quantised blocks as `Codes`, for the kinds of block that are codes and scales and no more.

Layouts: ggml-common.h of llama.cpp. A block is a row of bytes here: R rows of a matrix, B blocks in each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import Codes, Kind

_Unpacked = tuple[Tensor, Tensor, Tensor | None]
"""Codes [R, D], scales [R, G] and zeros [R, G] or None."""


_PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
_IQ4_VALUES = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)


def reads_blocks(format: str) -> bool:
    """Whether `read_blocks` knows blocks of this name."""
    return format in _READERS


def group_of_blocks(format: str) -> int:
    """Weights that share a scale."""
    return _READERS[format][1]


def kind_of_blocks(format: str) -> Kind:
    """What `read_blocks` makes of them."""
    return Kind.INT4 if format.startswith("Q4") else Kind.INT8


def has_zeros(format: str) -> bool:
    """Whether they are of 8 bits, with zeros."""
    return format in ("Q5_1", "Q5_K")


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
    # 32 bytes hold 64 weights: a group in their low nibbles, the next in their high ones.
    codes = _nibbles(raw[..., 16:].reshape(*raw.shape[:2], 4, 32))
    return _with_minimum(codes.flatten(1), *_six_bit_scales(raw[..., :16]))


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of a Q4_K's or Q5_K's groups of 32, each [R, G], out of the blocks' first 16 bytes."""
    d, dmin = _halves(raw[..., :4]).chunk(2, -1)
    first, second, third = raw[..., 4:].chunk(3, -1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return (d * scales).flatten(1), -(dmin * minima).flatten(1)


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


def _q5_1(raw: Tensor) -> _Unpacked:
    """d and m, 32 fifth bits, nibbles as in Q4_0: w = d * q + m."""
    fifth = raw[..., 4:8, None] >> torch.arange(8, dtype=torch.uint8) & 1
    codes = (_nibbles(raw[..., 8:]) | fifth.flatten(-2) << 4).view(torch.int8)
    scale, minimum = (part.flatten(1) for part in _halves(raw[..., :4]).chunk(2, -1))
    return _with_minimum(codes.flatten(1), scale, minimum)


def _q5_k(raw: Tensor) -> _Unpacked:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit g of byte j is weight j's of group g."""
    fifth = raw[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    nibbles = _nibbles(raw[..., 48:].reshape(*raw.shape[:2], 4, 32)).reshape(*raw.shape[:2], 8, 32)
    codes = (nibbles | fifth << 4).view(torch.int8)
    return _with_minimum(codes.flatten(1), *_six_bit_scales(raw[..., :16]))


def _q3_k(raw: Tensor) -> _Unpacked:
    """256 weights: third bits, pairs of bits, 16 six-bit scales, d: w = d * (scale - 32) * (q - 4)."""
    third = raw[..., :32].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    pairs = raw[..., 32:96].reshape(*raw.shape[:2], 2, 1, 32) >> _PAIRS[:, None] & 3
    codes = (pairs.flatten(2) | third.flatten(2) << 2).view(torch.int8).sub_(4)
    packed = raw[..., 96:108]
    high = (packed[..., None, 8:] >> _PAIRS[:, None] & 3).flatten(-2)
    scales = (_nibbles(packed[..., :8]) | high << 4).view(torch.int8).sub(32)
    return codes.flatten(1), (_halves(raw[..., 108:]) * scales).flatten(1), None


def _iq4_nl(raw: Tensor) -> _Unpacked:
    """d, nibbles as in Q4_0: w = d * value[q]."""
    return _IQ4_VALUES[_nibbles(raw[..., 2:]).int()].flatten(1), _halves(raw[..., :2]).flatten(1), None


def _iq4_xs(raw: Tensor) -> _Unpacked:
    """256 weights: d, upper pairs and nibbles of 8 scales, groups as in IQ4_NL: w = d * (scale - 32) * value[q]."""
    high = (raw[..., 2:4, None] >> _PAIRS & 3).flatten(-2)
    low = torch.stack((raw[..., 4:8] & 15, raw[..., 4:8] >> 4), -1).flatten(-2)
    scales = (low | high << 4).view(torch.int8).sub(32)
    codes = _IQ4_VALUES[_nibbles(raw[..., 8:].reshape(*raw.shape[:2], 8, 16)).int()]
    return codes.flatten(1), (_halves(raw[..., :2]) * scales).flatten(1), None


def _q6_k(raw: Tensor) -> _Unpacked:
    """256 weights: nibbles, pairs of bits, 16 signed scales, d: w = d * scale * (q - 32)."""
    low, high = raw[..., :128].reshape(-1, 2, 2, 32), raw[..., 128:192].reshape(-1, 2, 1, 32)
    nibbles = torch.cat((low & 15, low >> 4), -2)
    pairs = high >> _PAIRS[:, None] & 3
    codes = (nibbles | pairs << 4).view(torch.int8).sub_(32).view(len(raw), -1)
    scales = raw[..., 192:208].contiguous().view(torch.int8)
    return codes, (_halves(raw[..., 208:]) * scales).flatten(1), None


def _q8_0(raw: Tensor) -> _Unpacked:
    """d, then 32 signed bytes."""
    return raw[..., 2:].contiguous().view(torch.int8).flatten(1), _halves(raw[..., :2]).flatten(1), None


_READERS: dict[str, tuple[Callable[[Tensor], _Unpacked], int, int]] = {  # name: reader, group, bytes of a block
    "IQ4_NL": (_iq4_nl, 32, 18),
    "IQ4_XS": (_iq4_xs, 32, 136),
    "Q3_K": (_q3_k, 16, 110),
    "Q4_0": (_q4_0, 32, 18),
    "Q4_1": (_q4_1, 32, 20),
    "Q4_K": (_q4_k, 32, 144),
    "Q5_0": (_q5_0, 32, 22),
    "Q5_1": (_q5_1, 32, 24),
    "Q5_K": (_q5_k, 32, 176),
    "Q6_K": (_q6_k, 16, 210),
    "Q8_0": (_q8_0, 32, 34),
}
