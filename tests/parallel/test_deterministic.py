"""Products of packed weights whose rows are their own: the same bits alone and in any batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.parallel.int4 import Int4Linear
from shoal.parallel.int8 import Int8Linear
from shoal.parallel.quant import HalfLinear, select_kernels

from .test_quant import make_codes, random_codes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows_are_their_own(product: Callable[[Tensor], Tensor], x_TD: Tensor) -> None:
    alone = torch.cat([product(row[None].clone()) for row in x_TD])
    for size in (2, 3, 5, 16, 79, 80, len(x_TD)):
        order = torch.randperm(len(x_TD))[:size]
        assert torch.equal(product(x_TD[order]), alone[order]), size


@pytest.mark.parametrize("shape", [(64, 64), (100, 192), (960, 576)])
@pytest.mark.parametrize("native", [True, False])
def test_packed_products(monkeypatch: pytest.MonkeyPatch, *, shape: tuple[int, int], native: bool) -> None:
    if not native:
        monkeypatch.setattr("shoal.parallel.quant.load_native", lambda: None)
    kernels = select_kernels(CPU, torch.bfloat16, deterministic=True)
    for codes, dense in (make_codes("Q4_1", *shape), random_codes(8, *shape, shape[1], zeros=False)):
        method = kernels.make(codes)
        if method is None:
            pytest.skip("torch packs int4 in a way we do not know on this CPU")
        assert native or isinstance(method, Int4Linear | Int8Linear)
        x = torch.randn(150, shape[1]).bfloat16()
        rows_are_their_own(method.apply, x)
        expected = x.float() @ dense.T
        assert (method.apply(x).float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.skipif(not HalfLinear.is_available(), reason="needs FBGEMM")
@pytest.mark.parametrize("shape", [(101, 48), (1000, 576), (7, 33)])
def test_the_heads_product(shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    rows_are_their_own(HalfLinear(weight).apply, torch.randn(150, shape[1]))
