"""The block whose halves are one call each: where it is chosen, and that it is the composed one's equal."""

from functools import partial

import pytest
import torch

from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.kv_codes import encode, largest_code
from shoal.kernels.native import Native, load_native
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, HeadSpec, KVLayer, NormWeight
from shoal.kernels.reference import ReferenceOps
from shoal.parallel.codes import Codes
from shoal.parallel.comm import SoloComm
from shoal.parallel.native import NativeDenseLinear, NativeInt4Linear, NativeInt8Linear
from shoal.parallel.quant import StackedLinear
from shoal.runtime.models.decoder import Attention, Block, SequentialBlock, Step
from shoal.runtime.models.fuse import LayerParts, LayerWeights, Weights, select_fuse
from shoal.runtime.models.native_block import NativeBlock
from shoal.runtime.models.spec import LayerSpec, MLPSpec

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, DIM, MLP, PAGE = 64, 4, 2, 32, 96, 16


@pytest.fixture
def native() -> Native:
    torch.manual_seed(0)
    found = load_native()
    if found is None:
        pytest.skip("no compiler here, or another processor")
    return found


def make_weights(native: Native, rows: int, columns: int, *, bits: int) -> Weights:
    if bits == 16:
        return NativeDenseLinear(native, (torch.randn(rows, columns) / 10).bfloat16()), None
    scale_FG = torch.rand(rows, columns // 32) / 100
    if bits == 8:
        codes_FD = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        return NativeInt8Linear(native, Codes(codes_FD, scale_FG / 16, None, 32, columns)), None
    codes_FD = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    return NativeInt4Linear(native, Codes(codes_FD, scale_FG, torch.full_like(scale_FG, 8), 32, columns)), None


def make_qkv(native: Native, *bits: int) -> Weights:
    """One matrix, or queries, keys and values in bits of their own."""
    rows = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM] if len(bits) > 1 else [(HEADS + 2 * KV_HEADS) * DIM]
    parts = [make_weights(native, count, HIDDEN, bits=each)[0] for count, each in zip(rows, bits, strict=True)]
    return parts[0] if len(parts) == 1 else StackedLinear(parts), None


def make_parts(native: Native, *, activation: Activation = Activation.SILU, qkv: tuple[int, ...] = (4,)) -> LayerParts:
    weights = LayerWeights(
        qkv=make_qkv(native, *qkv),
        out=make_weights(native, HIDDEN, HEADS * DIM, bits=8),
        up=make_weights(native, 2 * MLP, HIDDEN, bits=4),
        down=make_weights(native, HIDDEN, MLP, bits=4),
    )
    norm = NormWeight(torch.rand(HIDDEN), 1e-5)
    spec = LayerSpec(AttentionSpec(0.2), None, MLPSpec(MLP, gated=True, activation=activation, bias=False))
    return LayerParts((norm, norm), weights, HeadSpec(HEADS, KV_HEADS), DIM, spec)


def compose(ops: NativeCpuOps, parts: LayerParts) -> Block:
    qkv, out, up, down = (method.apply for method, _ in parts.weights)
    norms = [norm for norm in parts.norms if norm is not None]
    enter, enter_mlp = (partial(ops.add_rms_norm, weight_D=norm.weight_D, eps=norm.eps) for norm in norms)
    attention = Attention(parts.spec.attention, ops=ops, heads=parts.heads, head_dim=DIM, qkv=qkv, out=out)
    return SequentialBlock(
        before_attention=enter,
        attention=attention,
        before_mlp=enter_mlp,
        mlp=lambda x: down(ops.gated_activation(up(x), Activation.SILU)),
    )


def make_step(query_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> Step:
    """Sequence i has page i."""
    ends = [torch.arange(kv - q, kv) for q, kv in zip(query_lens, kv_lens, strict=True)]
    positions = torch.cat(ends)
    slots = torch.cat([part + PAGE * i for i, part in enumerate(ends)])
    batch = AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32),
        block_table_SP=torch.arange(len(kv_lens), dtype=torch.int32)[:, None],
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    return Step(positions, slots, batch)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("qkv", [(4,), (16,), (4, 16, 8), (8, 4, 8)], ids=str)
@pytest.mark.parametrize("steps", [[((1, 1, 1), (3, 16, 1))] * 2, [((4,), (9,)), ((1,), (10,))], [((1, 3), (5, 8))]])
def test_it_means_the_same(
    native: Native, steps: list[tuple[tuple[int, ...], tuple[int, ...]]], qkv: tuple[int, ...], stored: torch.dtype
) -> None:
    """Steps of single tokens, of prompts, and of both, one after the other through one cache."""
    ops, parts = NativeCpuOps(CPU, native), make_parts(native, qkv=qkv)
    composed = compose(ops, parts)
    fused = select_fuse(ops, SoloComm(), dtype=torch.bfloat16)(composed, parts)
    assert isinstance(fused, NativeBlock)
    keys = torch.randn(2, 3, KV_HEADS, PAGE, DIM).bfloat16()
    caches = [KVLayer(*keys.clone()) for _ in range(2)]
    if largest_code(stored):
        codes, scales = encode(keys, stored)
        caches = [KVLayer(*codes.clone(), *scales.clone()) for _ in range(2)]
    for lens in steps:
        step = make_step(*lens)
        delta, residual = torch.randn(len(step.slots_T), HIDDEN).bfloat16(), torch.randn(len(step.slots_T), HIDDEN)
        residuals = [residual.clone(), residual.clone()]
        pairs = zip((composed, fused), residuals, caches, strict=True)
        expected, found = (block(delta.clone(), own, step, cache) for block, own, cache in pairs)
        assert torch.equal(found, expected)
        assert torch.equal(*residuals)
    first, second = caches
    assert torch.equal(first.k_NKBE.float(), second.k_NKBE.float())
    assert first.k_scale_NKB is None or (first.k_scale_NKB == second.k_scale_NKB).all()


def test_where_it_is_not_chosen(native: Native) -> None:
    ops, parts = NativeCpuOps(CPU, native), make_parts(native)
    block = compose(ops, parts)
    fuse = select_fuse(ops, SoloComm(), dtype=torch.bfloat16)
    biased = parts.weights._replace(out=(parts.weights.out[0], torch.zeros(HIDDEN)))
    assert fuse(block, parts._replace(weights=biased)) is block
    assert fuse(block, parts._replace(norms=(parts.norms[0], None))) is block
    assert fuse(block, make_parts(native, activation=Activation.GELU)) is block
    assert select_fuse(ops, SoloComm(), dtype=torch.float32)(block, parts) is block
    assert select_fuse(ReferenceOps(CPU), SoloComm(), dtype=torch.bfloat16)(block, parts) is block
