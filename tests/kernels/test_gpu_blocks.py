"""Layers in fewer launches: how many they are, and that they mean the same as the composed ones."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from shoal.kernels.coded_weight import int4_weight, int8_weight
from shoal.kernels.eight_bit_matmul import dynamic_matmul
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, HeadNorms, HeadSpec, KVLayer, NormWeight
from shoal.kernels.quant_matmul import weight_only_matmul
from shoal.kernels.quant_tiles import DECODE_ROWS, FEW_ROWS
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps
from shoal.parallel.comm import Comm, SoloComm
from shoal.parallel.gpu import CodedLinear
from shoal.parallel.linear import column_linear, row_linear
from shoal.parallel.quant import DenseLinear, StackedLinear
from shoal.runtime.models.decoder import Attention, Block, SequentialBlock, Step
from shoal.runtime.models.fuse import LayerParts, LayerWeights, Weights, select_fuse
from shoal.runtime.models.gpu_blocks import ByRows, gpu_fuse
from shoal.runtime.models.spec import LayerSpec, MLPSpec

from ..one_of_two import OneOfTwo

BF16 = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, DIM, MLP = 64, 4, 2, 32, 96
PAGE, PAGES = 16, 5


@pytest.fixture(autouse=True)
def _there(device: torch.device) -> Iterator[None]:
    with device:
        yield


def make_weights(kind: str, rows: int, columns: int, *, biased: bool) -> Weights:
    bias = torch.randn(rows).to(BF16) if biased else None
    size = columns**-0.5
    match kind:
        case "dense":
            return DenseLinear((torch.randn(rows, columns) * size).to(BF16)), bias
        case "int4":
            codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
            weight = int4_weight(codes, torch.rand(rows, columns // 32) * size / 4)
        case _:
            codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
            weight = int8_weight(codes, torch.rand(rows, 1) * size / 64)
            if kind == "w8a8":
                return CodedLinear(weight, dynamic_matmul, rounds_inputs=True), bias
    return CodedLinear(weight, weight_only_matmul), bias


def make_parts(*kinds: str, biased: bool = False, activation: Activation = Activation.SILU) -> LayerParts:
    """kinds: of qkv, out, up, down."""
    shapes = [((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * MLP, HIDDEN), (HIDDEN, MLP)]
    weights = [make_weights(kind, *shape, biased=biased) for kind, shape in zip(kinds, shapes, strict=True)]
    norms = [NormWeight(torch.rand(HIDDEN) + 0.5, 1e-5) for _ in range(2)]
    heads = HeadSpec(HEADS, KV_HEADS, HeadNorms(torch.rand(DIM), torch.rand(DIM), 1e-5))
    spec = LayerSpec(AttentionSpec(0.2), None, MLPSpec(MLP, gated=True, activation=activation, bias=biased))
    return LayerParts((norms[0], norms[1]), LayerWeights(*weights), heads, DIM, spec)


def compose(ops: TritonOps | ReferenceOps, comm: Comm, parts: LayerParts) -> Block:
    norms = [norm for norm in parts.norms if norm is not None]
    enter, enter_mlp = (partial(ops.add_rms_norm, weight_D=norm.weight_D, eps=norm.eps) for norm in norms)
    qkv, out, up, down = parts.weights
    up_layer, down_layer = column_linear(*up), row_linear(*down, comm=comm)
    attention = Attention(
        parts.spec.attention,
        ops=ops,
        heads=parts.heads,
        head_dim=DIM,
        qkv=column_linear(*qkv),
        out=row_linear(*out, comm=comm),
    )
    return SequentialBlock(
        before_attention=enter,
        attention=attention,
        before_mlp=enter_mlp,
        mlp=lambda x: down_layer(ops.gated_activation(up_layer(x), parts.spec.mlp.activation)),
    )


def make_step(query_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> Step:
    """Sequence i has pages PAGES * i and so on."""
    ends = [torch.arange(kv - q, kv) for q, kv in zip(query_lens, kv_lens, strict=True)]
    batch = AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32),
        block_table_SP=torch.arange(PAGES * len(kv_lens), dtype=torch.int32).view(-1, PAGES),
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    return Step(torch.cat(ends), torch.cat([part + PAGES * PAGE * i for i, part in enumerate(ends)]), batch)


Lens = tuple[tuple[int, ...], tuple[int, ...]]


DECODES, MIXED, LONG = ((1, 1, 1), (3, 16, 1)), ((1, 9), (5, 12)), ((1, 70), (20, 70))
DENSE, CODED = ("dense",) * 4, ("int4", "int8", "int4", "dense")
W8A8 = ("w8a8", "dense", "w8a8", "w8a8")


def no_cache(dtype: torch.dtype = BF16) -> KVLayer:
    return KVLayer(*torch.zeros(2, 3 * PAGES, KV_HEADS, PAGE, DIM, dtype=dtype))


@pytest.mark.parametrize(
    ("kinds", "comm", "steps"),
    [
        (DENSE, SoloComm(), [DECODES, MIXED]),
        (DENSE, OneOfTwo(1), [DECODES, MIXED]),
        (CODED, OneOfTwo(0), [MIXED]),
        (W8A8, OneOfTwo(1), [LONG]),
    ],
    ids=["dense", "dense, second shard", "codes, first shard", "w8a8, second shard"],
)
def test_it_means_the_same(ops: TritonOps, kinds: tuple[str, ...], comm: Comm, steps: list[Lens]) -> None:
    """Two layers, one after the other, in which what one leaves to be added the next one adds."""
    layers = [make_parts(*kinds, biased=comm.size > 1, activation=Activation.GELU_TANH) for _ in range(2)]
    composed = [compose(ops, comm, parts) for parts in layers]
    fused = [gpu_fuse(ops, comm, dtype=BF16)(block, parts) for block, parts in zip(composed, layers, strict=True)]
    for lens in steps:
        step = make_step(*lens)
        delta, residual = torch.randn(len(step.slots_T), HIDDEN).to(BF16), torch.randn(len(step.slots_T), HIDDEN)
        keys = torch.randn(2, 3 * PAGES, KV_HEADS, PAGE, DIM).to(BF16)
        found: list[tuple[Tensor, ...]] = []
        for blocks in (composed, fused):
            cache, mine, delta_TD = KVLayer(*keys.clone()), residual.clone(), delta.clone()
            for block in blocks:
                delta_TD = block(delta_TD, mine, step, cache)
            found.append((delta_TD, mine, *cache))
        for expected, other in zip(*found, strict=True):
            torch.testing.assert_close(other, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


PRODUCT, PREPARE, EIGHT_BIT = "_product_kernel", "_rotate_and_store_kernel", "_eight_bit_kernel"
OF_FEW_ROWS = [PRODUCT, PREPARE, "_decode_kernel", PRODUCT, PRODUCT, PRODUCT]
OF_CODED_ROWS = [
    *("_quantise_kernel", EIGHT_BIT, PREPARE, "_prefill_kernel"),  # the output projection is torch's
    *("_quantise_kernel", EIGHT_BIT, "_quantise_kernel", EIGHT_BIT),
]


@pytest.mark.parametrize(
    ("kinds", "lens", "expected"), [(CODED, DECODES, OF_FEW_ROWS), (W8A8, ((70,), (70,)), OF_CODED_ROWS)]
)
def test_launches_of_a_layer(
    ops: TritonOps, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], lens: Lens, expected: list[str]
) -> None:
    if ops.device.type != "cpu":
        pytest.skip("launches are counted by the interpreter")
    from triton.runtime.interpreter import GridExecutor

    seen: list[str] = []
    launch = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        seen.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    parts, step = make_parts(*kinds), make_step(*lens)
    block = gpu_fuse(ops, SoloComm(), dtype=BF16)(compose(ops, SoloComm(), parts), parts)
    rows = len(step.slots_T)
    block(torch.zeros(rows, HIDDEN, dtype=BF16), torch.zeros(rows, HIDDEN), step, no_cache())
    assert seen == expected


def test_steps_go_by_their_rows(ops: TritonOps) -> None:
    fuse, composed = gpu_fuse(ops, SoloComm(), dtype=BF16), compose(ops, SoloComm(), make_parts(*DENSE))
    few = fuse(composed, make_parts(*DENSE))
    assert isinstance(few, ByRows)
    assert (few.most, few.many) == (FEW_ROWS, composed)
    both = fuse(composed, make_parts(*W8A8))
    assert isinstance(both, ByRows)
    assert isinstance(both.many, ByRows)
    assert (both.many.most, both.many.few) == (DECODE_ROWS, composed)
    # Float16 may not hold the stream before it is normalised.
    in_half = gpu_fuse(ops, SoloComm(), dtype=torch.float16)
    assert in_half(composed, make_parts(*DENSE)) is composed
    coded = in_half(composed, make_parts(*W8A8))
    assert isinstance(coded, ByRows)
    assert coded.most == DECODE_ROWS


def test_where_it_is_not_chosen(ops: TritonOps) -> None:
    parts = make_parts(*DENSE)
    block = compose(ops, SoloComm(), parts)
    fuse = gpu_fuse(ops, SoloComm(), dtype=BF16)
    halves = [DenseLinear(torch.zeros(KV_HEADS * DIM * 2, HIDDEN, dtype=BF16)) for _ in range(2)]
    stacked = parts.weights._replace(qkv=(StackedLinear(halves), None))
    assert fuse(block, parts._replace(weights=stacked)) is block
    assert fuse(block, parts._replace(norms=(parts.norms[0], None))) is block
    ungated = parts.spec.__class__(parts.spec.attention, None, MLPSpec(MLP, Activation.SILU, gated=False))
    assert fuse(block, parts._replace(spec=ungated)) is block
    steady = TritonOps(ops.device, deterministic=True)
    for choose in (select_fuse(steady, SoloComm(), dtype=BF16), select_fuse(ops, SoloComm(), dtype=torch.float32)):
        assert choose(block, parts) is block
