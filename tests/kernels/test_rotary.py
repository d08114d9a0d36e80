"""Rotary embedding: the kernel against the reference, and the reference against complex multiplication."""

import pytest
import torch

from shoal.kernels.ops import HeadSpec, KVLayer, Rotation
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps


def cos_sin_table(dims: int, device: torch.device, *, positions: int = 64) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, dims, 2) / dims)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (9, 3, 64, 64), (3, 1, 80, 32), (2, 2, 256, 128)])
def test_rope(
    ops: TritonOps,
    reference: ReferenceOps,
    interleaved: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
) -> None:
    heads, kv_heads, dim, rotated = shape
    qkv = torch.randn(6, heads + 2 * kv_heads, dim, dtype=dtype, device=ops.device)
    positions = torch.tensor([0, 1, 2, 40, 63, 7], device=ops.device)
    turn = HeadSpec(heads, kv_heads, None, Rotation(cos_sin_table(rotated, ops.device), interleaved))
    found = []
    for implementation in (ops, reference):
        k, v = torch.zeros(2, 1, kv_heads, 16, dim, dtype=dtype, device=ops.device)
        slots = torch.arange(6, device=ops.device)
        q = implementation.rotate_and_store(qkv.clone(), KVLayer(k, v), turn, positions_T=positions, slots_T=slots)
        found.append(torch.cat([q, k[0, :, :6].transpose(0, 1), v[0, :, :6].transpose(0, 1)], dim=1))
    ours, theirs = found
    tolerance = 1e-6 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[..., rotated:], theirs[..., rotated:])
    assert torch.equal(ours[:, heads + kv_heads :], theirs[:, heads + kv_heads :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_turns_pairs_in_the_complex_plane(on_cpu: ReferenceOps, interleaved: bool) -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    positions, table = torch.tensor([0, 5, 11]), cos_sin_table(8, torch.device("cpu"))
    pairs = q.view(3, 2, 4, 2) if interleaved else q.view(3, 2, 2, 4).transpose(2, 3)
    turn = torch.complex(table[positions, :4], table[positions, 4:])[:, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = (turned if interleaved else turned.transpose(2, 3)).reshape(3, 2, 8)
    on_cpu.rope(q, k, positions, table, interleaved=interleaved)
    torch.testing.assert_close(q, expected)
