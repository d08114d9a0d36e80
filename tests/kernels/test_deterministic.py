"""Deterministic operations: a row's bits are the same alone, in any batch, and at any place in it.

The CPU's are held at shapes that meet the seams of torch's kernels: one row and many, widths that fill no vector, more
numbers than one thread takes. Triton's run in the interpreter, which has no seams: there it is the logic that is held.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.kernels.deterministic import DeterministicCpuOps
from shoal.kernels.matmul import matmul
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, KVLayer
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.select import select_ops
from shoal.kernels.triton_ops import TritonOps

from .conftest import INTERPRETED

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
MOST = 150
WIDTHS = [48, 101, 576]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(_one_thread: None) -> None:
    """Some of torch's seams are where the work of one thread ends, or in how a second one's buffers lie."""
    torch.set_num_threads(2)


@pytest.fixture
def det() -> DeterministicCpuOps:
    return DeterministicCpuOps(CPU)


def rows_are_their_own(function: Callable[[Tensor], Tensor], x_TD: Tensor) -> None:
    """Some rows alone, then in batches of many sizes, at many places."""
    alone = torch.cat([function(x_TD[row : row + 1].clone()) for row in range(0, MOST, 10)])
    for size in (2, 5, 17, 80, MOST):
        order = torch.randperm(MOST)[:size]
        found = function(x_TD[order])
        for place, row in enumerate(order.tolist()):
            assert row % 10 or torch.equal(found[place], alone[row // 10]), (size, row, place)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "inner"), [(960, 576), (576, 1536), (101, 48), (48, 72), (7, 36), (50, 33)])
def test_products(det: DeterministicCpuOps, dtype: torch.dtype, features: int, inner: int) -> None:
    weight = torch.randn(features, inner).to(dtype) / inner**0.5
    x = torch.randn(MOST, inner).to(dtype)
    found, expected = det.linear(x, weight), x.float() @ weight.float().T
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert found.dtype == dtype
    assert det.linear(x[:0], weight).shape == (0, features)
    rows_are_their_own(lambda part: det.linear(part, weight), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(det: DeterministicCpuOps, dtype: torch.dtype, width: int) -> None:
    x, weight, bias = torch.randn(MOST, width).to(dtype) * 3, torch.rand(width), torch.randn(width)
    expected = ReferenceOps(CPU).rms_norm(x, weight, eps=1e-5)
    torch.testing.assert_close(det.rms_norm(x, weight, eps=1e-5), expected, atol=TOLERANCE[dtype], rtol=3e-2)
    rows_are_their_own(lambda part: det.rms_norm(part, weight, eps=1e-5), x)
    rows_are_their_own(lambda part: det.layer_norm(part, weight, bias, eps=1e-5), x)
    rows_are_their_own(lambda part: det.add_rms_norm(part, part.float() * 0.3, weight, eps=1e-5), x)
    if width == 576:  # per head
        heads = weight[:8]
        rows_are_their_own(lambda part: det.rms_norm(part.view(len(part), -1, 8), heads, eps=1e-5), x)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(det: DeterministicCpuOps, dtype: torch.dtype, activation: Activation, width: int) -> None:
    x = torch.randn(MOST, 2 * width).to(dtype) * 2
    expected = ReferenceOps(CPU).gated_activation(x, activation)
    torch.testing.assert_close(det.gated_activation(x, activation), expected, atol=TOLERANCE[dtype], rtol=3e-2)
    rows_are_their_own(lambda part: det.gated_activation(part, activation), x)
    rows_are_their_own(lambda part: det.activation(part, activation), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (24, 8), (20, 20)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(det: DeterministicCpuOps, *, dtype: torch.dtype, dim: int, rotated: int, interleaved: bool) -> None:
    table = torch.randn(50, rotated)

    def rotate(x: Tensor) -> Tensor:  # the last column is the position
        heads = x[:, :-1].to(dtype).view(len(x), 13, dim)
        q, k, _ = heads.split((9, 2, 2), 1)
        det.rope(q, k, x[:, -1].long(), table, interleaved=interleaved)
        return heads

    rows_are_their_own(rotate, torch.cat([torch.randn(MOST, 13 * dim), torch.randint(0, 50, (MOST, 1)).float()], 1))


@pytest.mark.parametrize("vocab", [101, 4099, 32768])
def test_logprobs(det: DeterministicCpuOps, vocab: int) -> None:
    def of_row(logits: Tensor) -> Tensor:
        found = det.logprobs(logits, torch.full((len(logits),), 7), 3)
        return torch.cat([found.chosen_R[:, None], found.top_logprobs_RL], 1)

    logits = torch.randn(MOST, 128).repeat(1, -(-vocab // 128))[:, :vocab] * 3
    rows_are_their_own(of_row, logits)


class Content(NamedTuple):
    """One sequence's queries, keys and values, wherever its pages lie."""

    q_nHE: Tensor
    k_nKE: Tensor
    v_nKE: Tensor

    @staticmethod
    def random(tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> "Content":
        return Content(*(torch.randn(tokens, count, dim).to(dtype) for count in (heads[0], heads[1], heads[1])))


Attention = Callable[[Tensor, KVLayer, AttentionBatch], Tensor]


def attend(attention: Attention, work: list[tuple[Content, int, int]], page: int, *, rubbish: float) -> list[Tensor]:
    """Attention of (content, new tokens, tokens in all), decodes first, over freshly shuffled pages."""
    counts = [-(-total // page) for _, _, total in work]
    own = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.zeros(len(work), max(counts) + 1, dtype=torch.int32)
    _, kv_heads, dim = work[0][0].k_nKE.shape
    dtype = work[0][0].q_nHE.dtype
    cache = KVLayer(*(torch.full((sum(counts) + 1, kv_heads, page, dim), rubbish, dtype=dtype) for _ in range(2)))
    for row, pages, (content, _, total) in zip(table, own, work, strict=True):
        row[: len(pages)] = pages
        at = torch.arange(total)
        for paged_NKBE, own_nKE in zip(cache, content[1:], strict=True):
            paged_NKBE[pages[at // page], :, at % page] = own_nKE[:total]
    new, totals = tuple(n for _, n, _ in work), tuple(total for _, _, total in work)
    batch = AttentionBatch(
        query_start_S1=torch.tensor([0, *new]).cumsum(0).to(torch.int32),
        kv_lens_S=torch.tensor(totals, dtype=torch.int32),
        block_table_SP=table,
        num_decodes=new.count(1),
        max_query_len=max(new),
        max_kv_len=max(totals),
        query_lens=new,
        kv_lens=totals,
    )
    q_THE = torch.cat([content.q_nHE[total - n : total] for content, n, total in work])
    return list(attention(q_THE, cache, batch).split(list(new)))


def attention_rows_are_their_own(attention: Attention, make: Callable[[int], Content], lengths: list[int]) -> None:
    """Every token decoded alone; then in chunks beside others, on other pages; then all of it at once."""
    contents = [make(length) for length in lengths]
    alone = []
    for content, length in zip(contents, lengths, strict=True):
        positions = sorted({0, length // 2, length - 1})
        alone.append({p: attend(attention, [(content, 1, p + 1)], 16, rubbish=torch.nan)[0][0] for p in positions})
    for chunk in (1, 30, max(lengths)):
        for content, length, expected in zip(contents, lengths, alone, strict=True):
            for position, row in expected.items():
                new = min(chunk, position + 1)
                later = min(position + chunk // 3, length - 1)  # the token may stand anywhere in its chunk
                start = min(max(later + 1 - new, 0), position)
                chunks = [(content, later + 1 - start, later + 1)]
                others = [(contents[0], 1, 3), (contents[-1], 1, lengths[-1]), (contents[-1], 5, 5)]
                work = sorted(chunks + others, key=lambda item: item[1] > 1)
                found = attend(attention, work, 32, rubbish=1e4)
                mine = found[[item is chunks[0] for item in work].index(True)]
                assert torch.equal(mine[position - start], row), (chunk, length, position)


HEADS = [(9, 3, 64), (2, 2, 20), (7, 1, 8), (1, 1, 16)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("window", [None, 150])
def test_attention(det: DeterministicCpuOps, *, dtype: torch.dtype, heads: int, kv_heads: int, dim: int,
                   window: int | None) -> None:  # fmt: skip
    spec = AttentionSpec(scale=dim**-0.5, window=window)
    attention_rows_are_their_own(
        lambda q, cache, batch: det.attention(q, cache, batch, spec),
        lambda length: Content.random(length, (heads, kv_heads), dim, dtype),
        [5, 127, 300],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [4, 16, 256])
@pytest.mark.parametrize("spec", [AttentionSpec(0.2), AttentionSpec(0.2, window=33), AttentionSpec(0.2, softcap=5.0)])
def test_attention_is_the_reference(det: DeterministicCpuOps, dtype: torch.dtype, page: int,
                                    spec: AttentionSpec) -> None:  # fmt: skip
    lengths = [(1, 1), (1, 40), (1, 128), (1, 333), (9, 200), (140, 150), (300, 300)]
    work = [(Content.random(total, (6, 3), 32, dtype), new, total) for new, total in lengths]
    both = []
    for ops in (det, ReferenceOps(CPU)):
        torch.manual_seed(1)
        run = lambda q, cache, batch, ops=ops: ops.attention(q, cache, batch, spec)  # noqa: E731
        both.append(torch.cat(attend(run, work, page, rubbish=torch.nan)))
    torch.testing.assert_close(*both, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_softcapped_attention(det: DeterministicCpuOps) -> None:
    spec = AttentionSpec(scale=0.3, softcap=4.0, window=50)
    attention_rows_are_their_own(
        lambda q, cache, batch: det.attention(q, cache, batch, spec),
        lambda length: Content.random(length, (4, 2), 16, torch.float32),
        [5, 140],
    )


def test_each_device_has_its_deterministic_operations() -> None:
    assert isinstance(select_ops(CPU, deterministic=True), DeterministicCpuOps)
    assert not isinstance(select_ops(CPU), DeterministicCpuOps)


needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled for the GPU in this process")


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", [None, torch.float32])
def test_triton_products(dtype: torch.dtype, result: torch.dtype | None) -> None:
    for rows, features, inner in ((1, 70, 40), (65, 130, 200), (3, 64, 64), (0, 8, 8)):
        weight = torch.randn(features, inner).to(dtype) / inner**0.5
        x = torch.randn(rows, 2 * inner).to(dtype)[:, inner:]
        found = matmul(x, weight, result)
        assert found.dtype == (result or dtype)
        expected = (x.float() @ weight.float().T).to(found.dtype)
        torch.testing.assert_close(found, expected, atol=TOLERANCE[found.dtype], rtol=TOLERANCE[found.dtype])
        whole = torch.cat([x, torch.randn(100, inner).to(dtype)]).roll(50, 0)
        assert torch.equal(matmul(whole, weight, result)[50 : 50 + rows], found)


@needs_interpreter
@pytest.mark.parametrize("window", [None, 20])
def test_triton_attention(window: int | None) -> None:
    spec = AttentionSpec(scale=0.25, window=window)
    ops = TritonOps(CPU, deterministic=True)
    attention_rows_are_their_own(
        lambda q, cache, batch: ops.attention(q, cache, batch, spec),
        lambda length: Content.random(length, (4, 2), 16, torch.float32),
        [40],
    )


@needs_interpreter
def test_triton_operations_multiply_with_it() -> None:
    x, weight = torch.randn(3, 33), torch.randn(9, 33)
    assert torch.equal(TritonOps(CPU, deterministic=True).linear(x, weight), matmul(x, weight))
    assert TritonOps(CPU, deterministic=True).deterministic
    assert not TritonOps(CPU).deterministic
