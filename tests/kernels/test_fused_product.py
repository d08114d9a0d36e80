"""Products with what stands around them, against the same one after the other in float32."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shoal.kernels.coded_weight import CodedWeight, dense_weight, fp8_weight, int4_weight, int8_weight
from shoal.kernels.fused_product import normed_product, plain_product
from shoal.kernels.ops import Activation, NormWeight
from shoal.kernels.product import Stream
from shoal.kernels.quant_matmul import unpack
from shoal.kernels.quant_tiles import FEW_ROWS, few_rows_tile
from shoal.kernels.reference import ReferenceOps

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-5


@pytest.fixture(autouse=True)
def _there(device: torch.device) -> Iterator[None]:
    """What a test makes, it makes on the device."""
    with device:
        yield


def make(kind: str, features: int, columns: int, dtype: torch.dtype) -> tuple[CodedWeight, Tensor]:
    """A weight and the numbers that it stands for."""
    if kind == "dense":
        numbers = (torch.randn(features, columns) / columns**0.5).to(dtype)
        return dense_weight(numbers), numbers.float()
    codes = torch.randint(16 if kind == "int4" else 256, (features, columns), dtype=torch.uint8)
    scale = (torch.rand(features, columns // 32) + 0.1) / columns**0.5
    match kind:
        case "int4":
            weight = int4_weight(codes, scale)
        case "int8":
            weight = int8_weight(codes.view(torch.int8), scale[:, :1] / 16)
        case _:
            weight = fp8_weight(torch.randn(features, columns).to(torch.float8_e4m3fn), scale[:1, :1] / 2)
    return weight, unpack(weight, dtype).float()


def stream(rows: int, columns: int, *, deltas: int, size: float = 1.0, dtype: torch.dtype = BF16) -> Stream:
    residual = torch.randn(rows, columns) * size
    return Stream(residual, tuple((torch.randn(rows, columns) * size).to(dtype) for _ in range(deltas)))


def normed(given: Stream, norm: NormWeight, dtype: torch.dtype = BF16) -> Tensor:
    x = given.residual_TD + sum(delta.float() for delta in given.deltas)
    return (x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.eps) * norm.weight_D).to(dtype).float()


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = BF16, *, cuts: int = 2) -> None:
    """cuts: numbers on the way that are rounded to `dtype`, which the interpreter cuts off."""
    assert found.dtype is dtype
    size = expected.abs().max() * cuts * (2**-7 if dtype is BF16 else 2**-10)
    assert ((found.float() - expected).abs() <= size).all()


KINDS = ["dense", "int4", "int8", "fp8"]
# Columns that fill no block, and so many that they are split over programs.
SHAPES = [(70, 96, 1), (192, 1024, 16)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("features", "columns", "rows"), SHAPES)
def test_a_product_of_the_norm(kind: str, features: int, columns: int, rows: int) -> None:
    weight, numbers = make(kind, features, columns, BF16)
    deltas = min(rows, 2)
    given, norm = stream(rows, columns, deltas=deltas), NormWeight(torch.rand(columns) + 0.5, EPS)
    before = given.residual_TD.clone()
    bias = torch.randn(features).to(BF16) if deltas == 1 else None
    expected = normed(given, norm) @ numbers.T + (0 if bias is None else bias.float())
    close(normed_product(given, norm, weight, bias_F=bias), expected)
    assert torch.equal(given.residual_TD, before), "who reads the stream does not change it"
    assert not weight.tickets.any()


@pytest.mark.parametrize(
    ("kind", "pairs", "columns", "rows"),
    [("dense", 35, 96, 1), ("dense", 64, 1024, 16), ("int4", 1, 64, 2), ("int8", 33, 512, 5), ("fp8", 35, 96, 3)],
)
def test_gates_and_what_they_multiply(kind: str, pairs: int, columns: int, rows: int) -> None:
    weight, numbers = make(kind, 2 * pairs, columns, BF16)
    given, norm = stream(rows, columns, deltas=2), NormWeight(torch.rand(columns) + 0.5, EPS)
    bias = torch.randn(2 * pairs).to(BF16)
    reference = ReferenceOps(weight.words_FW.device)
    for activation in Activation if rows == 1 else [Activation.SILU]:
        expected = reference.gated_activation(normed(given, norm) @ numbers.T + bias.float(), activation)
        close(normed_product(given, norm, weight, bias_F=bias, activation=activation), expected, cuts=3)


@pytest.mark.parametrize(
    ("kind", "dtype", "features", "columns", "rows"),
    [
        ("dense", BF16, 70, 96, 1),
        ("dense", FP16, 192, 1024, 16),
        ("int4", BF16, 192, 1024, 3),
        ("int8", FP16, 33, 160, 3),
        ("fp8", BF16, 4, 32, 2),
    ],
)
def test_the_stream_is_settled_once(kind: str, dtype: torch.dtype, features: int, columns: int, rows: int) -> None:
    weight, numbers = make(kind, features, columns, dtype)
    x, given = torch.randn(rows, columns).to(dtype), stream(rows, features, deltas=2, dtype=dtype)
    total = given.residual_TD + given.deltas[0].float() + given.deltas[1].float()
    close(plain_product(x, weight, settled=given), x.float() @ numbers.T, dtype)
    assert torch.equal(given.residual_TD, total)


def test_without_a_stream() -> None:
    weight, numbers = make("dense", 40, 72, BF16)
    x, bias = torch.randn(7, 72).to(BF16), torch.randn(40).to(BF16)
    close(plain_product(x, weight, bias_F=bias), x.float() @ numbers.T + bias.float())
    wide = torch.randn(7, 100).to(BF16)[:, 9:81]
    close(plain_product(wide, weight), wide.float() @ numbers.T)
    assert plain_product(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_streams_of_any_size(size: float) -> None:
    """The factor of a row is applied last: until then its numbers are as large as the stream's."""
    weight, numbers = make("dense", 40, 512, BF16)
    given, norm = stream(2, 512, deltas=1, size=size), NormWeight(torch.rand(512) + 0.5, EPS)
    given.residual_TD[1] = 0
    given.deltas[0][1] = 0
    found = normed_product(given, norm, weight)
    close(found, normed(given, norm) @ numbers.T)
    assert not found[1].any()


def test_a_row_that_is_none_spoils_no_other() -> None:
    weight, _ = make("dense", 40, 512, BF16)
    given, norm = stream(3, 512, deltas=1), NormWeight(torch.ones(512), EPS)
    whole = normed_product(given, norm, weight)
    given.residual_TD[1, 3] = torch.nan
    spoilt = normed_product(given, norm, weight)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[::2], whole[::2])


@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_of_real_size_gives_every_multiprocessor_work(normed: bool) -> None:
    for features, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 3072)):
        tile = few_rows_tile(features, columns // 64, normed=normed)
        assert tile.rows >= FEW_ROWS
        assert tile.splits * -(-features // tile.features) >= 128
