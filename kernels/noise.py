"""Counter-based Gumbel noise: `gumbel(seed, position, id)` with no generator state.

The same integers come out of the plain-torch form here and of the Triton kernel, on every device and for every
batch, so a draw can be repeated by any rank that knows (seed, position). Sampling from a softmax by adding Gumbel noise
and taking the argmax: Gumbel 1954; Maddison et al., arXiv:1411.0030.

The hash is two rounds of a 32-bit multiply-xorshift mixer ("lowbias32" of C. Wellons' hash prospector)
over the id, keyed by two words made from (seed, position). 23 bits become a uniform in (0, 1): more could be 1.
"""

import torch
from torch import Tensor

# lowbias32: bias 0.17 of the best possible for a two-multiply xorshift hash.
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B - (1 << 32)  # as a signed int32
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, wrapping: spreads every input bit over the word."""
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed integer tensor."""
    width = torch.iinfo(x.dtype).bits
    return (x >> bits) & ((1 << (width - bits)) - 1)


def row_keys(seed_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 words a row from (seed, position), both int64: the only part of the noise that depends on the row."""
    word = _mix64(_mix64(seed_R + _GOLDEN) ^ (position_R * _GOLDEN))
    return (word & 0xFFFFFFFF).to(torch.int32), _shift_right(word, 32).to(torch.int32)


def gumbel(key_0_R: Tensor, key_1_R: Tensor, ids_RV: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for int32 ids [V] or [R, V] under each row's keys [R]: [R, V]."""
    x = ids_RV ^ key_0_R[:, None]
    x = x ^ _shift_right(x, 16)
    x = x * MIX_1
    x = x ^ _shift_right(x, 15)
    x = x * MIX_2
    x = (x ^ _shift_right(x, 16)) + key_1_R[:, None]
    x = x ^ _shift_right(x, 16)
    x = x * MIX_1
    x = x ^ _shift_right(x, 15)
    x = x * MIX_2
    x = x ^ _shift_right(x, 16)
    uniform = (_shift_right(x, 9).to(torch.float32) + 0.5) * (1.0 / (1 << 23))
    return -torch.log(-torch.log(uniform))
