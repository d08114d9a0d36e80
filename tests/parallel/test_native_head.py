"""A vocabulary of 8 bits: its logits and its rows are those of the codes."""

import pytest
import torch

from shoal.kernels.native import load_native
from shoal.parallel.codes import Codes
from shoal.parallel.native_head import NativeHead


def make_codes(rows: int, columns: int = 192, group: int = 32) -> Codes:
    torch.manual_seed(0)
    codes_FD = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return Codes(codes_FD, torch.rand(rows, columns // group), None, group, columns)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("rows", [5, 4096, 5000])
def test_logits_and_rows(rows: int, group: int) -> None:
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    codes = make_codes(rows, group=group)
    head, dense_VD, x_RD = NativeHead(native, codes), codes.dense(), torch.randn(3, 400)[:, ::2][:, :192]
    exact = x_RD.double() @ dense_VD.T.double()
    assert bool(((head.logits(x_RD) - exact).abs() <= 3e-3).all())  # of sums of some thousands
    ids = torch.tensor([0, rows - 1, rows // 2, 0])
    assert torch.equal(head.lookup(ids), dense_VD[ids])
    assert head.num_bytes() >= rows * 192


def test_what_it_takes() -> None:
    plain = make_codes(4)
    assert NativeHead.fits(plain)
    assert NativeHead.fits(make_codes(4, group=48))
    assert not NativeHead.fits(make_codes(4, group=24))
    zeros_FG = torch.zeros_like(plain.scale_FG)
    assert not NativeHead.fits(Codes(plain.codes_FD, plain.scale_FG, zeros_FG, 32, 192))
    assert not NativeHead.fits(Codes(plain.codes_FD, plain.scale_FG, None, 32, 192, torch.arange(192)))
    assert not NativeHead.fits(Codes(plain.codes_FD.to(torch.uint8), plain.scale_FG, None, 32, 192))
