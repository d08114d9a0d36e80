"""The C++ kernels of `csrc/` as functions on tensors. Shape letters are those of `ops.py`.

Pointers go straight into C: whoever calls has checked dtypes, strides and sizes. ctypes lets go of the interpreter's
lock meanwhile. `load_native` gives None where there can be no such kernels, and everything then runs in torch.
"""

import ctypes
import logging
from ctypes import Structure, byref, c_float, c_long, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .native_build import UnavailableError, build_library
from .ops import KVLayer

log = logging.getLogger(__name__)

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class DecodeShape(Structure):
    """`DecodeShape` of attention.cpp, where its fields are explained."""

    _fields_ = (
        ("table", c_void_p),
        ("lens", c_void_p),
        *((name, c_long) for name in ("seqs", "table_stride", "heads", "kv_heads", "dim", "page_size", "query_stride")),
        ("window", c_long),
        ("max_len", c_long),
        ("scale", c_float),
        ("softcap", c_float),
    )


class Native:
    """The library's functions. Has no state: results depend on the arguments alone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointers = [c_void_p] * 6
        self._q4 = _declared(library.shoal_q4_product, pointers[:4])
        self._write_kv = _declared(library.shoal_write_kv, pointers)
        self._decode = _by_dtype(library, "decode", pointers[:5])
        self._norm = _by_dtype(library, "norm", [*pointers[:4], c_float, c_void_p])
        self._rope = _by_dtype(library, "rope", pointers[:5])
        self._swiglu = _by_dtype(library, "swiglu", pointers[:3])

    @staticmethod
    def supports(x: Tensor, *, size: int) -> bool:
        """Whether there are kernels for rows of `size` numbers of x's dtype, side by side in its last dim."""
        return x.dtype in _TYPES and size % 16 == 0 and x.stride(-1) == 1

    def q4_product(self, x_TD: Tensor, packed: Tensor, out_features: int) -> Tensor:
        """`x @ W.T` in bfloat16 [T, out_features]; `packed` as `pack_q4` makes it, x's last dim contiguous."""
        tokens, in_features = x_TD.shape
        y_TF = torch.empty(tokens, out_features, dtype=torch.bfloat16)
        shape = (c_long * 4)(tokens, x_TD.stride(0), in_features, out_features)
        self._q4(y_TF.data_ptr(), x_TD.data_ptr(), packed.data_ptr(), shape)
        return y_TF

    def decode_attention(self, out_SHE: Tensor, q_SHE: Tensor, cache: KVLayer, shape: DecodeShape) -> None:
        """Attention of one token a sequence into `out_SHE`, contiguous. All of one dtype, the cache contiguous."""
        self._decode[q_SHE.dtype](
            out_SHE.data_ptr(), q_SHE.data_ptr(), cache.k_NKBE.data_ptr(), cache.v_NKBE.data_ptr(), byref(shape)
        )

    def rms_norm(
        self, out: Tensor, x: Tensor, weight_D: Tensor, *, eps: float, residual_TD: Tensor | None = None
    ) -> None:
        """`Ops.rms_norm` of x [T, D] or [T, H, D] into `out`, or `Ops.add_rms_norm` into it; both contiguous."""
        heads, stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        residual = None if residual_TD is None else residual_TD.data_ptr()
        shape = (c_long * 5)(x.shape[0], heads, x.shape[-1], x.stride(0), stride)
        self._norm[x.dtype](out.data_ptr(), x.data_ptr(), residual, weight_D.data_ptr(), eps, shape)

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor) -> None:
        """`Ops.rope` of pairs (i, i + C/2), C a multiple of 32; positions int64, q and k of one dtype."""
        heads = (q_THE.shape[1], k_TKE.shape[1], cos_sin_MC.shape[1])
        shape = (c_long * 8)(q_THE.shape[0], *heads, *q_THE.stride()[:2], *k_TKE.stride()[:2])
        self._rope[q_THE.dtype](
            q_THE.data_ptr(), k_TKE.data_ptr(), positions_T.data_ptr(), cos_sin_MC.data_ptr(), shape
        )

    def swiglu(self, gate_up_T2F: Tensor) -> Tensor:
        """`silu(gate) * up`: [T, F]."""
        tokens, columns = gate_up_T2F.shape
        out_TF = torch.empty(tokens, columns // 2, dtype=gate_up_T2F.dtype)
        shape = (c_long * 3)(tokens, columns // 2, gate_up_T2F.stride(0))
        self._swiglu[gate_up_T2F.dtype](out_TF.data_ptr(), gate_up_T2F.data_ptr(), shape)
        return out_TF

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        """`Ops.write_kv`: all of one dtype, a token's heads side by side, the cache contiguous, slots int64."""
        _, kv_heads, page_size, dim = cache.k_NKBE.shape
        size = k_TKE.element_size()
        tokens, strides = k_TKE.shape[0], (k_TKE.stride(0) * size, v_TKE.stride(0) * size)
        shape = (c_long * 6)(tokens, kv_heads, page_size, dim * size, *strides)
        self._write_kv(
            cache.k_NKBE.data_ptr(),
            cache.v_NKBE.data_ptr(),
            k_TKE.data_ptr(),
            v_TKE.data_ptr(),
            slots_T.data_ptr(),
            shape,
        )


def _by_dtype(library: ctypes.CDLL, name: str, arguments: list[Any]) -> dict[torch.dtype, Any]:
    return {dtype: _declared(library[f"shoal_{name}_{suffix}"], arguments) for dtype, suffix in _TYPES.items()}


def _declared(function: Any, arguments: list[Any]) -> Any:
    function.argtypes, function.restype = arguments, None
    return function


TILE_ROWS = 32
"""Weights are padded to this many rows: what one task of the product computes."""


def pack_q4(nibbles_FD: Tensor, scale_FG: Tensor, minimum_FG: Tensor) -> Tensor:
    """Weights `scale * nibble + minimum` in the product's own form: uint8 [F / 32, D / 32, 2, 320], see q4.cpp.

    nibbles: ints 0 to 15, F a multiple of `TILE_ROWS`. Scales and minima, for 32 columns each, are rounded to float16.
    """
    rows, columns = nibbles_FD.shape
    tiles, groups = rows // TILE_ROWS, columns // 32
    packed = torch.empty(tiles, groups, 2, 320, dtype=torch.uint8)
    for at, numbers_FG in ((0, scale_FG), (32, minimum_FG)):
        by_group = numbers_FG.half().view(tiles, 2, 16, groups).permute(0, 3, 1, 2).contiguous()
        packed[..., at : at + 32] = by_group.view(torch.uint8)
    # [tile, panel, row, group, load, two bytes, high or low half of them, even or odd column]
    digits = nibbles_FD.to(torch.uint8).view(tiles, 2, 16, groups, 4, 2, 2, 2)
    pairs = digits[..., 0, :] | digits[..., 1, :] << 4
    packed[..., 64:] = pairs.permute(0, 3, 1, 4, 2, 6, 5).reshape(tiles, groups, 2, 256)
    return packed


@cache
def load_native() -> Native | None:
    """The kernels, compiled at the first start on a machine; None where that cannot be, with the reason in the log."""
    try:
        return Native(ctypes.CDLL(str(build_library())))
    except (UnavailableError, OSError) as error:
        log.info("CPU kernels run in torch: %s", error)
        return None
