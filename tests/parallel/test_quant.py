"""Linear methods over codes against the dense product of the numbers that the codes stand for."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from shoal.kernels.native import load_native
from shoal.parallel.blocks import read_blocks
from shoal.parallel.codes import Codes, Float8, in_groups, stack
from shoal.parallel.int4 import Int4Layout, Int4Linear, probe_int4_layout
from shoal.parallel.int8 import Int8Linear
from shoal.parallel.native import NativeInt4Linear, NativeInt8Linear
from shoal.parallel.quant import CodeTable, CpuKernels, DenseLinear, GatheredLinear, StackedLinear, select_kernels

CPU = torch.device("cpu")
FORMATS = ["Q4_0", "Q4_1"]


def make_codes(format: str, rows: int, in_features: int) -> tuple[Codes, torch.Tensor]:
    """Blocks of random weights as codes, and what they stand for."""
    kind = GGMLQuantizationType[format]
    blocks = quantize(np.random.default_rng(rows).standard_normal((rows, in_features), np.float32), kind)
    return read_blocks(format, torch.from_numpy(blocks)), torch.from_numpy(dequantize(blocks, kind))


def random_codes(
    bits: int, rows: int, columns: int, group: int, *, zeros: bool, seed: int = 0
) -> tuple[Codes, torch.Tensor]:
    """Of the kind that checkpoints have, their columns in order."""
    rng = torch.Generator().manual_seed(seed)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    codes_FD = torch.randint(low, high, (rows, columns), generator=rng).to(dtype)
    scale_FG = 0.1 + torch.rand(rows, columns // group, generator=rng)
    zero_FG = torch.randint(low, high, scale_FG.shape, generator=rng).float() if zeros else None
    codes = Codes(codes_FD, scale_FG, zero_FG, group, columns)
    return codes, codes.dense()


def packed(format: str, rows: int, in_features: int) -> tuple[Int4Linear, torch.Tensor]:
    codes, dense = make_codes(format, rows, in_features)
    layout = probe_int4_layout()
    if layout is None:
        pytest.skip("torch packs int4 in a way we do not know on this CPU")
    return Int4Linear(codes, layout), dense


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Of bfloat16's size: scale, zero, weight and result are each rounded once.
    return found.shape == expected.shape and bool((found.float() - expected).norm() <= 1e-2 * expected.norm())


# Torch's form of 4 bits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 100, 2000])
@pytest.mark.parametrize("in_features", [32, 192])
def test_products_are_the_dense_ones(format: str, rows: int, in_features: int) -> None:
    method, dense = packed(format, rows, in_features)
    assert (method.out_features, method.in_features) == dense.shape
    torch.manual_seed(0)
    for tokens in (0, 1, 7, Int4Linear.UNPACK_FROM - 1, Int4Linear.UNPACK_FROM, 130):
        x = torch.randn(tokens, in_features).bfloat16()
        found = method.apply(x)
        assert found.dtype == torch.bfloat16
        assert is_close(found, x.float() @ dense.T)


@pytest.mark.parametrize("group", [32, 96, 128, 256, 384])
def test_groups_of_any_size(group: int) -> None:
    layout = probe_int4_layout()
    if layout is None:
        pytest.skip("torch packs int4 in a way we do not know on this CPU")
    codes, dense = random_codes(4, 64, 768, group, zeros=True)
    method = Int4Linear(codes, layout)
    for tokens in (3, 100):
        x = torch.randn(tokens, 768).bfloat16()
        assert is_close(method.apply(x), x.float() @ dense.T)


@pytest.mark.parametrize("format", FORMATS)
def test_both_ways_use_the_same_weights(format: str) -> None:
    """Rows of the identity read the weights out: the two products then have nothing to round."""
    method, dense = packed(format, 100, 128)
    identity = torch.eye(128).bfloat16()
    few = torch.cat([method.apply(part) for part in identity.split(16)])
    many = method.apply(identity)
    assert identity.shape[0] >= Int4Linear.UNPACK_FROM
    assert torch.equal(few, many)
    assert (many.T.float() - dense).norm() <= 4e-3 * dense.norm()


def test_input_need_not_be_contiguous() -> None:
    method, _ = packed("Q4_1", 64, 64)
    x = torch.randn(5, 128).bfloat16()
    for part in (x[:, 64:], x[::2, :64]):
        assert torch.equal(method.apply(part), method.apply(part.contiguous()))


def test_large_weights_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = packed("Q4_1", 300, 64)
    x = torch.randn(100, 64).bfloat16()
    whole = method.apply(x)
    monkeypatch.setattr(Int4Linear, "_UNPACKED_WEIGHTS", 64 * 64)
    torch.testing.assert_close(method.apply(x), whole)


def test_memory_is_that_of_the_blocks() -> None:
    method, dense = packed("Q4_1", 256, 512)
    assert method.num_bytes() == dense.numel() // 32 * 20
    assert DenseLinear(dense.bfloat16()).num_bytes() > 3 * method.num_bytes()


@pytest.mark.parametrize("layout", [Int4Layout(64, 2), Int4Layout(32, 2), Int4Layout(32, 3), Int4Layout(16, 3)])
def test_any_layout_is_found_and_used(layout: Int4Layout) -> None:
    """CPUs with other vector units pack in other tiles."""

    def pack(nibbles_FD: torch.Tensor) -> torch.Tensor:
        rows, columns = nibbles_FD.shape
        tiles = nibbles_FD.view(-1, layout.tile, columns).transpose(1, 2)
        pairs = tiles.unflatten(2, (2, -1)) if layout.stack_dim == 2 else tiles.unflatten(2, (-1, 2)).transpose(2, 3)
        return (pairs[:, :, 0] | pairs[:, :, 1] << 4).to(torch.uint8).reshape(rows, columns // 2)

    assert probe_int4_layout(pack) == layout
    codes, dense = make_codes("Q4_1", 100, 64)
    x = torch.randn(Int4Linear.UNPACK_FROM, 64).bfloat16()
    assert is_close(Int4Linear(codes, layout, pack=pack).apply(x), x.float() @ dense.T)


def test_an_unknown_layout_is_refused() -> None:
    assert probe_int4_layout(lambda nibbles: nibbles[:, ::2].flip(1).to(torch.uint8)) is None


# 8 bits


@pytest.mark.parametrize("shape", [(64, 64), (100, 96), (1, 256), (300, 192)])
def test_rows_of_8_bits(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8Linear, "_UNPACKED_WEIGHTS", 64 * 64)
    codes, dense = random_codes(8, *shape, shape[1], zeros=False)
    method = Int8Linear(codes)
    for tokens in (0, 1, Int8Linear.UNPACK_FROM - 1, Int8Linear.UNPACK_FROM, 70):
        x = torch.randn(tokens, shape[1]).bfloat16()
        assert is_close(method.apply(x), x.float() @ dense.T)
    assert method.num_bytes() < 1.2 * dense.numel() + 12 * shape[0]


@pytest.mark.parametrize("group", [32, 64, 96, 192])
def test_our_own_kernel_of_8_bits(group: int) -> None:
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    codes, dense = random_codes(8, 1100, 192, group, zeros=False)
    method = NativeInt8Linear(native, codes)
    x = torch.randn(5, 384).bfloat16()
    for part in (x[:, 192:], x[::2, :192], x[:, ::2]):
        assert is_close(method.apply(part), part.float() @ dense.T)
    assert method.num_bytes() == 1120 * (192 + 4 * (192 // group))


# Columns in orders and groups of their own


@pytest.mark.parametrize("group_of", ["in order", "cut within groups", "shuffled", "shuffled and cut", "one"])
@pytest.mark.parametrize("zeros", [True, False])
def test_any_grouping_stands_for_the_same_numbers(group_of: str, *, zeros: bool) -> None:
    whole, dense = random_codes(4, 16, 256, 64, zeros=zeros)
    at = torch.arange(256)
    if "shuffled" in group_of:
        at = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    at = at[48:213] if "cut" in group_of else at[:64] if group_of == "one" else at
    codes = in_groups(whole.codes_FD[:, at], whole.scale_FG, whole.zero_FG, at // 64)
    assert codes.group % 32 == 0
    assert codes.codes_FD.shape[1] <= len(at) + 4 * 31
    assert torch.equal(codes.dense(), dense[:, at])
    method = CpuKernels(load_native(), probe_int4_layout(), deterministic=False).make(codes)
    assert method is not None
    assert isinstance(method, GatheredLinear) == (codes.order_D is not None)
    x = torch.randn(5, len(at)).bfloat16()
    assert is_close(method.apply(x), x.float() @ dense[:, at].T)


def test_codes_that_would_be_mostly_padding_are_left_dense() -> None:
    whole, _ = random_codes(8, 16, 256, 32, zeros=False)
    codes = in_groups(whole.codes_FD[:, ::4], whole.scale_FG, None, torch.arange(0, 256, 4) // 32)
    assert codes.codes_FD.shape[1] == 2 * codes.in_features
    assert select_kernels(CPU, torch.bfloat16).make(codes) is None


def test_rows_of_several_layers_are_stacked() -> None:
    parts = [random_codes(4, rows, 256, group, zeros=True, seed=rows) for rows, group in ((8, 64), (3, 128), (5, 256))]
    whole = stack([codes for codes, _ in parts])
    assert whole is not None
    assert torch.equal(whole.dense(), torch.cat([dense for _, dense in parts]))


def test_what_is_stored_differently_is_not_stacked() -> None:
    four, _ = random_codes(4, 8, 64, 32, zeros=True)
    eight, _ = random_codes(8, 8, 64, 32, zeros=False)
    ordered = in_groups(four.codes_FD, four.scale_FG, four.zero_FG, torch.arange(64).flip(0) // 32)
    floats = Float8(torch.ones(8, 64).to(torch.float8_e4m3fn), torch.ones(1, 1))
    assert [stack([four, other]) for other in (eight, ordered, floats)] == [None] * 3


@pytest.mark.parametrize(
    ("shapes", "block", "scales"),
    [
        ([(1, 1), (1, 1)], None, (24, 1)),
        ([(8, 1), (1, 1)], None, (24, 1)),
        ([(1, 2), (2, 2)], 8, (3, 2)),
    ],
)
def test_fp8_is_stacked(shapes: list[tuple[int, int]], block: int | None, scales: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parts = [
        Float8(torch.randn(rows, 16).to(torch.float8_e4m3fn), torch.rand(shape), block)
        for rows, shape in zip((8, 16), shapes, strict=True)
    ]
    whole = stack(parts)
    assert isinstance(whole, Float8)
    assert whole.scale.shape == scales
    assert torch.equal(whole.dense(), torch.cat([part.dense() for part in parts]))


def test_methods_one_under_the_other() -> None:
    (one, dense_one), (other, dense_other) = packed("Q4_1", 64, 64), packed("Q4_0", 30, 64)
    whole = StackedLinear([one, DenseLinear(torch.ones(2, 64).bfloat16()), other])
    x = torch.randn(3, 64).bfloat16()
    expected = x.float() @ torch.cat((dense_one, torch.ones(2, 64), dense_other)).T
    assert (whole.out_features, whole.in_features) == (96, 64)
    assert is_close(whole.apply(x), expected)
    assert whole.num_bytes() == one.num_bytes() + 2 * 64 * 2 + other.num_bytes()


# What a device takes


@pytest.mark.parametrize("deterministic", [True, False])
def test_our_own_kernels_are_chosen_where_they_can_be_built(*, deterministic: bool) -> None:
    if load_native() is None:
        pytest.skip("no compiler here, or another processor")
    kernels = select_kernels(CPU, torch.bfloat16, deterministic=deterministic)
    assert isinstance(kernels.make(make_codes("Q4_1", 64, 64)[0]), NativeInt4Linear)
    assert isinstance(kernels.make(make_codes("Q8_0", 64, 64)[0]), NativeInt8Linear)


def test_scales_that_float16_does_not_hold_go_elsewhere() -> None:
    layout = probe_int4_layout()
    if (native := load_native()) is None or layout is None:
        pytest.skip("needs both kernels")
    codes, _ = random_codes(4, 8, 64, 32, zeros=True)
    for factor in (1e5, 1e-7):
        scaled = Codes(codes.codes_FD, codes.scale_FG * factor, codes.zero_FG, codes.group, codes.in_features)
        method = CpuKernels(native, layout, deterministic=False).make(scaled)
        assert isinstance(method, Int4Linear)
        x = torch.randn(3, 64).bfloat16()
        assert is_close(method.apply(x), x.float() @ scaled.dense().T)


def test_without_our_own_kernels_torchs_serve() -> None:
    kernels = CpuKernels(None, probe_int4_layout(), deterministic=False)
    assert isinstance(kernels.make(random_codes(8, 8, 64, 64, zeros=False)[0]), Int8Linear)
    assert kernels.make(random_codes(8, 8, 64, 32, zeros=False)[0]) is None
    assert kernels.make(random_codes(8, 8, 64, 64, zeros=True)[0]) is None
    assert CpuKernels(None, None, deterministic=False).make(make_codes("Q4_1", 8, 64)[0]) is None


def test_what_has_no_fast_kernel_is_left_dense() -> None:
    codes, _ = random_codes(4, 8, 64, 32, zeros=True)
    assert select_kernels(CPU, torch.float32).make(codes) is None
    kernels = select_kernels(CPU, torch.bfloat16)
    assert kernels.make(random_codes(8, 8, 64, 16, zeros=True)[0]) is None
    assert kernels.make(random_codes(4, 8, 64, 16, zeros=True)[0]) is None
    assert kernels.make(Float8(torch.ones(8, 64).to(torch.float8_e4m3fn), torch.ones(1, 1))) is None


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 16), (8, 64)])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_table_of_codes(bits: int, group: int, *, zeros: bool) -> None:
    codes, dense = random_codes(bits, 50, 64, group, zeros=zeros)
    table = CodeTable(codes)
    ids = torch.tensor([3, 49, 3, 0])
    assert torch.equal(table.lookup(ids), dense[ids])
    assert len(table) == 50
    assert table.num_bytes() <= 50 * (64 * bits // 8 + (8 if zeros else 4) * (64 // group))
