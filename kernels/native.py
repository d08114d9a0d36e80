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
from .ops import AttentionBatch, AttentionSpec, KVLayer

log = logging.getLogger(__name__)

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}


class CacheAddress(Structure):
    """`KvLayer` of cache.h, where its fields are explained."""

    _fields_ = (*((name, c_void_p) for name in ("k", "v", "k_scales", "v_scales")), ("code", c_long))

    @staticmethod
    def of(cache: KVLayer) -> "CacheAddress":
        """All contiguous. The cache must outlive the result."""
        k_scale, v_scale = cache.k_scale_NKB, cache.v_scale_NKB
        if k_scale is None or v_scale is None:
            return CacheAddress(cache.k_NKBE.data_ptr(), cache.v_NKBE.data_ptr(), None, None, 0)
        code = _CODES[cache.k_NKBE.dtype]
        return CacheAddress(
            cache.k_NKBE.data_ptr(), cache.v_NKBE.data_ptr(), k_scale.data_ptr(), v_scale.data_ptr(), code
        )


def reads_cache(cache: KVLayer, dtype: torch.dtype) -> bool:
    """Whether there are kernels for this cache and activations of `dtype`: numbers of it, or codes for bfloat16."""
    scales = cache.k_scale_NKB, cache.v_scale_NKB
    if not all(part is None or part.is_contiguous() for part in (cache.k_NKBE, cache.v_NKBE, *scales)):
        return False
    return cache.k_NKBE.dtype is dtype if None in scales else dtype is torch.bfloat16 and cache.k_NKBE.dtype in _CODES


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


class PrefillShape(Structure):
    """`PrefillShape` of prefill.cpp, where its fields are explained."""

    _fields_ = (
        ("table", c_void_p),
        *((name, c_long) for name in ("tokens", "keys", "heads", "kv_heads", "dim", "page_size", "query_stride")),
        ("window", c_long),
        ("scale", c_float),
        ("softcap", c_float),
    )


def decode_shape(
    cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec, *, heads: int, query_stride: int
) -> DecodeShape:
    """Of the batch's sequences with one new token. Points into the batch's tensors: they must outlive it."""
    table_SP, lens_S = batch.block_table_SP, batch.kv_lens_S
    assert table_SP.dtype is lens_S.dtype is torch.int32, "the kernel reads 32-bit integers"
    assert table_SP.stride(1) == lens_S.stride(0) == 1, "the kernel reads them side by side"
    _, kv_heads, page_size, dim = cache.k_NKBE.shape
    return DecodeShape(
        table=table_SP.data_ptr(),
        lens=lens_S.data_ptr(),
        seqs=batch.num_decodes,
        table_stride=table_SP.stride(0),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        query_stride=query_stride,
        window=spec.window or 0,
        max_len=max(batch.kv_lens[: batch.num_decodes], default=0),
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
    )


def prefill_shapes(
    cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec, *, heads: int, query_stride: int
) -> list[PrefillShape]:
    """Of the batch's other sequences, one by one; they point into its table."""
    table_SP = batch.block_table_SP
    _, kv_heads, page_size, dim = cache.k_NKBE.shape
    return [
        PrefillShape(
            table=table_SP.data_ptr() + seq * table_SP.stride(0) * table_SP.element_size(),
            tokens=batch.query_lens[seq],
            keys=batch.kv_lens[seq],
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            page_size=page_size,
            query_stride=query_stride,
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
        )
        for seq in range(batch.num_decodes, len(batch.kv_lens))
    ]


class Weight(Structure):
    """`Weight` of product.h, where its fields are explained."""

    _fields_ = (("data", c_void_p), *((name, c_long) for name in ("bits", "inputs", "outputs", "group", "minima")))

    @staticmethod
    def of(packed: Tensor, *, bits: int, inputs: int, outputs: int) -> "Weight":
        """packed: as `pack_q4`, `pack_q8` or `pack_b16` makes it. It must outlive the result."""
        group = inputs // packed.shape[1]
        minima = bits == 4 or (bits == 8 and packed.shape[2] > TILE_ROWS * (4 + group))
        return Weight(packed.data_ptr(), bits, inputs, outputs, group, minima)


class Native:
    """The library's functions. Has no state: results depend on the arguments alone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointers: list[Any] = [c_void_p] * 7
        self._product = _declared(library.shoal_product, [*pointers[:3], c_long, c_long])
        self._logits = _declared(library.shoal_q8_logits, [*pointers[:3], c_long, c_long])
        self._write_kv = _declared(library.shoal_write_kv, pointers[:5])
        self.mlp_half = _declared(library.shoal_mlp, [*pointers[:3], c_long])
        self.attend_half = _declared(library.shoal_attend, pointers[:6])
        self._decode = _by_dtype(library, "decode", pointers[:4])
        self._prefill = _declared(library.shoal_prefill, pointers[:4])
        self._norm = _by_dtype(library, "norm", [*pointers[:4], c_float, c_void_p])
        self._rope = _by_dtype(library, "rope", pointers[:5])
        self._swiglu = _by_dtype(library, "swiglu", pointers[:3])

    @staticmethod
    def supports(x: Tensor, *, size: int) -> bool:
        """Whether there are kernels for rows of `size` numbers of x's dtype, side by side in its last dim."""
        return x.dtype in _TYPES and size % 16 == 0 and x.stride(-1) == 1

    def q4_product(self, x_TD: Tensor, packed: Tensor, out_features: int) -> Tensor:
        """`x @ W.T` in bfloat16 [T, out_features]; `packed` as `pack_q4` makes it, x's last dim contiguous."""
        return self._multiply(x_TD, Weight.of(packed, bits=4, inputs=x_TD.shape[1], outputs=out_features))

    def q8_product(self, x_TD: Tensor, packed: Tensor, out_features: int) -> Tensor:
        """`x @ W.T` in bfloat16 [T, out_features]; `packed` as `pack_q8` makes it, x's last dim contiguous."""
        return self._multiply(x_TD, Weight.of(packed, bits=8, inputs=x_TD.shape[1], outputs=out_features))

    def b16_product(self, x_TD: Tensor, packed: Tensor, out_features: int) -> Tensor:
        """`x @ W.T` in bfloat16 [T, out_features]; `packed` as `pack_b16` makes it, x's last dim contiguous."""
        return self._multiply(x_TD, Weight.of(packed, bits=16, inputs=x_TD.shape[1], outputs=out_features))

    def q8_logits(self, x_RD: Tensor, packed: Tensor, out_features: int) -> Tensor:
        """`x @ W.T` in float32 throughout, [R, out_features]; x's last dim contiguous, W as `pack_q8` makes it without
        minima.

        Each row's sums have one order in any company.
        """
        rows, columns = x_RD.shape
        y_RF = torch.empty(rows, out_features)
        weight = Weight.of(packed, bits=8, inputs=columns, outputs=out_features)
        self._logits(y_RF.data_ptr(), x_RD.data_ptr(), byref(weight), rows, x_RD.stride(0))
        return y_RF

    def _multiply(self, x_TD: Tensor, weight: Weight) -> Tensor:
        y_TF = torch.empty(x_TD.shape[0], weight.outputs, dtype=torch.bfloat16)
        self._product(y_TF.data_ptr(), x_TD.data_ptr(), byref(weight), x_TD.shape[0], x_TD.stride(0))
        return y_TF

    def decode_attention(self, out_SHE: Tensor, q_SHE: Tensor, cache: KVLayer, shape: DecodeShape) -> None:
        """Attention of one token a sequence into `out_SHE`, contiguous. The cache: see `reads_cache`."""
        address = CacheAddress.of(cache)
        self._decode[q_SHE.dtype](out_SHE.data_ptr(), q_SHE.data_ptr(), byref(address), byref(shape))

    def prefill_attention(self, out_QHE: Tensor, q_QHE: Tensor, cache: KVLayer, shape: PrefillShape) -> None:
        """Attention of one sequence's new tokens into `out_QHE`, contiguous, in bfloat16. dim is a multiple of 32."""
        address = CacheAddress.of(cache)
        self._prefill(out_QHE.data_ptr(), q_QHE.data_ptr(), byref(address), byref(shape))

    def rms_norm(
        self, out: Tensor, x: Tensor, weight_D: Tensor, *, eps: float, residual_TD: Tensor | None = None
    ) -> None:
        """`Ops.rms_norm` of x [T, D] or [T, H, D] into `out`, or `Ops.add_rms_norm` into it; both contiguous."""
        heads, stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        residual = None if residual_TD is None else residual_TD.data_ptr()
        shape = (c_long * 5)(x.shape[0], heads, x.shape[-1], x.stride(0), stride)
        self._norm[x.dtype](out.data_ptr(), x.data_ptr(), residual, weight_D.data_ptr(), eps, shape)

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor) -> None:
        """`ReferenceOps.rope` of pairs (i, i + C/2), C a multiple of 32; positions int64, q and k of one dtype."""
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
        """`Ops.write_kv`: one dtype, a token's heads side by side, slots int64, a cache as `reads_cache` says."""
        _, kv_heads, page_size, dim = cache.k_NKBE.shape
        address = CacheAddress.of(cache)
        size = k_TKE.element_size()
        tokens, strides = k_TKE.shape[0], (k_TKE.stride(0) * size, v_TKE.stride(0) * size)
        shape = (c_long * 6)(tokens, kv_heads, page_size, dim * size, *strides)
        self._write_kv(byref(address), k_TKE.data_ptr(), v_TKE.data_ptr(), slots_T.data_ptr(), shape)


def _by_dtype(library: ctypes.CDLL, name: str, arguments: list[Any]) -> dict[torch.dtype, Any]:
    return {dtype: _declared(library[f"shoal_{name}_{suffix}"], arguments) for dtype, suffix in _TYPES.items()}


def _declared(function: Any, arguments: list[Any]) -> Any:
    function.argtypes, function.restype = arguments, None
    return function


TILE_ROWS = 32
"""Weights are padded to this many rows: what one task of the product computes."""

STEP = 32
"""Columns of which inputs and groups are a multiple; half of them will do for 8 bits without minima."""


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


def pack_q8(codes_FD: Tensor, scale_FG: Tensor, minimum_FG: Tensor | None = None) -> Tensor:
    """Weights `scale * code + minimum` in the product's own form: uint8 [F / 32, G, 128 + 32 * D / G], with minima 128
    more, see q8.cpp.

    codes: ints -128 to 127, F a multiple of `TILE_ROWS`. Scales and minima are kept in float32; each is for D / G
    columns: a multiple of `STEP`, or without minima of half of it.
    """
    rows, columns = codes_FD.shape
    tiles, groups = rows // TILE_ROWS, scale_FG.shape[1]
    size = columns // groups
    shared = [scale_FG] if minimum_FG is None else [scale_FG, minimum_FG]
    head = 4 * TILE_ROWS * len(shared)
    packed = torch.empty(tiles, groups, head + TILE_ROWS * size, dtype=torch.uint8)
    by_group = torch.stack([part.float().view(tiles, TILE_ROWS, groups).transpose(1, 2) for part in shared], 2)
    packed[..., :head] = by_group.flatten(2).view(torch.uint8)
    # [tile, row, group, pair, column] -> [tile, group, pair, row, column]
    pairs = codes_FD.to(torch.int8).view(tiles, TILE_ROWS, groups, size // 2, 2).permute(0, 2, 3, 1, 4)
    packed[..., head:] = pairs.reshape(tiles, groups, -1).view(torch.uint8)
    return packed


def pack_b16(weight_FD: Tensor) -> Tensor:
    """A bfloat16 matrix in the product's own form: [F / 32, 1, 32 * D], see b16.cpp.

    F is a multiple of `TILE_ROWS`, D of `STEP`.
    """
    rows, columns = weight_FD.shape
    # [tile, row of both panels, pair, column] -> [tile, pair, row, column]
    pairs = weight_FD.view(rows // TILE_ROWS, TILE_ROWS, columns // 2, 2).transpose(1, 2)
    return pairs.reshape(rows // TILE_ROWS, 1, -1)


def q8_rows(packed: Tensor, ids_T: Tensor) -> Tensor:
    """The given rows of a matrix that `pack_q8` made without minima, dequantised: float32 [T, D]."""
    tiles, groups, size = packed.shape
    pairs = (size // TILE_ROWS - 4) // 2
    tile_T, row_T = ids_T // TILE_ROWS, ids_T % TILE_ROWS
    scale_TG = packed[..., : 4 * TILE_ROWS].view(torch.float32)[tile_T, :, row_T]
    codes = packed[..., 4 * TILE_ROWS :].view(torch.int8).view(tiles, groups, pairs, TILE_ROWS, 2)
    rows_TD: Tensor = codes[tile_T, :, :, row_T].flatten(2) * scale_TG[..., None]
    return rows_TD.flatten(1)


@cache
def load_native() -> Native | None:
    """The kernels, compiled at the first start on a machine; None where that cannot be, with the reason in the log."""
    try:
        return Native(ctypes.CDLL(str(build_library())))
    except (UnavailableError, OSError) as error:
        log.info("CPU kernels run in torch: %s", error)
        return None
