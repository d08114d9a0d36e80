"""Packed linears against the dense product of the dequantised blocks."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from shoal.parallel.quant import DenseLinear, Int4Layout, Int4Linear, packed_linear, probe_int4_layout

CPU = torch.device("cpu")
FORMATS = ["Q4_0", "Q4_1"]


def make_rows(format: str, counts: list[int], in_features: int) -> tuple[list[NDArray[np.uint8]], torch.Tensor]:
    """Blocks of random weights, and what they stand for."""
    kind = GGMLQuantizationType[format]
    rows = [quantize(np.random.default_rng(n).standard_normal((n, in_features), np.float32), kind) for n in counts]
    return rows, torch.cat([torch.from_numpy(dequantize(part, kind)) for part in rows])


def packed(format: str, counts: list[int], in_features: int) -> tuple[Int4Linear, torch.Tensor]:
    rows, dense = make_rows(format, counts, in_features)
    layout = probe_int4_layout()
    if layout is None:
        pytest.skip("torch packs int4 in a way we do not know on this CPU")
    return Int4Linear(format, rows, in_features, layout), dense


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", [[64], [128, 64, 64], [1], [5, 60], [100], [16], [2000]])
@pytest.mark.parametrize("in_features", [32, 192])
def test_products_are_the_dense_ones(format: str, counts: list[int], in_features: int) -> None:
    method, dense = packed(format, counts, in_features)
    assert (method.out_features, method.in_features) == dense.shape
    torch.manual_seed(0)
    for tokens in (0, 1, 7, Int4Linear.UNPACK_FROM - 1, Int4Linear.UNPACK_FROM, 130):
        x = torch.randn(tokens, in_features).bfloat16()
        found, expected = method.apply(x), x.float() @ dense.T
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        # Of bfloat16's size: scale, zero, weight and result are each rounded once.
        assert (found.float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_both_ways_use_the_same_weights(format: str) -> None:
    """Rows of the identity read the weights out: the two products then have nothing to round."""
    method, dense = packed(format, [64, 36], 128)
    identity = torch.eye(128).bfloat16()
    few = torch.cat([method.apply(part) for part in identity.split(16)])
    many = method.apply(identity)
    assert identity.shape[0] >= Int4Linear.UNPACK_FROM
    assert torch.equal(few, many)
    assert (many.T.float() - dense).norm() <= 4e-3 * dense.norm()


def test_input_need_not_be_contiguous() -> None:
    method, _ = packed("Q4_1", [64], 64)
    x = torch.randn(5, 128).bfloat16()
    for part in (x[:, 64:], x[::2, :64]):
        assert torch.equal(method.apply(part), method.apply(part.contiguous()))


def test_large_weights_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = packed("Q4_1", [300], 64)
    x = torch.randn(100, 64).bfloat16()
    whole = method.apply(x)
    monkeypatch.setattr(Int4Linear, "_UNPACKED_WEIGHTS", 64 * 64)
    torch.testing.assert_close(method.apply(x), whole)


def test_memory_is_that_of_the_blocks() -> None:
    rows, dense = make_rows("Q4_1", [256], 512)
    method, _ = packed("Q4_1", [256], 512)
    assert method.num_bytes() == sum(part.nbytes for part in rows)
    assert DenseLinear(dense.bfloat16()).num_bytes() > 3 * method.num_bytes()


@pytest.mark.parametrize(
    ("format", "device", "dtype"),
    [("Q8_0", "cpu", torch.bfloat16), ("Q4_1", "cpu", torch.float32), ("Q4_1", "cuda", torch.bfloat16)],
)
def test_what_has_no_fast_kernel_is_left_dense(format: str, device: str, dtype: torch.dtype) -> None:
    rows, _ = make_rows(format, [64], 64)
    assert packed_linear(format, rows, in_features=64, device=torch.device(device), dtype=dtype) is None


@pytest.mark.parametrize("layout", [Int4Layout(64, 2), Int4Layout(32, 2), Int4Layout(32, 3), Int4Layout(16, 3)])
def test_any_layout_is_found_and_used(layout: Int4Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs with other vector units pack in other tiles."""

    def pack(nibbles_FD: torch.Tensor) -> torch.Tensor:
        rows, columns = nibbles_FD.shape
        tiles = nibbles_FD.view(-1, layout.tile, columns).transpose(1, 2)
        pairs = tiles.unflatten(2, (2, -1)) if layout.stack_dim == 2 else tiles.unflatten(2, (-1, 2)).transpose(2, 3)
        return (pairs[:, :, 0] | pairs[:, :, 1] << 4).to(torch.uint8).reshape(rows, columns // 2)

    monkeypatch.setattr("shoal.parallel.quant._pack_int4", pack)
    found = probe_int4_layout()
    assert found == layout
    rows, dense = make_rows("Q4_1", [100], 64)
    x = torch.randn(Int4Linear.UNPACK_FROM, 64).bfloat16()
    expected = x.float() @ dense.T
    assert (Int4Linear("Q4_1", rows, 64, found).apply(x).float() - expected).norm() <= 1e-2 * expected.norm()


def test_an_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.parallel.quant._pack_int4", lambda nibbles: nibbles[:, ::2].flip(1).to(torch.uint8))
    assert probe_int4_layout() is None
