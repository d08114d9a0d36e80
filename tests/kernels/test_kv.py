"""Writing keys and values into pages."""

import pytest
import torch

from shoal.kernels.ops import KVLayer
from shoal.kernels.reference import ReferenceOps, gather_pages
from shoal.kernels.triton_ops import TritonOps


def cache_of(pages: int, heads: int, page: int, dim: int, like: torch.Tensor) -> KVLayer:
    return KVLayer(*(torch.full((pages, heads, page, dim), 7.0).to(like) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 80, 32), (2, 128, 64), (1, 256, 16)])
def test_write_kv(ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    heads, dim, page = shape
    qkv = torch.randn(6, heads + 2 * heads, dim, dtype=dtype, device=ops.device)
    _, k, v = qkv.split([heads, heads, heads], dim=1)  # strided views
    slots = torch.tensor([0, page - 1, -1, page, 5 * page - 1, -1], device=ops.device)
    ours, theirs = cache_of(5, heads, page, dim, qkv), cache_of(5, heads, page, dim, qkv)
    ops.write_kv(k, v, ours, slots)
    reference.write_kv(k, v, theirs, slots)
    assert torch.equal(ours.k_NKBE, theirs.k_NKBE)
    assert torch.equal(ours.v_NKBE, theirs.v_NKBE)


def test_write_of_no_tokens(ops: TritonOps) -> None:
    empty = torch.empty(0, 1, 64, device=ops.device)
    cache = cache_of(1, 1, 16, 64, empty)
    ops.write_kv(empty, empty, cache, torch.empty(0, dtype=torch.int64, device=ops.device))
    assert (cache.k_NKBE == 7).all()


def test_reference_stores_where_it_gathers(on_cpu: ReferenceOps) -> None:
    k, v = torch.randn(2, 20, 2, 8)
    cache = cache_of(4, 2, 16, 8, k)
    block_row = torch.tensor([3, 1], dtype=torch.int32)
    slots = torch.tensor([int(block_row[i // 16]) * 16 + i % 16 for i in range(20)])
    on_cpu.write_kv(k, v, cache, slots)
    keys, values = gather_pages(cache, block_row, 20)
    assert torch.equal(keys, k.transpose(0, 1))
    assert torch.equal(values, v.transpose(0, 1))
    assert (cache.k_NKBE[[0, 2]] == 7).all()
