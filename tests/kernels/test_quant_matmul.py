"""Products with quantised weights, against the same weights in float32."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shoal.kernels.coded_weight import CodedWeight, Encoding, fp8_weight, int4_weight, int8_weight
from shoal.kernels.eight_bit_matmul import coding_of, dynamic_matmul, eight_bit_matmul
from shoal.kernels.ops import Activation, NormWeight
from shoal.kernels.quant_matmul import unpack, weight_only_matmul
from shoal.kernels.quant_tiles import most_tickets, weight_only_tile
from shoal.kernels.quantise import (
    CodedRows,
    Coding,
    activate_and_quantise,
    norm_and_quantise,
    quantise_rows,
)
from shoal.kernels.reference import ReferenceOps

DTYPES = [torch.bfloat16, torch.float16]
# A bit more than rounding: the interpreter cuts off where a GPU rounds.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _there(device: torch.device) -> Iterator[None]:
    """What a test makes, it makes on the device."""
    with device:
        yield


def expand(scale_FG: Tensor, columns: int) -> Tensor:
    return scale_FG.float().repeat_interleave(columns // scale_FG.shape[1], dim=1)


def int4(features: int, columns: int, group: int, zero: str) -> tuple[CodedWeight, Tensor]:
    """A weight and what it stands for."""
    groups = columns // group
    codes = torch.randint(16, (features, columns), dtype=torch.uint8)
    scale = (torch.rand(features, groups) + 0.1).half()
    zeros = {
        "symmetric": None,
        "whole": torch.randint(16, (features, groups)),
        "fraction": torch.rand(features, groups) * 20 - 2,
    }[zero]
    zero_FD = 8.0 if zeros is None else expand(zeros, columns)
    return int4_weight(codes, scale, zeros), (codes - zero_FD) * expand(scale, columns)


def check(weight: CodedWeight, dense_FD: Tensor, *, rows: int, dtype: torch.dtype, spare: float = 0.0) -> None:
    x = torch.randn(rows, dense_FD.shape[1]).to(dtype)
    found = weight_only_matmul(x, weight)
    expected = x.float() @ dense_FD.T
    size = (x.float().abs() @ dense_FD.abs().T) * spare
    assert found.dtype is dtype
    assert ((found.float() - expected).abs() <= expected.abs() * TOLERANCE[dtype] + size + 1e-4).all()
    assert not weight.tickets.any()
    size = dense_FD.abs() * TOLERANCE[dtype] + spare * dense_FD.abs().max() + 1e-6
    assert ((unpack(weight, dtype).float() - dense_FD).abs() <= size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", ["symmetric", "whole", "fraction"])
@pytest.mark.parametrize(("features", "columns", "group"), [(70, 256, 128), (33, 96, 32), (64, 320, 64), (5, 160, 160)])
def test_int4(features: int, columns: int, group: int, zero: str, dtype: torch.dtype) -> None:
    weight, dense = int4(features, columns, group, zero)
    check(weight, dense, rows=3, dtype=dtype, spare=2**-9 if zero == "fraction" else 0)


def int8(features: int, columns: int, group: int) -> tuple[CodedWeight, Tensor]:
    codes = torch.randint(-128, 128, (features, columns), dtype=torch.int8)
    scale = torch.rand(features, columns // group) * 1e-3
    return int8_weight(codes, scale), codes * expand(scale, columns)


def fp8(features: int, columns: int, scales: tuple[int, int]) -> tuple[CodedWeight, Tensor]:
    """Every code but NaN, subnormal ones among them."""
    bits = torch.randint(256, (features, columns), dtype=torch.uint8)
    codes = torch.where(bits & 127 == 127, 0, bits).view(torch.float8_e4m3fn)
    scale = torch.rand(scales) * 1e-3
    blocks = scale.repeat_interleave(128, 0)[:features] if scales[1] > 1 else scale
    dense = codes.float() * (blocks.repeat_interleave(128, 1)[:, :columns] if scales[1] > 1 else blocks)
    return fp8_weight(codes, scale), dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("features", "columns", "group"),
    [(70, 256, 256), (33, 96, 32), (64, 384, 128), (5, 160, 160), (70, 256, 16), (33, 80, 16)],
)
def test_int8(features: int, columns: int, group: int, dtype: torch.dtype) -> None:
    check(*int8(features, columns, group), rows=3, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "columns", "scales"), [(70, 256, (1, 1)), (33, 96, (33, 1)), (200, 320, (2, 3))])
def test_fp8(features: int, columns: int, scales: tuple[int, int], dtype: torch.dtype) -> None:
    check(*fp8(features, columns, scales), rows=3, dtype=dtype)


def numbers(rows: CodedRows, columns: int) -> Tensor:
    """What coded rows stand for: their columns alternate between the halves of a block."""
    codes, scales = rows
    in_order = codes.float().view(len(codes), -1, 64, 2).transpose(2, 3).flatten(1)
    return (in_order * scales.T.repeat_interleave(codes.shape[1] // len(scales), 1))[:, :columns]


@pytest.mark.parametrize("columns", [96, 256, 320])
@pytest.mark.parametrize(("encoding", "step"), [(Encoding.INT8, 1 / 127), (Encoding.E4M3, 1 / 14)])
@pytest.mark.parametrize("by_block", [False, True])
def test_quantised_rows(columns: int, encoding: Encoding, step: float, by_block: bool) -> None:
    x = torch.randn(19, columns).half()
    x[3] = 0
    x[4] *= 1000
    found = numbers(quantise_rows(x, Coding(encoding, by_block)), columns)
    assert found[3].eq(0).all()
    parts = zip(x.float().split(128, 1), found.split(128, 1), strict=True) if by_block else [(x.float(), found)]
    for wanted, part in parts:
        assert ((part - wanted).abs() <= wanted.abs().amax(1, keepdim=True) * step).all()
        torch.testing.assert_close(part.abs().amax(1), wanted.abs().amax(1))


@pytest.mark.parametrize("columns", [96, 320])
@pytest.mark.parametrize(
    "coding", [Coding(Encoding.INT8), Coding(Encoding.E4M3), Coding(Encoding.E4M3, by_block=True)], ids=str
)
def test_rows_are_quantised_where_they_are_made(columns: int, coding: Coding, reference: ReferenceOps) -> None:
    """As the norm, or the activation, and then the codes; but for what one rounding less may change."""
    x, residual = torch.randn(19, columns).half(), torch.randn(19, columns)
    gate_up, norm = torch.randn(19, 2 * columns).half(), NormWeight(torch.rand(columns) + 0.5, 1e-5)
    total = residual + x.float()
    normed = reference.rms_norm(total, norm.weight_D, eps=norm.eps)
    for found, expected in (
        (norm_and_quantise(x, residual, norm, coding), quantise_rows(normed, coding)),
        (
            activate_and_quantise(gate_up, Activation.SILU, coding),
            quantise_rows(reference.gated_activation(gate_up.float(), Activation.SILU), coding),
        ),
    ):
        torch.testing.assert_close(found.scales_GT, expected.scales_GT, rtol=1e-5, atol=0)
        off = (found.codes_TD.float() != expected.codes_TD.float()).float().mean()
        assert off < 0.002, "more than numbers halfway between two codes"
    assert torch.equal(residual, total)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.E4M3])
def test_a_number_that_is_none_spoils_its_row_alone(encoding: Encoding) -> None:
    x = torch.randn(4, 64).half()
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    scales = quantise_rows(x, Coding(encoding)).scales_GT
    assert scales.isfinite().tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 by block"])
def test_eight_bit(kind: str) -> None:
    weight, dense = {
        "int8": lambda: int8(70, 288, 288),
        "fp8": lambda: fp8(70, 288, (70, 1)),
        "fp8 by block": lambda: fp8(140, 288, (2, 3)),
    }[kind]()
    x = torch.randn(67, 288).half()
    rows = quantise_rows(x, coding_of(weight))
    expected = numbers(rows, 288) @ dense.T
    torch.testing.assert_close(eight_bit_matmul(rows, weight, torch.float16).float(), expected, rtol=2e-3, atol=1e-2)
    assert torch.equal(dynamic_matmul(x, weight), eight_bit_matmul(rows, weight, torch.float16))
    assert torch.equal(dynamic_matmul(x[:5], weight), weight_only_matmul(x[:5], weight))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1056), (17, 512), (40, 512), (70, 512), (300, 160), (512, 160)])
def test_any_number_of_rows(rows: int, columns: int) -> None:
    """From a decode's, whose columns are split, to a long prompt's, for which the weight is unpacked."""
    check(*int4(66, columns, 32, "whole"), rows=rows, dtype=torch.float16, spare=2**-11)


def test_no_rows() -> None:
    weight, _ = int4(5, 32, 32, "symmetric")
    assert weight_only_matmul(torch.zeros(0, 32).half(), weight).shape == (0, 5)
    assert dynamic_matmul(torch.zeros(0, 32).half(), int8(5, 32, 32)[0]).shape == (0, 5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_are_their_own(deterministic: bool) -> None:
    """Sums that would be zero show the order in which they were taken."""
    codes, scale = torch.randint(16, (30, 256), dtype=torch.uint8), torch.rand(30, 4)
    weight = int4_weight(codes.repeat(1, 2), scale.repeat(1, 2))
    half = torch.randn(70, 256).half() * 100
    x = torch.cat((half, -half), 1)
    found = weight_only_matmul(x, weight, deterministic=deterministic)
    size = 3 if deterministic else 66  # of one regime, unless there is but one
    assert torch.equal(weight_only_matmul(x[4 : 4 + size], weight, deterministic=deterministic), found[4 : 4 + size])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_scales_of_any_size(size: float) -> None:
    codes = torch.randint(16, (8, 64), dtype=torch.uint8)
    scale = torch.tensor([[1.0, 1e-3], [-0.5, 0.7]]).repeat(4, 1) * size
    expected = (codes - 8.0) * expand(scale, 64)
    found = unpack(int4_weight(codes, scale), torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("zero", [-130.0, 121.0, 1000.5, 60000.0])
def test_zero_points_far_from_the_codes(zero: float) -> None:
    codes = torch.randint(16, (8, 64), dtype=torch.uint8)
    weight = int4_weight(codes, torch.full((8, 1), 1 / 16), torch.full((8, 1), zero))
    check(weight, (codes - zero) / 16, rows=3, dtype=torch.bfloat16, spare=2**-7)


def test_a_zero_point_beyond_all_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond 65504"):
        int4_weight(torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1), torch.full((1, 1), torch.inf))


def test_a_strided_input() -> None:
    weight, dense = int8(40, 96, 96)
    x = torch.randn(3, 200).half()[:, 8:104]
    torch.testing.assert_close(weight_only_matmul(x, weight).float(), x.float() @ dense.T, rtol=2e-3, atol=2e-3)


def test_a_decode_reads_every_code_once() -> None:
    for rows in (1, 16, 17, 64):
        for features in (64, 576, 4096, 28672):
            tile = weight_only_tile(rows, features, 32)
            assert tile.rows >= rows
            assert tile.splits * -(-features // tile.features) >= min(128, features // 64)


def test_there_are_tickets_for_every_split_tile() -> None:
    for rows in (1, 64, 65, 256, 257):
        for features in (1, 65, 2048, 4097, 128256):
            tile = weight_only_tile(rows, features, 112)
            tiles = -(-rows // tile.rows) * -(-features // tile.features)
            assert tile.splits == 1 or tiles <= most_tickets(features)


def test_a_weight_is_unpacked_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.quant_tiles._SLAB_WEIGHTS", 20 * 64)
    check(*int8(50, 64, 64), rows=600, dtype=torch.bfloat16, spare=2**-8)
