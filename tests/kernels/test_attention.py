"""Paged attention: decode and prefill kernels against the reference, and the reference against torch's own."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from shoal.kernels.decode_attention import DecodeWorkspace, decode_attention
from shoal.kernels.ops import AttentionBatch, AttentionSpec, KVLayer
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PLAIN = AttentionSpec(scale=0.125)

# Steps as (new tokens, tokens in all) of each sequence.
Lens = Sequence[tuple[int, int]]
DECODE = [(1, 1), (1, 16), (1, 65), (1, 200)]
PREFILL = [(2, 2), (17, 17), (70, 70)]
CHUNKED = [(5, 100), (40, 131)]
MIXED = [(1, 33), (1, 1), (2, 2), (50, 64), (3, 90)]
LONG = [(1, 1500), (1, 3), (1, 256), (1, 257), (1, 700)]  # several chunks: split among programs


def make_batch(lens: Lens, page: int, device: torch.device) -> AttentionBatch:
    """Pages in a random order; page 0 belongs to nobody, and stands where a row of the block table ends."""
    counts = [-(-kv // page) for _, kv in lens]
    pages = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    query_lens, kv_lens = tuple(q for q, _ in lens), tuple(kv for _, kv in lens)
    return AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_table_SP=table.to(device),
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )


def make_cache(batch: AttentionBatch, heads: int, page: int, dim: int, dtype: torch.dtype) -> KVLayer:
    """Random where the sequences have tokens, NaN everywhere else (of 8-bit codes the scales)."""
    device = batch.kv_lens_S.device
    pages = int(batch.block_table_SP.max()) + 1
    coded = dtype.itemsize == 1
    k, v = (torch.full((pages, heads, page, dim), torch.nan, device=device) for _ in range(2))
    k, v = (x.nan_to_num(3.0).to(dtype) if coded else x.to(dtype) for x in (k, v))
    scales = [torch.full((pages, heads, page), torch.nan, device=device) for _ in range(2)] if coded else []
    cache = KVLayer(k, v, *scales)
    for row, kv_len in zip(batch.block_table_SP.tolist(), batch.kv_lens, strict=True):
        slots = torch.tensor([row[at // page] * page + at % page for at in range(kv_len)], device=device)
        new = torch.randn(2, kv_len, heads, dim, device=device)
        ReferenceOps(device).write_kv(*new, cache, slots.long())
    return cache


def check(
    ops: TritonOps,
    lens: Lens,
    shape: tuple[int, int, int, int],
    spec: AttentionSpec = PLAIN,
    dtype: torch.dtype = torch.float32,
    *,
    stored: torch.dtype | None = None,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """One step on both implementations; shape is (query heads, KV heads, head dim, page size)."""
    heads, kv_heads, dim, page = shape
    batch = make_batch(lens, page, ops.device)
    cache = make_cache(batch, kv_heads, page, dim, stored or dtype)
    tokens = sum(batch.query_lens)
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device=ops.device).to(dtype)
    q = fused[:, :heads]  # a strided view, as the model passes it
    actual = ops.attention(q, cache, batch, spec, sinks_H=sinks_H)
    expected = ReferenceOps(ops.device).attention(q, cache, batch, spec, sinks_H=sinks_H)
    assert actual.shape == q.shape
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lens", [DECODE, PREFILL, CHUNKED, MIXED], ids=["decode", "prefill", "chunked", "mixed"])
@pytest.mark.parametrize(
    "shape",
    [(4, 4, 64, 16), (9, 3, 64, 64), (8, 2, 80, 32), (8, 1, 128, 64), (2, 2, 256, 16), (1, 1, 20, 128)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_shapes(ops: TritonOps, lens: Lens, shape: tuple[int, int, int, int]) -> None:
    check(ops, lens, shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 2, 64, 16), (4, 1, 128, 64), (2, 1, 256, 32), (3, 1, 80, 16)])
def test_small_dtypes(ops: TritonOps, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check(ops, [*LONG[:2], *MIXED], shape, dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 1, 64, 16), (4, 4, 128, 64), (2, 1, 256, 32)])
@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_are_split(ops: TritonOps, shape: tuple[int, int, int, int], window: int | None) -> None:
    check(ops, LONG, shape, AttentionSpec(0.1, window=window, softcap=30.0))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (6, 2, 64, 16)), (torch.float16, (4, 1, 128, 64)), (torch.bfloat16, (3, 3, 80, 128))],
)
def test_8_bit_caches(
    ops: TritonOps, stored: torch.dtype, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    check(ops, [*LONG[:2], *MIXED], shape, dtype=dtype, stored=stored)
    check(ops, MIXED, shape, AttentionSpec(0.2, window=40, softcap=9.0), dtype, stored=stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_values_in_an_8_bit_cache(ops: TritonOps, dtype: torch.dtype) -> None:
    """Weights times scales reach far below what float16 can tell apart."""
    batch = make_batch([(1, 300), (40, 200)], 64, ops.device)
    cache = make_cache(batch, 2, 64, 64, torch.int8)
    assert cache.v_scale_NKB is not None
    cache.v_scale_NKB.mul_(1e-3)
    q = torch.randn(41, 4, 64, device=ops.device).to(dtype) * 3
    actual, expected = (o.attention(q, cache, batch, PLAIN) for o in (ops, ReferenceOps(ops.device)))
    torch.testing.assert_close(actual.float() * 1e3, expected.float() * 1e3, rtol=2e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("spec", [PLAIN, AttentionSpec(0.2, window=90, softcap=4.0)])
@pytest.mark.parametrize("lens", [LONG[3:], [(1, 33), (1, 0), (1, 1), (2, 2), (33, 40)]])
def test_sinks(ops: TritonOps, lens: Lens, spec: AttentionSpec) -> None:
    sinks_H = torch.tensor([-100.0, 0.0, 2.0, 5.0, 200.0, 1.0], device=ops.device)
    check(ops, lens, (6, 2, 64, 16), spec, sinks_H=sinks_H)


def test_a_head_of_very_many_tiles(ops: TritonOps) -> None:
    """One head of one sequence, and more programs than may share it."""
    batch = make_batch([(1, 17_000)], 64, ops.device)
    cache, q = make_cache(batch, 1, 64, 16, torch.float16), torch.randn(1, 2, 16, device=ops.device).half()
    out, workspace = torch.empty_like(q), DecodeWorkspace(ops.device, 100)
    decode_attention(q, cache, batch, PLAIN, sinks_H=None, out_THE=out, workspace=workspace)
    torch.testing.assert_close(out, ReferenceOps(ops.device).attention(q, cache, batch, PLAIN), rtol=2e-3, atol=2e-3)


def test_a_decode_step_can_be_repeated(ops: TritonOps) -> None:
    """A launch leaves its workspace as it found it: captured graphs run again and again, layer after layer."""
    batch = make_batch([(1, 600), (1, 300)], 64, ops.device)
    cache, q = make_cache(batch, 1, 64, 64, torch.float32), torch.randn(2, 4, 64, device=ops.device)
    first = ops.attention(q, cache, batch, PLAIN)
    for spec in (AttentionSpec(0.1, window=700), PLAIN):
        again = ops.attention(q, cache, batch, spec)
    assert torch.equal(first, again)


@pytest.mark.parametrize("window", [1, 16, 33, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window_and_softcap(ops: TritonOps, window: int, softcap: float | None) -> None:
    spec = AttentionSpec(0.3, window=window, softcap=softcap)
    check(ops, [(1, 150), (1, 2), (80, 80), (10, 190)], (4, 2, 64, 32), spec)


@pytest.mark.parametrize("window", [40, 200])
def test_a_tall_tile_over_a_long_prefix_with_a_window(ops: TritonOps, window: int) -> None:
    check(ops, [(130, 400)], (2, 2, 64, 64), AttentionSpec(0.2, window=window))
    check(ops, [(130, 400)], (2, 2, 64, 64), AttentionSpec(0.2, window=window), torch.float16)


@pytest.mark.parametrize("lens", [[(1, 1)], [(2, 2)], [(1, 17)], [(64, 64)], [(3, 300)]])
def test_one_sequence(ops: TritonOps, lens: Lens) -> None:
    check(ops, lens, (3, 1, 64, 16))


def test_many_short_prefills_share_no_tile(ops: TritonOps) -> None:
    check(ops, [(q, q + 3 * q) for q in (2, 3, 31, 32, 33, 2, 5, 43, 42, 44, 2)], (3, 3, 64, 16))


def test_a_large_group(ops: TritonOps) -> None:
    check(ops, MIXED, (71, 1, 64, 16))


def test_no_sequences(ops: TritonOps) -> None:
    nothing = torch.zeros(0, dtype=torch.int32, device=ops.device)
    table = torch.zeros(0, 4, dtype=torch.int32, device=ops.device)
    batch = AttentionBatch(torch.zeros_like(nothing).new_zeros(1), nothing, table, 0, 0, 0, (), ())
    cache = KVLayer(*(torch.zeros(2, 1, 16, 64, device=ops.device) for _ in range(2)))
    assert ops.attention(torch.empty(0, 2, 64, device=ops.device), cache, batch, PLAIN).shape == (0, 2, 64)


@pytest.mark.parametrize("longest", [20, 900])
def test_padding_rows_of_a_captured_graph_give_zeros(ops: TritonOps, longest: int) -> None:
    check(ops, [(1, longest), (1, 0), (1, 20), (1, 0)], (4, 2, 64, 16))


def test_a_captured_grid_serves_other_lengths(ops: TritonOps) -> None:
    """The host's numbers are those of capture; only what lies on the device says what is to be computed."""
    shape, lens = (4, 2, 64, 16), [(1, 30), (1, 600), (1, 257)]
    batch = make_batch(lens, 16, ops.device)
    cache, q = make_cache(batch, 2, 16, 64, torch.float32), torch.randn(3, 4, 64, device=ops.device)
    expected = ReferenceOps(ops.device).attention(q, cache, batch, PLAIN)
    for captured in ((5, 5, 5), (4000, 4000, 4000)):
        stale = AttentionBatch(
            batch.query_start_S1, batch.kv_lens_S, batch.block_table_SP, 3, 1, max(captured), (1, 1, 1), captured
        )
        torch.testing.assert_close(ops.attention(q, cache, stale, PLAIN), expected, rtol=5e-6, atol=5e-6)
    assert shape[0] == q.shape[1]


def rows_alone_and_together(ops: TritonOps, lens: Lens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batch = make_batch(lens, 16, ops.device)
    cache = make_cache(batch, 2, 16, 64, torch.float32)
    q = torch.randn(sum(batch.query_lens), 4, 64, device=ops.device)
    together = ops.attention(q, cache, batch, PLAIN).split(batch.query_lens)
    pairs = []
    for at, (query_len, kv_len) in enumerate(lens):
        start = torch.tensor([0, query_len], dtype=torch.int32, device=ops.device)
        one = AttentionBatch(
            start,
            batch.kv_lens_S[at : at + 1],
            batch.block_table_SP[at : at + 1],
            int(query_len == 1),
            query_len,
            kv_len,
            (query_len,),
            (kv_len,),
        )
        pairs.append((ops.attention(q.split(batch.query_lens)[at], cache, one, PLAIN), together[at]))
    return pairs


def test_prefill_rows_do_not_depend_on_the_batch(ops: TritonOps) -> None:
    for alone, together in rows_alone_and_together(ops, [(2, 40), (33, 33), (50, 300)]):
        assert torch.equal(alone, together)


def test_deterministic_rows_do_not_depend_on_the_batch(ops: TritonOps) -> None:
    fixed = TritonOps(ops.device, deterministic=True)
    for alone, together in rows_alone_and_together(fixed, [*LONG[:3], (33, 50)]):
        assert torch.equal(alone, together)


def test_deterministic_decode_equals_prefill(ops: TritonOps) -> None:
    """A log continued by another replica is prefilled up to where it was decoded."""
    fixed, length, chunk = TritonOps(ops.device, deterministic=True), 90, 45
    batch = make_batch([(chunk, length)], 16, ops.device)
    cache = make_cache(batch, 2, 16, 64, torch.float32)
    q = torch.randn(chunk, 6, 64, device=ops.device)
    prefilled = fixed.attention(q, cache, batch, AttentionSpec(0.1, window=70))
    for at in (0, 1, 18, 19, 37, 44):
        kv_len = length - chunk + at + 1
        one = AttentionBatch(
            torch.tensor([0, 1], dtype=torch.int32, device=ops.device),
            torch.tensor([kv_len], dtype=torch.int32, device=ops.device),
            batch.block_table_SP,
            1,
            1,
            kv_len,
            (1,),
            (kv_len,),
        )
        decoded = fixed.attention(q[at : at + 1], cache, one, AttentionSpec(0.1, window=70))
        assert torch.equal(decoded[0], prefilled[at])


def test_reference_is_textbook_attention(on_cpu: ReferenceOps) -> None:
    batch = make_batch([(1, 20), (7, 30)], 16, on_cpu.device)
    cache = make_cache(batch, 2, 16, 64, torch.float32)
    q = torch.randn(8, 6, 64)
    actual = on_cpu.attention(q, cache, batch, AttentionSpec(0.2, window=9)).split([1, 7])
    for sequence, (query_len, kv_len) in enumerate([(1, 20), (7, 30)]):
        row = batch.block_table_SP[sequence].tolist()
        keys, values = (
            torch.stack([paged[row[i // 16], :, i % 16] for i in range(kv_len)], dim=1).repeat_interleave(3, dim=0)
            for paged in cache
        )
        positions = range(kv_len - query_len, kv_len)
        visible = torch.tensor([[i - 9 < j <= i for j in range(kv_len)] for i in positions])
        queries = q.split([1, 7])[sequence].transpose(0, 1)
        expected = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=0.2)
        torch.testing.assert_close(actual[sequence], expected.transpose(0, 1))


def test_reference_softcap_bends_the_logits(on_cpu: ReferenceOps) -> None:
    batch = make_batch([(1, 3)], 16, on_cpu.device)
    cache, q = make_cache(batch, 1, 16, 8, torch.float32), torch.randn(1, 1, 8) * 5
    page = int(batch.block_table_SP[0, 0])
    logits = 2.0 * torch.tanh(cache.k_NKBE[page, 0, :3] @ q[0, 0] * 0.7 / 2.0)
    expected = logits.softmax(0) @ cache.v_NKBE[page, 0, :3]
    actual = on_cpu.attention(q, cache, batch, AttentionSpec(0.7, softcap=2.0))
    torch.testing.assert_close(actual[0, 0], expected)


def test_reference_sinks_take_their_share(on_cpu: ReferenceOps) -> None:
    batch = make_batch([(1, 3)], 16, on_cpu.device)
    cache, q = make_cache(batch, 1, 16, 8, torch.float32), torch.randn(1, 2, 8)
    page, sinks = int(batch.block_table_SP[0, 0]), torch.tensor([0.3, -1.0])
    weights = (cache.k_NKBE[page, 0, :3] @ q[0].T * 0.7).exp()  # [3, heads]
    expected = (weights / (weights.sum(0) + sinks.exp())).T @ cache.v_NKBE[page, 0, :3]
    actual = on_cpu.attention(q, cache, batch, AttentionSpec(0.7, softcap=None), sinks_H=sinks)
    torch.testing.assert_close(actual[0], expected)
