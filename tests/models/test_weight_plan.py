"""What weights are planned to take is what they take once they are loaded, in every family and on every rank."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from shoal.kernels.coded_weight import fp8_weight, int4_weight, int8_weight
from shoal.kernels.native import load_native
from shoal.kernels.quant_tiles import DENSE_FROM, scratch_bytes, slab_features, weight_only_tile
from shoal.parallel.codes import Codes, Kind
from shoal.parallel.grid import Grid
from shoal.parallel.quant import CpuKernels
from shoal.parallel.threads import thread_comms
from shoal.runtime.checkpoint import Form
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.share import deal
from shoal.runtime.weight_plan import StoredAs, StoredIn, plan_weights

from ..runtime.test_grid import FAMILIES
from .support import TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_takes_what_was_planned(tiny, family: str, dtype: torch.dtype) -> None:
    made = tiny(family, **FAMILIES[family])
    checkpoint = made.checkpoint()
    spec = ModelSpec.from_config(checkpoint.config)
    stored = StoredIn(checkpoint, spec.names)
    for grid in (Grid(), Grid(tp=2), Grid(tp=2, pp=3)):
        for share in deal(spec, grid):
            comm = thread_comms(grid.tp)[share.place.shard]
            decoder = made.decoder(dtype=dtype, comm=comm, layers=share.layers)
            planned = plan_weights(share, stored, device="cpu", dtype=dtype)
            assert planned.total == decoder.weight_bytes, (family, share.place)
            assert not planned.has_codes


def llama(**changes: int) -> ModelSpec:
    return ModelSpec.from_config(AutoConfig.for_model("llama", **(TINY | changes)).to_dict())


def test_weights_that_nobody_has_yet_are_planned_by_their_format() -> None:
    spec = llama(hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    (share,) = deal(spec, Grid())
    dense, int4, int8 = (
        plan_weights(share, StoredAs(spec, form), device="cuda", dtype=torch.bfloat16)
        for form in (None, Form("int4", 128, Kind.INT4), Form("int8", 1, Kind.INT8))
    )
    matrices = dense.layers[0] - 2 * 256 * 4
    assert int4.layers[0] - 2 * 256 * 4 == pytest.approx(matrices * 4.25 / 16)
    assert int8.layers[0] - 2 * 256 * 4 == pytest.approx(matrices * 8 / 16, rel=0.15)
    assert int4.embedding == int8.embedding == dense.embedding == spec.vocab_size * 256 * 2
    assert int4.has_codes
    assert not dense.has_codes
    held_dense = plan_weights(share, StoredAs(spec, Form("int4", 128, Kind.INT4)), device="cuda", dtype=torch.float32)
    assert held_dense.layers == plan_weights(share, StoredAs(spec, None), device="cuda", dtype=torch.float32).layers


@pytest.mark.parametrize(("kind", "group"), [(Kind.INT4, 128), (Kind.INT4, 32), (Kind.INT8, 1), (Kind.FLOAT8, 128)])
def test_codes_on_a_gpu_take_what_was_planned(kind: Kind, group: int) -> None:
    rows, columns, heads = 1024, 2048, 16
    if kind is Kind.INT4:
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        weight = int4_weight(codes, torch.ones(rows, columns // group))
    elif kind is Kind.INT8:
        weight = int8_weight(torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows, 1))
    else:
        weight = fp8_weight(
            torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), torch.ones(rows // 128, columns // 128)
        )
    sizes = {"hidden_size": columns, "intermediate_size": rows, "head_dim": columns // heads}
    spec = llama(num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    (share,) = deal(spec, Grid())
    planned = plan_weights(share, StoredAs(spec, Form("", group, kind)), device="cuda", dtype=torch.bfloat16)
    bytes_a_weight = weight.num_bytes() / (rows * columns)
    num_weights = columns * (4 * columns + 3 * rows)
    assert planned.layers[0] - 2 * columns * 4 == pytest.approx(num_weights * bytes_a_weight, rel=0.002)


@pytest.mark.parametrize(("group", "zeros"), [(16, False), (32, False), (32, True), (1, False)])
def test_eight_bits_on_a_cpu_take_what_was_planned(group: int, *, zeros: bool) -> None:
    native = load_native()
    if native is None:
        pytest.skip("no compiler here, or another processor")
    rows, columns, heads = 512, 1024, 16
    scale_FG = torch.ones(rows, 1 if group == 1 else columns // group)
    codes_FD = torch.zeros(rows, columns, dtype=torch.int8)
    codes = Codes(codes_FD, scale_FG, scale_FG if zeros else None, columns if group == 1 else group, columns)
    layer = CpuKernels(native, None, deterministic=False).make(codes)
    assert layer is not None
    spec = llama(
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_size=columns,
        intermediate_size=rows,
        head_dim=columns // heads,
    )
    (share,) = deal(spec, Grid())
    form = Form("", group, Kind.INT8, zeros)
    planned = plan_weights(share, StoredAs(spec, form), device="cpu", dtype=torch.bfloat16)
    num_weights = columns * (4 * columns + 3 * rows)
    expected = num_weights * layer.num_bytes() / (rows * columns)
    assert planned.layers[0] - 2 * columns * 4 == pytest.approx(expected, rel=0.003)


def test_scratch_covers_every_step_up_to_the_widest() -> None:
    for features, inner in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 896)):
        for most in (1, 7, 16, 40, 64, 200, 256, 511):
            parts = [
                4 * tile.splits * rows * features
                for rows in range(1, most + 1)
                if (tile := weight_only_tile(rows, features, -(-inner // 128))).splits > 1
            ]
            assert scratch_bytes(most, features, inner) >= max(parts, default=0)
        slab = slab_features(features, inner) * inner * 2
        assert slab <= 64 << 20
        assert scratch_bytes(DENSE_FROM, features, inner) >= slab
        assert scratch_bytes(DENSE_FROM, features, inner, deterministic=True) == 0
