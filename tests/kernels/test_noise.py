"""The counter-based Gumbel noise: a distribution, no correlation, and the same in Triton."""

import math

import pytest
import torch
import triton
import triton.language as tl

from shoal.kernels import noise
from shoal.kernels.sampling import gumbel


@triton.jit
def gumbel_kernel(seed_ptr, position_ptr, out_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    ids = tl.arange(0, COUNT)
    noise_V = gumbel(tl.load(seed_ptr), tl.load(position_ptr), ids)
    tl.store(out_ptr + ids, noise_V)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 5), (-1, 131071), (2**63 - 1, 3), (-(2**63), 10**12)])
def test_triton_draws_the_same_noise(device: torch.device, seed: int, position: int) -> None:
    seed_1, position_1 = (torch.tensor([value], device=device) for value in (seed, position))
    actual = torch.empty(2048, device=device)
    gumbel_kernel[(1,)](seed_1, position_1, actual, COUNT=2048)
    ids = torch.arange(2048, dtype=torch.int32, device=device)
    expected = noise.gumbel(*noise.row_keys(seed_1, position_1), ids)[0]
    # The uniforms are the same bits; only the two logarithms may round differently.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def draw(seeds: int, ids: int) -> torch.Tensor:
    """[seeds, ids] at position 3."""
    keys = noise.row_keys(torch.arange(seeds), torch.full((seeds,), 3))
    return noise.gumbel(*keys, torch.arange(ids, dtype=torch.int32))


def test_moments_are_gumbels() -> None:
    noise_RV = draw(200, 5000)
    assert noise_RV.isfinite().all()
    assert noise_RV.mean().item() == pytest.approx(0.57722, abs=0.005)
    assert noise_RV.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_uniforms_fill_their_bins_evenly() -> None:
    uniform = torch.exp(-torch.exp(-draw(100, 10000))).flatten()
    counts = torch.histc(uniform, bins=100, min=0, max=1)
    chi_square = ((counts - 10000) ** 2 / 10000).sum().item()
    assert chi_square < 149  # 99 degrees of freedom: 0.1 %


def test_seeds_positions_and_ids_are_uncorrelated() -> None:
    by_seed = draw(4, 20000)
    at = [noise.row_keys(torch.tensor([9]), torch.tensor([position])) for position in range(4)]
    by_position = torch.cat([noise.gumbel(*keys, torch.arange(20000, dtype=torch.int32)) for keys in at])
    shifted = torch.stack([by_seed[0, :-1], by_seed[0, 1:]])
    for rows in (by_seed, by_position, shifted):
        correlation = torch.corrcoef(rows) - torch.eye(len(rows))
        assert correlation.abs().max().item() < 0.03
