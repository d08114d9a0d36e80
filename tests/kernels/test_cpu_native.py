"""The C++ kernels against `ReferenceOps`, and how they come to be there. Skipped where they cannot be built."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shoal.kernels import native_build
from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.kv_codes import encode
from shoal.kernels.native import TILE_ROWS, Native, load_native, pack_b16, pack_q4, pack_q8, q8_rows, reads_cache
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, KVLayer
from shoal.kernels.reference import ReferenceOps

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding apart, or what float32 sums in another order are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native() -> Native:
    found = load_native()
    if found is None:
        pytest.skip("no compiler here, or another processor")
    return found


@pytest.fixture
def ops(native: Native) -> NativeCpuOps:
    return NativeCpuOps(CPU, native)


@pytest.fixture
def reference() -> ReferenceOps:
    return ReferenceOps(CPU)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# Attention


def make_batch(lens: Sequence[tuple[int, int]], page: int) -> AttentionBatch:
    """(new tokens, tokens in all) of each sequence; pages in random order, none of them number 0."""
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


def make_cache(batch: AttentionBatch, page: int, *, heads: int, dim: int, dtype: torch.dtype) -> KVLayer:
    """Random where sequences have tokens; NaN, a dead owner's, everywhere else."""
    num_pages = int(batch.block_table_SP.max()) + 1
    cache = KVLayer(*(torch.full((num_pages, heads, page, dim), torch.nan, dtype=dtype) for _ in range(2)))
    for row, kv_len in zip(batch.block_table_SP.tolist(), batch.kv_lens, strict=True):
        for at in range(0, kv_len, page):
            for paged in cache:
                size = min(page, kv_len - at)
                paged[row[at // page], :, :size] = torch.randn(heads, size, dim).to(dtype)
    return cache


def make_query(batch: AttentionBatch, *, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The queries of a fused QKV output: tokens are not neighbours."""
    return torch.randn(sum(batch.query_lens), heads + 2 * kv_heads, dim).to(dtype)[:, :heads]


SPECS = {
    "plain": AttentionSpec(0.2),
    "sees itself": AttentionSpec(0.2, window=1),
    "window": AttentionSpec(0.2, window=70),
    "window of two parts": AttentionSpec(0.2, window=600),
    "softcap": AttentionSpec(0.5, softcap=3.0),
    "both": AttentionSpec(0.5, window=70, softcap=3.0),
}
# 512 keys are one part: at a border, beside it, three parts.
LENS = [1, 2, 15, 33, 512, 513, 1300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(9, 3, 64, 32), (4, 4, 80, 16), (8, 1, 128, 256), (4, 1, 256, 64), (9, 1, 16, 16), (14, 2, 64, 128)],
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_decode(
    ops: NativeCpuOps, reference: ReferenceOps, *, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int,
    spec: AttentionSpec,
) -> None:  # fmt: skip
    batch = make_batch([(1, length) for length in LENS], page)
    cache = make_cache(batch, page, heads=kv_heads, dim=dim, dtype=dtype)
    q = make_query(batch, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    close(ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec))


CODES = [torch.int8, torch.float8_e4m3fn]


def as_codes(cache: KVLayer, dtype: torch.dtype) -> KVLayer:
    (k, k_scale), (v, v_scale) = (encode(part, dtype) for part in cache)
    return KVLayer(k, v, k_scale, v_scale)


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [(9, 3, 64, 32), (4, 4, 80, 16), (8, 1, 128, 256)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize(
    "lens", [[(1, length) for length in LENS], [(1, 600), (9, 9), (70, 300)]], ids=["decode", "all"]
)
def test_codes_of_eight_bits(
    ops: NativeCpuOps, reference: ReferenceOps, *, stored: torch.dtype, heads: int, kv_heads: int, dim: int, page: int,
    spec: AttentionSpec, lens: list[tuple[int, int]],
) -> None:  # fmt: skip
    batch, dtype = make_batch(lens, page), torch.bfloat16
    cache = as_codes(make_cache(batch, page, heads=kv_heads, dim=dim, dtype=dtype), stored)
    assert reads_cache(cache, dtype)
    q = make_query(batch, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    close(ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec))


@pytest.mark.parametrize("stored", CODES)
def test_codes_are_written_as_the_reference_writes_them(
    ops: NativeCpuOps, reference: ReferenceOps, stored: torch.dtype
) -> None:
    tokens, heads, dim = 300, 5, 48
    size = torch.logspace(-38, 38, tokens)[:, None, None]
    qkv = (torch.randn(tokens, 3 * heads, dim) * size).bfloat16()
    qkv[::7] = (torch.randn(qkv[::7].shape) ** 5).bfloat16()  # small beside the largest: codes that are subnormal
    qkv[3], qkv[4, :, 5], qkv[5, :, 6], qkv[6, :, 7] = 0, torch.nan, torch.inf, -torch.inf
    caches = [as_codes(KVLayer(*torch.zeros(2, 20, heads, 16, dim)), stored) for _ in range(2)]
    slots = torch.randperm(20 * 16)[:tokens]
    slots[8] = -1
    for some, cache in zip((ops, reference), caches, strict=True):
        some.write_kv(qkv[:, heads : 2 * heads], qkv[:, 2 * heads :], cache, slots)
    ours, theirs = caches
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    for found, expected in ((ours.k_scale_NKB, theirs.k_scale_NKB), (ours.v_scale_NKB, theirs.v_scale_NKB)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", range(1, 10))
def test_every_size_of_group(ops: NativeCpuOps, reference: ReferenceOps, group: int) -> None:
    batch = make_batch([(1, 40), (1, 9)], 16)
    cache = make_cache(batch, 16, heads=2, dim=32, dtype=torch.float32)
    q = make_query(batch, heads=2 * group, kv_heads=2, dim=32, dtype=torch.float32)
    close(ops.attention(q, cache, batch, SPECS["plain"]), reference.attention(q, cache, batch, SPECS["plain"]))


def test_a_sequence_is_computed_alike_in_any_company(ops: NativeCpuOps, two_threads: None) -> None:
    batch = make_batch([(1, length) for length in LENS], 16)
    cache = make_cache(batch, 16, heads=3, dim=64, dtype=torch.bfloat16)
    q = make_query(batch, heads=9, kv_heads=3, dim=64, dtype=torch.bfloat16)
    together = ops.attention(q, cache, batch, SPECS["plain"])
    torch.set_num_threads(1)
    for row, length in enumerate(LENS):
        alone = make_batch([(1, length)], 16)
        alone.block_table_SP.copy_(batch.block_table_SP[row : row + 1, : alone.block_table_SP.shape[1]])
        assert torch.equal(ops.attention(q[row : row + 1], cache, alone, SPECS["plain"]), together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dim", [64, 32, 24])  # of 24 there are no kernels
@pytest.mark.parametrize("lens", [[(1, 33), (1, 1), (2, 2), (50, 64), (3, 90)], [(5, 100)], [(200, 700), (129, 129)]])
def test_steps_with_prompts(
    ops: NativeCpuOps, reference: ReferenceOps, *, lens: list[tuple[int, int]], dim: int, dtype: torch.dtype,
    spec: AttentionSpec,
) -> None:  # fmt: skip
    batch = make_batch(lens, 16)
    cache = make_cache(batch, 16, heads=3, dim=dim, dtype=dtype)
    q = make_query(batch, heads=6, kv_heads=3, dim=dim, dtype=dtype)
    found, expected = ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2  # weights are rounded to bfloat16, too
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_prompt_is_computed_alike_however_it_is_cut(
    ops: NativeCpuOps, spec: AttentionSpec, two_threads: None
) -> None:
    whole = make_batch([(300, 300)], 16)
    cache = make_cache(whole, 16, heads=1, dim=64, dtype=torch.bfloat16)
    q = make_query(whole, heads=3, kv_heads=1, dim=64, dtype=torch.bfloat16)
    expected = ops.attention(q, cache, whole, spec)
    torch.set_num_threads(1)
    start = 0
    for count in (2, 9, 64, 128, 90, 7):
        part = make_batch([(count, start + count)], 16)
        part.block_table_SP.copy_(whole.block_table_SP[:, : part.block_table_SP.shape[1]])
        end = start + count
        assert torch.equal(ops.attention(q[start:end], cache, part, spec), expected[start:end])
        start = end


def test_layers_that_differ_in_one_step(ops: NativeCpuOps, reference: ReferenceOps) -> None:
    batch = make_batch([(1, 40), (1, 100)], 16)
    for spec in (*SPECS.values(), *SPECS.values()):
        for kv_heads, dim in ((1, 32), (3, 32), (3, 64)):
            cache = make_cache(batch, 16, heads=kv_heads, dim=dim, dtype=torch.float32)
            q = make_query(batch, heads=6, kv_heads=kv_heads, dim=dim, dtype=torch.float32)
            close(ops.attention(q, cache, batch, spec), reference.attention(q, cache, batch, spec))


def test_a_bad_sequence_stays_alone(ops: NativeCpuOps, reference: ReferenceOps) -> None:
    batch = make_batch([(1, 40), (1, 600), (1, 20)], 16)
    cache = make_cache(batch, 16, heads=1, dim=32, dtype=torch.float32)
    q = make_query(batch, heads=3, kv_heads=1, dim=32, dtype=torch.float32)
    q[1] = torch.nan
    found, expected = (o.attention(q, cache, batch, SPECS["plain"]) for o in (ops, reference))
    assert bool(found[1].isnan().all())
    close(found[::2], expected[::2])


# Between the products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (5, 64), (0, 64), (300, 576), (4, 40)])
def test_norms(ops: NativeCpuOps, reference: ReferenceOps, *, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = (torch.randn(rows, 2 * size) * 3).to(dtype)[:, size:], torch.rand(size)
    close(ops.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))
    residuals = [torch.ones(rows, size), torch.ones(rows, size)]
    found, expected = (o.add_rms_norm(x, r, weight, eps=1e-6) for o, r in zip((ops, reference), residuals, strict=True))
    close(found, expected)
    assert torch.equal(*residuals)
    heads = (torch.randn(rows, 5, size) * 3).to(dtype)[:, 1:4]
    close(ops.rms_norm(heads, weight, eps=1e-5), reference.rms_norm(heads, weight, eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 32), (128, 96), (80, 80)])
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_rope(
    ops: NativeCpuOps, reference: ReferenceOps, *, dtype: torch.dtype, dim: int, rotated: int, tokens: int
) -> None:
    table, positions = torch.randn(50, rotated), torch.randint(0, 50, (tokens,))
    heads = torch.randn(tokens, 9 + 3 + 3, dim).to(dtype)
    expected = heads.clone()
    for implementation, rows in ((ops, heads), (reference, expected)):
        q, k, _ = rows.split((9, 3, 3), 1)
        implementation.rope(q, k, positions, table, interleaved=False)
    close(heads, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("rows", "columns"), [(1, 48), (70, 1536), (3, 20), (0, 16)])
def test_gated_activations(
    ops: NativeCpuOps, reference: ReferenceOps, *, dtype: torch.dtype, activation: Activation, rows: int, columns: int
) -> None:
    x = (torch.randn(rows, 2 * columns) * 4).to(dtype)
    if rows:
        x[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 0.0])
    found, expected = (o.gated_activation(x, activation) for o in (ops, reference))
    # What torch computes, and not we, is rounded between the two steps, too.
    tolerance = (1 if activation is Activation.SILU and columns % 16 == 0 else 3) * max(TOLERANCE[dtype], 1e-5)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[5], [0, 31, 17], [4, -1, 40, -1], [-1], []])
def test_write_kv(ops: NativeCpuOps, reference: ReferenceOps, dtype: torch.dtype, slots: list[int]) -> None:
    slots_T = torch.tensor(slots, dtype=torch.int64)
    for stored in (dtype, torch.float32):  # in the cache's own dtype, and in another
        new = torch.randn(len(slots), 9, 8).to(stored)
        caches = [KVLayer(torch.zeros(4, 3, 16, 8, dtype=dtype), torch.zeros(4, 3, 16, 8, dtype=dtype)) for _ in "ab"]
        for implementation, cache in zip((ops, reference), caches, strict=True):
            implementation.write_kv(new[:, 3:6], new[:, 6:], cache, slots_T)
        assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))


# The products with packed weights


class Packed(NamedTuple):
    """A weight, and what it stands for."""

    product: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    data: torch.Tensor
    dense: torch.Tensor  # float32

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.data, len(self.dense))


def make_weight(native: Native, kind: str, rows: int, columns: int) -> Packed:
    """kind: q4, b16, or q8 and the columns of a group (0: the whole row), q8m where they have minima, too."""
    padded = -(-rows // TILE_ROWS) * TILE_ROWS
    if kind == "q4":
        nibbles = torch.randint(0, 16, (padded, columns))
        scale, minimum = (torch.randn(padded, columns // 32).half().float() for _ in range(2))
        dense = nibbles.view(padded, -1, 32) * scale[..., None] + minimum[..., None]
        return Packed(native.q4_product, pack_q4(nibbles, scale, minimum), dense.flatten(1)[:rows])
    if kind == "b16":
        numbers = torch.randn(padded, columns).bfloat16()
        return Packed(native.b16_product, pack_b16(numbers), numbers.float()[:rows])
    form, _, size = kind.partition("/")
    group = int(size) or columns
    codes, scale = torch.randint(-128, 128, (padded, columns)), torch.randn(padded, columns // group)
    minimum = None
    if form == "q8m":  # of so few digits that a sum is rounded once, whoever takes it
        scale, minimum = scale.half().float(), torch.randn(scale.shape).half().float() * 100
    dense = codes.view(padded, -1, group) * scale[..., None] + (0 if minimum is None else minimum[..., None])
    return Packed(native.q8_product, pack_q8(codes, scale, minimum), dense.flatten(1)[:rows])


LOGIT_KINDS = ["q8/32", "q8/96", "q8/0", "q8/16"]
KINDS = ["q4", "b16", *LOGIT_KINDS, "q8m/32", "q8m/96"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [96, 576])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 100, 320])
def test_product_has_the_weights_themselves(native: Native, kind: str, rows: int, columns: int) -> None:
    """Rows of the identity read the weights out: rounded once, at the end."""
    weight = make_weight(native, kind, rows, columns)
    found = weight.apply(torch.eye(columns).bfloat16())
    torch.testing.assert_close(found, weight.dense.T.bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, *range(1, 10), 16, 33, 64, 200])
def test_product(native: Native, kind: str, tokens: int, two_threads: None) -> None:
    weight = make_weight(native, kind, 100, 192)
    x = torch.randn(tokens, 224).bfloat16()[:, 32:]
    found, exact = weight.apply(x), x.double() @ weight.dense.T.double()
    # Half a step of bfloat16, and of float32 for each of the sums.
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 + 3e-5 * weight.dense.abs().max()).all())
    assert found.shape == (tokens, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company(native: Native, kind: str, two_threads: None) -> None:
    weight = make_weight(native, kind, 330, 576)
    x = torch.randn(70, 576).bfloat16()
    whole = weight.apply(x)
    torch.set_num_threads(1)
    for count in (1, 2, 7, 8, 9, 31):
        assert torch.equal(torch.cat([weight.apply(part) for part in x.split(count)]), whole)


@pytest.mark.parametrize("rows", [1, 17, 100])
@pytest.mark.parametrize("group", [16, 32, 96, 192])
def test_rows_of_a_packed_table(native: Native, rows: int, group: int) -> None:
    weight = make_weight(native, f"q8/{group}", rows, 192)
    ids = torch.randint(0, rows, (20,))
    assert torch.equal(q8_rows(weight.data, ids), weight.dense[ids])


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 30])
def test_logits_keep_float32(native: Native, kind: str, tokens: int, two_threads: None) -> None:
    weight = make_weight(native, kind, 300, 192)
    x = torch.randn(tokens, 224)[:, 32:]
    found, exact = native.q8_logits(x, weight.data, 300), x.double() @ weight.dense.T.double()
    assert found.shape == (tokens, 300)
    assert bool(((found.double() - exact).abs() <= 2e-5 * weight.dense.abs().max()).all())
    assert torch.equal(found, torch.cat([native.q8_logits(row, weight.data, 300) for row in x.split(1)] or [found]))


# How they come to be there


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of a processor that has it all; where the compiler is looked for is up to the test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "missing_instructions", list)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def use_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = home / "g++"
    compiler.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")  # the last argument is what to make
    compiler.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(compiler) if name == "g++" else None)


def test_processes_that_start_together_compile_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(home, monkeypatch, f'echo "$last" >> {home}/runs; sleep 0.2; echo library > "$last"')
    built: list[Path] = []
    threads = [threading.Thread(target=lambda: built.append(native_build.build_library())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4
    assert {path.read_text() for path in built} == {"library\n"}
    made = [Path(line).name for line in (home / "runs").read_text().splitlines()]
    sources = [source.with_suffix(".o").name for source in native_build.SOURCES.glob("*.cpp")]
    assert sorted(made[:-1]) == sorted(sources), "each source once, and then"
    assert made[-1] == built[0].name
    assert sorted(path.suffix for path in built[0].parent.iterdir()) == ["", ".so"]  # the lock and the library


def test_other_sources_are_another_library(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(home, monkeypatch, 'echo library > "$last"')
    first = native_build.build_library()
    (home / "csrc").mkdir()
    (home / "csrc" / "new.cpp").write_text("// new")
    monkeypatch.setattr(native_build, "SOURCES", home / "csrc")
    assert native_build.build_library() != first


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'a.cpp:1: error: no' >&2; exit 1", "error: no"),
        ('echo rubbish > "$last"', "kernels-"),
        (None, "no compiler"),
    ],
)
def test_without_a_library_there_is_torch(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str | None, reason: str
) -> None:
    use_compiler(home, monkeypatch, script or "")
    if script is None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
    with caplog.at_level(logging.INFO):
        assert load_native.__wrapped__() is None
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_another_processor_needs_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "missing_instructions", lambda: ["avx512_bf16"])
    monkeypatch.setattr("shutil.which", lambda _name: pytest.fail("looked for a compiler"))
    with pytest.raises(native_build.UnavailableError, match="avx512_bf16"):
        native_build.build_library()


def test_nothing_is_run_that_others_could_have_put_there(home: Path) -> None:
    shared = home / ".cache" / "shoal"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    own = native_build.private_folder()
    assert own != shared
    own.chmod(0o777)
    with pytest.raises(native_build.UnavailableError, match="chmod"):
        native_build.private_folder()
