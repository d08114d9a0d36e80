"""Writing keys and values into pages, as they are or as 8-bit codes."""

import pytest
import torch

from shoal.kernels.cpu import CpuOps
from shoal.kernels.kv_codes import decode, encode, largest_code
from shoal.kernels.ops import KVLayer
from shoal.kernels.reference import ReferenceOps, gather_pages
from shoal.kernels.triton_ops import TritonOps

CODES = [torch.int8, torch.float8_e4m3fn]


def cache_of(pages: int, heads: int, page: int, dim: int, like: torch.Tensor) -> KVLayer:
    """Filled with sevens; with scales if `like` has 8 bits."""
    tensors = [torch.full((pages, heads, page, dim), 7.0).to(like) for _ in range(2)]
    if largest_code(like.dtype):
        tensors += [torch.full((pages, heads, page), 7.0, device=like.device) for _ in range(2)]
    return KVLayer(*tensors)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, *CODES])
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 80, 32), (2, 128, 64), (1, 256, 16)])
def test_write_kv(
    ops: TritonOps,
    reference: ReferenceOps,
    dtype: torch.dtype,
    stored: torch.dtype | None,
    shape: tuple[int, int, int],
) -> None:
    heads, dim, page = shape
    qkv = torch.randn(6, heads + 2 * heads, dim, dtype=dtype, device=ops.device)
    qkv *= torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0, 1e-31], device=ops.device)[:, None, None]
    _, k, v = qkv.split([heads, heads, heads], dim=1)  # strided views
    slots = torch.tensor([0, page - 1, -1, page, 5 * page - 1, 2 * page], device=ops.device)
    like = qkv.to(stored or dtype)
    ours, theirs = cache_of(5, heads, page, dim, like), cache_of(5, heads, page, dim, like)
    ops.write_kv(k, v, ours, slots)
    reference.write_kv(k, v, theirs, slots)
    for mine, expected in zip(ours, theirs, strict=True):
        assert same(mine, expected)
    for mine_scale, scale in ((ours.k_scale_NKB, theirs.k_scale_NKB), (ours.v_scale_NKB, theirs.v_scale_NKB)):
        assert (mine_scale is None) == (scale is None) == (stored is None)
        assert mine_scale is None or scale is None or torch.equal(mine_scale, scale)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_round_to_the_nearest(ops: TritonOps, dtype: torch.dtype) -> None:
    """Every code, everything halfway between two and a little to either side, at a scale of one."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.abs() <= largest_code(dtype)].sort().values  # fp8 has NaNs, int8 has -128
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, middles, torch.nextafter(middles, codes[1:]), torch.nextafter(middles, codes[:-1])])
    heads = torch.full((1, len(x), 16), largest_code(dtype))
    heads[0, :, 3] = x
    cache = cache_of(1, len(x), 16, 16, heads.to(ops.device, dtype))
    ops.write_kv(
        heads.to(ops.device), heads.to(ops.device), cache, torch.zeros(1, dtype=torch.int64, device=ops.device)
    )
    nearest = x.to(dtype) if dtype.is_floating_point else x.round().to(dtype)
    assert same(cache.k_NKBE[0, :, 0, 3].cpu(), nearest)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(ops: TritonOps, dtype: torch.dtype, poison: float) -> None:
    k = torch.ones(2, 1, 64, device=ops.device)
    k[1, 0, 5] = poison
    for implementation in (ops, ReferenceOps(ops.device)):
        cache = cache_of(1, 1, 16, 64, k.to(dtype))
        implementation.write_kv(k, k, cache, torch.tensor([0, 1], device=ops.device))
        decoded = decode(cache.v_NKBE, cache.v_scale_NKB)
        assert decoded[0, 0, 0].isfinite().all()
        assert not decoded[0, 0, 1].isfinite().all()


def test_codes_are_close(on_cpu: ReferenceOps) -> None:
    x = torch.randn(100, 3, 64) * torch.logspace(-20, 20, 100)[:, None, None]
    highest = x.abs().amax(-1, keepdim=True)
    int8, fp8 = (decode(*encode(x, dtype)) for dtype in CODES)
    assert ((int8 - x).abs() <= highest / 253).all()
    assert ((fp8 - x).abs() <= x.abs() / 15.9 + highest / 2**17).all()


@pytest.mark.parametrize("dtype", CODES)
def test_a_cpu_encodes_as_the_reference_does(on_cpu: ReferenceOps, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 20, 2, 64).bfloat16()
    ours, theirs = cache_of(4, 2, 16, 64, k.to(dtype)), cache_of(4, 2, 16, 64, k.to(dtype))
    CpuOps(on_cpu.device).write_kv(k, v, ours, torch.arange(7, 27))
    on_cpu.write_kv(k, v, theirs, torch.arange(7, 27))
    assert all(same(mine, expected) for mine, expected in zip(ours, theirs, strict=True))
    assert ours.k_scale_NKB is not None
    assert theirs.k_scale_NKB is not None
    assert torch.equal(ours.k_scale_NKB, theirs.k_scale_NKB)


def test_write_of_no_tokens(ops: TritonOps) -> None:
    empty = torch.empty(0, 1, 64, device=ops.device)
    cache = cache_of(1, 1, 16, 64, empty)
    ops.write_kv(empty, empty, cache, torch.empty(0, dtype=torch.int64, device=ops.device))
    assert (cache.k_NKBE == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, *CODES])
def test_reference_stores_where_it_gathers(on_cpu: ReferenceOps, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 20, 2, 8)
    cache = cache_of(4, 2, 16, 8, k.to(dtype))
    block_row = torch.tensor([3, 1], dtype=torch.int32)
    slots = torch.tensor([int(block_row[i // 16]) * 16 + i % 16 for i in range(20)])
    on_cpu.write_kv(k, v, cache, slots)
    for new, found in zip((k, v), gather_pages(cache, block_row, 20), strict=True):
        stored = decode(*encode(new, dtype)) if largest_code(dtype) else new
        assert torch.equal(found, stored.transpose(0, 1))
    assert (cache.k_NKBE[[0, 2]].float() == 7).all()
