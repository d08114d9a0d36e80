"""The halves of a layer in one call each: the bits of the same operations one after the other."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.native import TILE_ROWS, Native, decode_shape, load_native, pack_q4, pack_q8
from shoal.kernels.native_layer import (
    DecodeRows,
    NativeAttend,
    NativeMlp,
    NormWeight,
    PackedWeight,
    fits_heads,
    fits_mlp,
)
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, HeadNorms, HeadSpec, KVLayer, Rotation

CPU = torch.device("cpu")
HIDDEN, PAGE = 96, 16


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native() -> Native:
    found = load_native()
    if found is None:
        pytest.skip("no compiler here, or another processor")
    return found


def make_weight(bits: int, rows: int, columns: int) -> PackedWeight:
    padded, groups = -(-rows // TILE_ROWS) * TILE_ROWS, columns // 32
    scale = torch.rand(padded, groups) * 0.01
    if bits == 4:
        data = pack_q4(torch.randint(0, 16, (padded, columns)), scale, -8 * scale)
    else:
        data = pack_q8(torch.randint(-128, 128, (padded, columns)), scale / 16)
    return PackedWeight(data, bits, rows, columns)


def multiply(native: Native, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    product = native.q4_product if weight.bits == 4 else native.q8_product
    return product(x, weight.data, weight.out_features)


def make_norm(size: int) -> NormWeight:
    return NormWeight(torch.rand(size), 1e-5)


def make_rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta and residual."""
    return torch.randn(count, HIDDEN).bfloat16(), torch.randn(count, HIDDEN)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 70])
def test_mlp(native: Native, bits: int, count: int) -> None:
    ops, norm = NativeCpuOps(CPU, native), make_norm(HIDDEN)
    up, down = make_weight(bits, 2 * 160, HIDDEN), make_weight(bits, HIDDEN, 160)
    delta, residual = make_rows(count)
    expected_residual = residual.clone()
    x = ops.add_rms_norm(delta, expected_residual, norm.weight_D, eps=norm.eps)
    expected = multiply(native, ops.gated_activation(multiply(native, x, up), Activation.SILU), down)
    assert torch.equal(NativeMlp(native, norm, up=up, down=down)(delta, residual), expected)
    assert torch.equal(residual, expected_residual)


class Heads(NamedTuple):
    query: int
    kv: int
    dim: int
    rotated: int = 0
    normed: bool = False

    def spec(self) -> HeadSpec:
        norms = HeadNorms(torch.rand(self.dim), torch.rand(self.dim), 1e-6) if self.normed else None
        rotation = Rotation(torch.randn(2000, self.rotated), interleaved=False) if self.rotated else None
        return HeadSpec(self.query, self.kv, norms, rotation)


def make_batch(lens: list[int]) -> AttentionBatch:
    counts = [-(-length // PAGE) for length in lens]
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.randperm(sum(counts)).split(counts), strict=True):
        row[: len(pages)] = pages
    ones = (1,) * len(lens)
    return AttentionBatch(
        query_start_S1=torch.arange(len(lens) + 1, dtype=torch.int32),
        kv_lens_S=torch.tensor(lens, dtype=torch.int32),
        block_table_SP=table,
        num_decodes=len(lens),
        max_query_len=1,
        max_kv_len=max(lens),
        query_lens=ones,
        kv_lens=tuple(lens),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lens", [[1], [40], [512, 513, 1100, 3], [7] * 33])
@pytest.mark.parametrize(
    "heads",
    [Heads(9, 3, 32, 32), Heads(4, 4, 64, 32, normed=True), Heads(2, 1, 16), Heads(6, 1, 80, 64)],
    ids=["grouped", "normed, half rotated", "no rotation", "one key head"],
)
@pytest.mark.parametrize(
    "spec", [AttentionSpec(0.2), AttentionSpec(0.3, window=20, softcap=5.0)], ids=["plain", "both"]
)
def test_attention(native: Native, *, bits: int, lens: list[int], heads: Heads, spec: AttentionSpec) -> None:
    ops, norm, head_spec, batch = NativeCpuOps(CPU, native), make_norm(HIDDEN), heads.spec(), make_batch(lens)
    qkv = make_weight(bits, (heads.query + 2 * heads.kv) * heads.dim, HIDDEN)
    out = make_weight(bits, HIDDEN, heads.query * heads.dim)
    pages = int(batch.block_table_SP.max()) + 1
    cache = KVLayer(*(torch.randn(pages, heads.kv, PAGE, heads.dim).bfloat16() for _ in range(2)))
    expected_cache = KVLayer(cache.k_NKBE.clone(), cache.v_NKBE.clone())
    positions = torch.tensor(lens) - 1
    last_pages = batch.block_table_SP.gather(1, (positions // PAGE)[:, None])[:, 0]
    slots = last_pages * PAGE + positions % PAGE
    slots[-1] = -1  # stores nothing, and attends to what is there
    delta, residual = make_rows(len(lens))

    expected_residual = residual.clone()
    x = ops.add_rms_norm(delta, expected_residual, norm.weight_D, eps=norm.eps)
    qkv_TNE = multiply(native, x, qkv).view(len(lens), -1, heads.dim)
    q = ops.rotate_and_store(qkv_TNE, expected_cache, head_spec, positions_T=positions, slots_T=slots)
    expected = multiply(native, ops.attention(q, expected_cache, batch, spec).flatten(1), out)

    attend = NativeAttend(native, norm, qkv=[qkv], out=out, heads=head_spec)
    shape = decode_shape(cache, batch, spec, heads=heads.query, query_stride=qkv.out_features)
    rows = DecodeRows(positions.data_ptr(), slots.data_ptr())
    found = attend(delta, residual, cache, rows=rows, shape=shape)
    assert torch.equal(found, expected)
    assert torch.equal(residual, expected_residual)
    assert all(torch.equal(*pair) for pair in zip(cache, expected_cache, strict=True))


def test_what_there_are_kernels_for() -> None:
    assert fits_mlp(make_weight(4, 128, 32), make_weight(8, 32, 64))
    assert not fits_mlp(make_weight(4, 96, 32), make_weight(4, 32, 96))  # a tile of gate and up would mix
    table = torch.zeros(8, 64)
    assert fits_heads(HeadSpec(3, 1, None, Rotation(table, interleaved=False)), 64)
    assert not fits_heads(HeadSpec(3, 1, None, Rotation(table, interleaved=True)), 64)
    assert not fits_heads(HeadSpec(3, 1, None, Rotation(table[:, :24], interleaved=False)), 64)
    assert not fits_heads(HeadSpec(1, 1), 24)
    assert not fits_heads(HeadSpec(1, 1), 16)  # the output projection reads 32 columns at a time
