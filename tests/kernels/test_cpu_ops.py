"""`CpuOps` against `ReferenceOps` over a grid of shapes."""

from collections.abc import Sequence

import pytest
import torch

from shoal.kernels.cpu import CpuOps
from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.deterministic import DeterministicCpuOps
from shoal.kernels.native import load_native
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, KVLayer, SamplingBatch
from shoal.kernels.reference import ReferenceOps

DTYPES = [torch.float32, torch.bfloat16]
# bfloat16 keeps 8 bits: one rounding more than the reference's single one, on numbers around 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ops() -> CpuOps:
    return CpuOps(CPU)


@pytest.fixture
def reference() -> ReferenceOps:
    return ReferenceOps(CPU)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (7, 3, 64), (0, 64)])
def test_norms(ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape).to(dtype) * 3, torch.rand(shape[-1]), torch.randn(shape[-1])
    before = x.clone()
    close(ops.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))
    close(ops.layer_norm(x, weight, bias, eps=1e-5), reference.layer_norm(x, weight, bias, eps=1e-5))
    close(ops.layer_norm(x, weight, None, eps=1e-5), reference.layer_norm(x, weight, None, eps=1e-5))
    assert torch.equal(x, before)
    for name in ("add_rms_norm", "add_layer_norm"):
        args = (weight,) if name == "add_rms_norm" else (weight, bias)
        residuals = [torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)]
        results = [getattr(o, name)(x, r, *args, eps=1e-6) for o, r in zip((ops, reference), residuals, strict=True)]
        close(results[0], results[1])
        assert torch.equal(residuals[0], residuals[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (32, 16)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(ops: CpuOps, reference: ReferenceOps, *, dtype: torch.dtype, fused: bool, dim: int, rotated: int,
              interleaved: bool) -> None:  # fmt: skip
    table = torch.randn(50, rotated)
    for positions in (torch.tensor([3]), torch.randint(0, 50, (6,)), torch.zeros(0, dtype=torch.int64)):
        heads = torch.randn(len(positions), 9 + 3 + 3, dim).to(dtype)
        expected = heads.clone()
        parts = heads.split((9, 3, 3), 1) if fused else tuple(p.clone() for p in heads.split((9, 3, 3), 1))
        ops.rope(parts[0], parts[1], positions, table, interleaved=interleaved)
        q, k, _ = expected.split((9, 3, 3), 1)
        reference.rope(q, k, positions, table, interleaved=interleaved)
        close(torch.cat(parts, 1), expected)


def test_rope_sees_positions_that_change_in_place(ops: CpuOps, reference: ReferenceOps) -> None:
    table, positions = torch.randn(50, 8), torch.tensor([1, 2])
    for _ in range(2):
        q, k = torch.randn(2, 2, 8), torch.randn(2, 1, 8)
        q_ref, k_ref = q.clone(), k.clone()
        ops.rope(q, k, positions, table, interleaved=False)
        reference.rope(q_ref, k_ref, positions, table, interleaved=False)
        close(q, q_ref)
        positions += 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, activation: Activation) -> None:
    x = torch.randn(5, 2 * 48).to(dtype)
    before = x.clone()
    close(ops.gated_activation(x, activation), reference.gated_activation(x, activation))
    close(ops.activation(x, activation), reference.activation(x, activation))
    assert torch.equal(x, before)


def make_batch(lens: Sequence[tuple[int, int]], page: int) -> AttentionBatch:
    """(new tokens, tokens in all) of each sequence; pages in random order, rows padded with page 0."""
    counts = [-(-kv // page) for _, kv in lens]
    pages = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    queries, kvs = tuple(q for q, _ in lens), tuple(kv for _, kv in lens)
    return AttentionBatch(
        query_start_S1=torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        kv_lens_S=torch.tensor(kvs, dtype=torch.int32),
        block_table_SP=table,
        num_decodes=sum(q == 1 for q in queries),
        max_query_len=max(queries),
        max_kv_len=max(kvs),
        query_lens=queries,
        kv_lens=kvs,
    )


def make_cache(batch: AttentionBatch, page: int, dtype: torch.dtype, *, heads: int = 3, dim: int = 32) -> KVLayer:
    """Random where sequences have tokens; NaN, a dead owner's, everywhere else."""
    num_pages = int(batch.block_table_SP.max()) + 1
    cache = KVLayer(*(torch.full((num_pages, heads, page, dim), torch.nan, dtype=dtype) for _ in range(2)))
    for row, kv_len in zip(batch.block_table_SP.tolist(), batch.kv_lens, strict=True):
        for at in range(0, kv_len, page):
            for paged in cache:
                size = min(page, kv_len - at)
                paged[row[at // page], :, :size] = torch.randn(heads, size, dim).to(dtype)
    return cache


STEPS = {
    "one": [(1, 1)],
    "one, many pages": [(1, 150)],
    "one, fused no more": [(1, 1500)],
    "equal": [(1, 64)] * 4,
    "decodes": [(1, 1), (1, 16), (1, 65), (1, 200)],
    "ragged, in groups": [(1, 700), (1, 5), (1, 40), (1, 650), (1, 300), (1, 17)],
    "prefill": [(2, 2), (17, 17), (70, 70)],
    "chunks": [(5, 100), (40, 131)],
    "mixed": [(1, 33), (1, 1), (2, 2), (50, 64), (3, 90)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("heads", [3, 9])
def test_attention(ops: CpuOps, reference: ReferenceOps, *, dtype: torch.dtype, lens: list[tuple[int, int]],
                   window: int | None, heads: int) -> None:  # fmt: skip
    spec = AttentionSpec(scale=0.2, window=window)
    batch = make_batch(lens, 16)
    cache = make_cache(batch, 16, dtype)
    q = torch.randn(sum(batch.query_lens), heads, 32).to(dtype)
    close(ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec))


def test_attention_of_layers_that_differ(ops: CpuOps, reference: ReferenceOps) -> None:
    """One step's plans are shared between layers, and only between those that agree."""
    for lens in (STEPS["mixed"], STEPS["decodes"]):
        batch = make_batch(lens, 16)
        for spec in (AttentionSpec(0.2), AttentionSpec(0.2, window=9), AttentionSpec(0.2, softcap=5.0)) * 2:
            for heads in (1, 3):
                cache = make_cache(batch, 16, torch.float32, heads=heads)
                q = torch.randn(sum(batch.query_lens), 6, 32)
                close(ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[5], [0, 31, 17], [4, -1, 40, -1], [-1], []])
def test_write_kv(ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, slots: list[int]) -> None:
    slots_T = torch.tensor(slots, dtype=torch.int64)
    written = []
    new = torch.randn(len(slots), 9, 8).to(torch.float32)
    for implementation in (ops, reference):
        cache = KVLayer(torch.zeros(4, 3, 16, 8, dtype=dtype), torch.zeros(4, 3, 16, 8, dtype=dtype))
        implementation.write_kv(new[:, 3:6], new[:, 6:], cache, slots_T)
        written.append(torch.stack(tuple(cache)))
    assert torch.equal(written[0], written[1])


# Rows of (temperature, top_k, top_p, min_p).
SAMPLING = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 7, 1.0, 0.0),
    (1.0, 10**9, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.5, 0, 0.1, 0.0), (1.0, 0, 1e-9, 0.0), (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.2), (2.0, 0, 1.0, 1.0), (0.8, 20, 0.8, 0.0), (1.2, 40, 0.95, 0.01), (3.0, 3, 0.5, 0.5),
    (1e-5, 5, 0.5, 0.0), (5.0, 0, 0.999, 0.0), (1.0, 300, 0.9, 0.0), (1.0, 900, 0.99, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("kind", [CpuOps, DeterministicCpuOps, NativeCpuOps])
@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("sinks", [True, False])
def test_what_no_fast_path_knows(
    reference: ReferenceOps, *, kind: type[CpuOps], codes: torch.dtype | None, sinks: bool
) -> None:
    """A cache of codes, and attention sinks."""
    native = load_native()
    if kind is NativeCpuOps and native is None:
        pytest.skip("no compiler here, or another processor")
    ops = NativeCpuOps(CPU, native) if kind is NativeCpuOps and native else kind(CPU)
    batch = make_batch([(1, 40), (1, 3), (5, 20)], 16)
    pages = int(batch.block_table_SP.max()) + 1
    sinks_H = torch.randn(6) if sinks else None
    new, q = torch.randn(pages * 16, 6, 32).bfloat16(), torch.randn(7, 6, 32).bfloat16()
    attended = []
    for implementation in (ops, reference):
        parts = [torch.zeros(pages, 3, 16, 32, dtype=codes or torch.bfloat16) for _ in "kv"]
        scales = [torch.zeros(pages, 3, 16) if codes else None for _ in "kv"]
        cache = KVLayer(*parts, *scales)
        implementation.write_kv(new[:, :3], new[:, 3:], cache, torch.arange(pages * 16))
        attended.append(implementation.attention(q, cache, batch, AttentionSpec(0.2), sinks_H=sinks_H))
    close(*attended)


def make_sampling(rows: Sequence[tuple[float, int, float, float]], seed: int) -> SamplingBatch:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingBatch(
        temperature_R=torch.tensor(temperature, dtype=torch.float32),
        top_k_R=torch.tensor(top_k, dtype=torch.int32),
        top_p_R=torch.tensor(top_p, dtype=torch.float32),
        min_p_R=torch.tensor(min_p, dtype=torch.float32),
        seed_R=torch.arange(len(rows)) * 0x5DEECE66D + seed,
        position_R=torch.arange(len(rows)) + seed,
        all_greedy=not any(temperature),
        max_top_k=max(top_k),
        any_top_p=any(p < 1 for p in top_p),
        any_min_p=any(min_p),
    )


def make_logits(kind: str, rows: int, vocab: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab) * 3
    match kind:
        case "rounded":  # many ties at every border
            return (logits * 2).round() / 2
        case "bfloat16":
            return logits.bfloat16()
        case "masked":
            return logits.masked_fill(torch.rand(rows, vocab) < 0.99, float("-inf"))
        case "peaked":
            logits[:, 7] += 30
    return logits


@pytest.mark.parametrize("kind", ["plain", "rounded", "bfloat16", "masked", "peaked"])
@pytest.mark.parametrize(("vocab", "seeds"), [(50, 5), (4000, 5), (40_000, 1)])
def test_sampling_is_the_reference(ops: CpuOps, reference: ReferenceOps, kind: str, vocab: int, seeds: int) -> None:
    for seed in range(seeds):
        logits = make_logits(kind, len(SAMPLING), vocab)
        sampling = make_sampling(SAMPLING, seed)
        assert torch.equal(ops.sample(logits, sampling), reference.sample(logits, sampling))
        for row, params in enumerate(SAMPLING):  # alone too: other host flags, the same tokens
            alone, one = make_sampling([params], seed), logits[row : row + 1]
            assert torch.equal(ops.sample(one, alone), reference.sample(one, alone))


@pytest.mark.parametrize("spread", [1e-4, 0.3, 3.0, 20.0, 1e6])
@pytest.mark.parametrize("temperature", [0.02, 1.0, 100.0])
def test_no_token_that_could_win_is_passed_over(
    ops: CpuOps, reference: ReferenceOps, spread: float, temperature: float
) -> None:
    """Of a long row most tokens are ruled out by a bound before their noise is known."""
    for seed in range(4):
        logits = torch.randn(16, 9000) * spread
        logits[::2, 1::2] = float("-inf")
        sampling = make_sampling([(temperature, 0, 1.0, 0.0)] * 16, seed)
        assert torch.equal(ops.sample(logits, sampling), reference.sample(logits, sampling))


@pytest.mark.parametrize("row", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1)])
def test_bad_rows_fail_alone(ops: CpuOps, reference: ReferenceOps, row: tuple[float, int, float, float]) -> None:
    logits = torch.randn(4, 3000)
    logits[0, 5] = torch.nan
    logits[1, 5] = float("inf")
    logits[2] = float("-inf")
    sampling = make_sampling([row] * 4, 3)
    tokens = ops.sample(logits, sampling)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert torch.equal(tokens, reference.sample(logits, sampling))
