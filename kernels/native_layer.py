"""The two halves of a decoder layer as one C++ call each (`csrc/layer.cpp`). Shape letters are those of `ops.py`.

For a plain layer of most families: RMS norm, fused QKV, heads normalised and rotated by halves, paged attention; RMS
norm and SwiGLU. Weights are packed in 4, 8 or 16 bits, activations bfloat16, no biases. The bits are those of the same
operations one after the other.
"""

from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_long, c_void_p
from typing import NamedTuple

from torch import Tensor

from .native import STEP, TILE_ROWS, CacheAddress, DecodeShape, Native, Weight
from .ops import HeadSpec, KVLayer, NormWeight

MOST_PARTS = 3
"""Weights that a fused QKV may be stored in."""


class PackedWeight(NamedTuple):
    """A matrix as `pack_q4`, `pack_q8` or `pack_b16` gives it, bits telling which."""

    data: Tensor
    bits: int
    out_features: int
    in_features: int

    def address(self) -> Weight:
        return Weight.of(self.data, bits=self.bits, inputs=self.in_features, outputs=self.out_features)


class _MlpLayer(Structure):
    """`MlpLayer` of layer.cpp."""

    _fields_ = (("norm", c_void_p), ("up", Weight), ("down", Weight), ("eps", c_float))


class _AttendLayer(Structure):
    """`AttendLayer` of layer.cpp."""

    _fields_ = (
        ("norm", c_void_p),
        ("qkv", Weight * MOST_PARTS),
        ("out", Weight),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "angles")),
        ("rotated", c_long),
        ("eps", c_float),
        ("head_eps", c_float),
    )


class DecodeRows(Structure):
    """`DecodeRows` of layer.cpp: addresses of a step's positions and slots."""

    _fields_ = (("positions", c_void_p), ("slots", c_void_p))


class NativeMlp:
    """`down(silu(gate(x)) * up(x))` of `x = norm(residual += delta)`, for any number of rows."""

    def __init__(self, native: Native, norm: NormWeight, *, up: PackedWeight, down: PackedWeight) -> None:
        """up: gate, then up; each has a multiple of 32 rows."""
        self._run = native.mlp_half
        self._kept = norm, up, down  # the structure has but their addresses
        self._layer = _MlpLayer(norm.weight_D.data_ptr(), up.address(), down.address(), norm.eps)

    def __call__(self, delta_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """Overwrites both, and returns the first, which then is the result."""
        self._run(delta_TD.data_ptr(), residual_TD.data_ptr(), byref(self._layer), delta_TD.shape[0])
        return delta_TD


class NativeAttend:
    """`out(attention(qkv(x)))` of `x = norm(residual += delta)`, for one new token of each sequence.

    Its key and value are stored on the way; queries and keys are normalised and rotated by halves, as `heads` says.
    """

    def __init__(
        self, native: Native, norm: NormWeight, *, qkv: Sequence[PackedWeight], out: PackedWeight, heads: HeadSpec
    ) -> None:
        """qkv: one weight, or up to `MOST_PARTS` one under the other where they are stored differently."""
        self._run = native.attend_half
        self._kept = norm, qkv, out, heads
        parts = (Weight * MOST_PARTS)(*(part.address() for part in qkv))
        layer = _AttendLayer(norm=norm.weight_D.data_ptr(), qkv=parts, out=out.address(), eps=norm.eps)
        if heads.norms is not None:
            layer.q_norm, layer.k_norm = heads.norms.q_weight_E.data_ptr(), heads.norms.k_weight_E.data_ptr()
            layer.head_eps = heads.norms.eps
        if heads.rotation is not None:
            layer.angles, layer.rotated = heads.rotation.cos_sin_MC.data_ptr(), heads.rotation.cos_sin_MC.shape[1]
        self._layer = layer

    def __call__(
        self, delta_TD: Tensor, residual_TD: Tensor, cache: KVLayer, *, rows: DecodeRows, shape: DecodeShape
    ) -> Tensor:
        """Overwrites delta and residual, and returns delta, then the result. shape: of the step's attention."""
        address = CacheAddress.of(cache)
        self._run(
            delta_TD.data_ptr(),
            residual_TD.data_ptr(),
            byref(address),
            byref(self._layer),
            byref(rows),
            byref(shape),
        )
        return delta_TD


def fits_mlp(up: PackedWeight, down: PackedWeight) -> bool:
    """Whether gate and up are whole tiles each."""
    return up.out_features == 2 * down.in_features and down.in_features % TILE_ROWS == 0


def fits_heads(heads: HeadSpec, head_dim: int) -> bool:
    """Whether there are kernels for what the layer does to its heads."""
    rotation = heads.rotation
    if rotation is not None and (rotation.interleaved or rotation.cos_sin_MC.shape[1] % 32):
        return False
    return head_dim % 16 == 0 and heads.num_query * head_dim % STEP == 0
