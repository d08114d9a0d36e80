"""A layer in six launches: that it is so many, and that it means the same as the composed one."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from shoal.kernels.coded_weight import int4_weight, int8_weight
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, HeadNorms, HeadSpec, KVLayer, NormWeight
from shoal.kernels.quant_matmul import weight_only_matmul
from shoal.kernels.quant_tiles import FEW_ROWS
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps
from shoal.parallel.comm import Comm, SoloComm
from shoal.parallel.gpu import CodedLinear
from shoal.parallel.linear import column_linear, row_linear
from shoal.parallel.quant import DenseLinear, StackedLinear
from shoal.runtime.models.decoder import Attention, Block, SequentialBlock, Step
from shoal.runtime.models.few_rows_block import FewRowsBlock, few_rows_fuse
from shoal.runtime.models.fuse import LayerParts, LayerWeights, Weights, select_fuse
from shoal.runtime.models.spec import LayerSpec, MLPSpec

BF16 = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, DIM, MLP, PAGE = 64, 4, 2, 32, 96, 16


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
    """Sequence i has page i."""
    ends = [torch.arange(kv - q, kv) for q, kv in zip(query_lens, kv_lens, strict=True)]
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
    return Step(torch.cat(ends), torch.cat([part + PAGE * i for i, part in enumerate(ends)]), batch)


class OneOfTwo:
    """A shard's `Comm`; the other one has the same sums."""

    size = 2

    def __init__(self, shard: int) -> None:
        self.shard = shard

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])


DECODES, MIXED = ((1, 1, 1), (3, 16, 1)), ((1, 9), (5, 12))
DENSE, CODED = ("dense",) * 4, ("int4", "int8", "int4", "dense")


@pytest.mark.parametrize(
    ("kinds", "comm", "biased"),
    [(DENSE, SoloComm(), False), (DENSE, OneOfTwo(1), True), (CODED, OneOfTwo(0), True)],
    ids=["dense", "dense, second shard", "codes, first shard"],
)
def test_it_means_the_same(ops: TritonOps, kinds: tuple[str, ...], comm: Comm, biased: bool) -> None:
    """Two layers, one after the other, in which what one leaves to be added the next one adds."""
    layers = [make_parts(*kinds, biased=biased, activation=Activation.GELU_TANH) for _ in range(2)]
    composed = [compose(ops, comm, parts) for parts in layers]
    fused = [few_rows_fuse(ops, comm)(block, parts) for block, parts in zip(composed, layers, strict=True)]
    assert all(isinstance(block, FewRowsBlock) for block in fused)
    for lens in (DECODES, MIXED):
        step = make_step(*lens)
        delta, residual = torch.randn(len(step.slots_T), HIDDEN).to(BF16), torch.randn(len(step.slots_T), HIDDEN)
        keys = torch.randn(2, 3, KV_HEADS, PAGE, DIM).to(BF16)
        found: list[tuple[Tensor, ...]] = []
        for blocks in (composed, fused):
            cache, mine, delta_TD = KVLayer(*keys.clone()), residual.clone(), delta.clone()
            for block in blocks:
                delta_TD = block(delta_TD, mine, step, cache)
            found.append((delta_TD, mine, *cache))
        for expected, other in zip(*found, strict=True):
            torch.testing.assert_close(other, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_more_rows_go_the_usual_way(ops: TritonOps) -> None:
    parts = make_parts(*DENSE)
    seen: list[int] = []

    def composed(delta_TD: Tensor, residual_TD: Tensor, step: Step, cache: KVLayer) -> Tensor:
        seen.append(len(delta_TD))
        return delta_TD

    block = few_rows_fuse(ops, SoloComm())(composed, parts)
    for rows in (FEW_ROWS, FEW_ROWS + 1):
        step, cache = make_step((rows,), (rows,)), KVLayer(*torch.zeros(2, 9, KV_HEADS, PAGE, DIM, dtype=BF16))
        step = step._replace(slots_T=torch.arange(rows))
        step.attention.block_table_SP.resize_(1, 2).fill_(0)
        block(torch.zeros(rows, HIDDEN, dtype=BF16), torch.zeros(rows, HIDDEN), step, cache)
    assert seen == [FEW_ROWS + 1]


def test_a_layer_is_six_launches(ops: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.device.type != "cpu":
        pytest.skip("launches are counted by the interpreter")
    from triton.runtime.interpreter import GridExecutor

    seen: list[str] = []
    launch = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        seen.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    parts = make_parts(*CODED)
    block = few_rows_fuse(ops, SoloComm())(compose(ops, SoloComm(), parts), parts)
    cache, step = KVLayer(*torch.zeros(2, 3, KV_HEADS, PAGE, DIM, dtype=BF16)), make_step(*DECODES)
    block(torch.zeros(3, HIDDEN, dtype=BF16), torch.zeros(3, HIDDEN), step, cache)
    product = "_product_kernel"
    assert seen == [product, "_rotate_and_store_kernel", "_decode_kernel", product, product, product]


def test_where_it_is_not_chosen(ops: TritonOps) -> None:
    parts = make_parts(*DENSE)
    block = compose(ops, SoloComm(), parts)
    fuse = few_rows_fuse(ops, SoloComm())
    halves = [DenseLinear(torch.zeros(KV_HEADS * DIM * 2, HIDDEN, dtype=BF16)) for _ in range(2)]
    stacked = parts.weights._replace(qkv=(StackedLinear(halves), None))
    assert fuse(block, parts._replace(weights=stacked)) is block
    assert fuse(block, parts._replace(norms=(parts.norms[0], None))) is block
    ungated = parts.spec.__class__(parts.spec.attention, None, MLPSpec(MLP, Activation.SILU, gated=False))
    assert fuse(block, parts._replace(spec=ungated)) is block
    steady = TritonOps(ops.device, deterministic=True)
    for choose in (select_fuse(steady, SoloComm(), dtype=BF16), select_fuse(ops, SoloComm(), dtype=torch.float16)):
        assert choose(block, parts) is block
