"""Norms per head, rotation and KV write in one: the kernel against the reference's composition of the three."""

from typing import NamedTuple

import pytest
import torch

from shoal.kernels.ops import HeadNorms, HeadSpec, KVLayer, Rotation
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps

from .test_rotary import cos_sin_table

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
POSITIONS = (0, 1, 2, 40, 63, 7)
SLOTS = (5, 33, -1, 79, 16, 0)  # of 5 pages of 16; -1 stores nothing


class How(NamedTuple):
    """rotated: dims, 0 for no rotation."""

    rotated: int = 0
    normed: bool = False
    interleaved: bool = False


def make_spec(shape: tuple[int, int, int], how: How, device: torch.device) -> HeadSpec:
    heads, kv_heads, dim = shape
    norms = HeadNorms(*(1 + 0.2 * torch.randn(2, dim, device=device)), 1e-5) if how.normed else None
    rotation = Rotation(cos_sin_table(how.rotated, device), how.interleaved) if how.rotated else None
    return HeadSpec(heads, kv_heads, norms, rotation)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((4, 2, 64), How(rotated=64)),
        ((9, 3, 64), How(rotated=64, normed=True)),
        ((3, 1, 80), How(rotated=32, normed=True)),
        ((2, 2, 256), How(rotated=128, interleaved=True)),
        ((16, 1, 96), How(rotated=96, normed=True, interleaved=True)),
        ((4, 4, 64), How()),
        ((6, 2, 24), How(normed=True)),
        ((4, 2, 20), How(rotated=18, normed=True)),
    ],
)
def test_it_is_norm_rotation_and_write_in_one(
    ops: TritonOps,
    reference: ReferenceOps,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    how: How,
) -> None:
    heads, kv_heads, dim = shape
    spec = make_spec(shape, how, ops.device)
    qkv = torch.randn(len(POSITIONS), heads + 2 * kv_heads, dim, dtype=dtype, device=ops.device) * 3
    positions, slots = torch.tensor([POSITIONS, SLOTS], device=ops.device)
    found = []
    for implementation in (ops, reference):
        cache = KVLayer(*(torch.full((5, kv_heads, 16, dim), 7.0, dtype=dtype, device=ops.device) for _ in range(2)))
        q = implementation.rotate_and_store(qkv.clone(), cache, spec, positions_T=positions, slots_T=slots)
        found.append((q, cache.k_NKBE, cache.v_NKBE))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(found[0][2], found[1][2]), "values are stored as they are"


def test_rows_of_a_wider_projection(ops: TritonOps, reference: ReferenceOps) -> None:
    spec = make_spec((4, 2, 64), How(rotated=64), ops.device)
    rows = torch.randn(3, 600, device=ops.device)
    qkv = rows[:, : 8 * 64].view(3, 8, 64)
    positions, slots = torch.tensor([[4, 5, 6], [1, 2, 3]], device=ops.device)
    caches = [KVLayer(*(torch.zeros(1, 2, 16, 64, device=ops.device) for _ in range(2))) for _ in range(2)]
    ours = ops.rotate_and_store(qkv, caches[0], spec, positions_T=positions, slots_T=slots)
    theirs = reference.rotate_and_store(qkv.clone(), caches[1], spec, positions_T=positions, slots_T=slots)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(caches[0].k_NKBE, caches[1].k_NKBE)


def test_no_tokens(ops: TritonOps) -> None:
    spec = make_spec((4, 2, 64), How(rotated=64), ops.device)
    cache = KVLayer(*(torch.zeros(1, 2, 16, 64, device=ops.device) for _ in range(2)))
    none = torch.empty(0, dtype=torch.int64, device=ops.device)
    q = ops.rotate_and_store(torch.empty(0, 8, 64, device=ops.device), cache, spec, positions_T=none, slots_T=none)
    assert q.shape == (0, 4, 64)
    assert not cache.k_NKBE.any()


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_values_as_codes(
    ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Codes of the reference, but where a key lay so near the middle of two that rounding once or twice decides."""
    shape = (6, 3, 80)
    spec = make_spec(shape, How(rotated=32, normed=True), ops.device)
    qkv = torch.randn(len(POSITIONS), 12, 80, dtype=dtype, device=ops.device)
    positions, slots = torch.tensor([POSITIONS, SLOTS], device=ops.device)
    caches = []
    for implementation in (ops, reference):
        pages = (torch.zeros(5, 3, 16, 80, device=ops.device).to(stored) for _ in range(2))
        scales = (torch.full((5, 3, 16), 7.0, device=ops.device) for _ in range(2))
        caches.append(KVLayer(*pages, *scales))
        implementation.rotate_and_store(qkv.clone(), caches[-1], spec, positions_T=positions, slots_T=slots)
    ours, theirs = caches
    assert torch.equal(ours.v_NKBE.float(), theirs.v_NKBE.float())
    assert torch.equal(ours.v_scale_NKB, theirs.v_scale_NKB)
    torch.testing.assert_close(ours.k_scale_NKB, theirs.k_scale_NKB, rtol=TOLERANCE[dtype], atol=0)
    step = 1.0 if stored == torch.int8 else 32.0  # of the largest codes
    differs = (ours.k_NKBE.float() - theirs.k_NKBE.float()).abs()
    assert differs.max() <= step
    assert (differs > 0).float().mean() < (1e-3 if dtype == torch.float32 else 0.05)
