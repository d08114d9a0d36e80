"""Sampling and logprobs: the reference against sorted definitions and statistics, the kernels against the reference."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from shoal.kernels import reference as definitions
from shoal.kernels.ops import Ops, SamplingBatch
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps

INF = float("inf")


class How(NamedTuple):
    """One row's parameters."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = How(temperature=0.0)
ROWS = [
    How(),
    GREEDY,
    How(0.3),
    How(top_k=1),
    How(top_k=7),
    How(top_k=10**9),
    How(top_p=0.9),
    How(1.5, top_p=0.1),
    How(top_p=1e-9),
    How(top_p=0.0),
    How(min_p=0.2),
    How(2.0, min_p=1.0),
    How(0.8, 20, 0.8),
    How(1.2, 40, 0.95, 0.01),
    How(3.0, 3, 0.5, 0.5),
    How(1e-5, 5, 0.5),
]


def make_sampling(rows: list[How], device: torch.device, *, first_seed: int = 0) -> SamplingBatch:
    columns = How(*(list(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]
    return SamplingBatch(
        temperature_R=torch.tensor(columns.temperature, dtype=torch.float32, device=device),
        top_k_R=torch.tensor(columns.top_k, dtype=torch.int32, device=device),
        top_p_R=torch.tensor(columns.top_p, dtype=torch.float32, device=device),
        min_p_R=torch.tensor(columns.min_p, dtype=torch.float32, device=device),
        seed_R=torch.arange(first_seed, first_seed + len(rows), device=device) * 0x5DEECE66D,
        position_R=torch.arange(len(rows), device=device) % 5,
        all_greedy=all(row.temperature == 0 for row in rows),
        max_top_k=max(row.top_k for row in rows),
        any_top_p=any(row.top_p < 1 for row in rows),
        any_min_p=any(row.min_p > 0 for row in rows),
    )


def drawn_tokens(ops: Ops, logits: list[float], how: How, draws: int) -> Counter[int]:
    sampling = make_sampling([how] * draws, ops.device)
    tokens = ops.sample(torch.tensor([logits] * draws, device=ops.device), sampling)
    return Counter(tokens.tolist())


# The reference


def kept_by_definition(logits: np.ndarray, how: How) -> set[int]:
    """Ids that the filters keep, told in words: sort, walk down from the likeliest. No ties here."""
    scaled = logits.astype(np.float64) / how.temperature
    kept = np.argsort(-scaled)
    odds = np.exp(scaled - scaled.max())
    kept = [i for i in kept if odds[i] >= how.min_p * odds.max()]
    kept = kept[: how.top_k or None]
    mass, walked = 0.0, []
    for i in kept:
        walked.append(i)
        mass += odds[i] / odds[kept].sum()
        if how.top_p < 1 and mass >= how.top_p:
            break
    return {int(i) for i in walked}


@pytest.mark.parametrize("how", [row for row in ROWS if row.temperature > 0 and row.top_p > 1e-6])
def test_reference_filters_by_definition(on_cpu: ReferenceOps, how: How) -> None:
    logits = torch.randn(8, 300) * 3
    sampling = make_sampling([how] * 8, on_cpu.device)
    filtered = on_cpu.filter(definitions.scale_by_temperature(logits, sampling.temperature_R), sampling)
    for row, kept in zip(logits.numpy(), filtered > -INF, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == kept_by_definition(row, how)


def test_reference_keeps_the_token_that_crosses_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    for top_p, kept in [(0.0, 1), (0.4, 1), (0.6, 2), (0.76, 3), (0.89, 3), (0.95, 4), (1.0, 4)]:
        filtered = definitions.filter_top_p(logits, torch.tensor([top_p]))
        assert int((filtered > -INF).sum()) == kept, top_p


def test_reference_keeps_all_ties_at_a_border() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    assert (definitions.filter_top_k(logits, torch.tensor([2])) > -INF).tolist() == [[0, 1, 1, 1, 0, 1]]
    assert (definitions.filter_top_p(logits, torch.tensor([0.6])) > -INF).tolist() == [[0, 1, 1, 1, 0, 1]]


def test_reference_takes_top_p_of_what_top_k_left(on_cpu: ReferenceOps) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]]))
    # Of all, 0.7 needs three; of the first three renormalised (0.4, 0.33, 0.27), two do.
    sampling = make_sampling([How(top_k=3, top_p=0.7)], on_cpu.device)
    assert (on_cpu.filter(logits, sampling) > -INF).tolist() == [[1, 1, 0, 0, 0]]


def test_reference_logprobs(on_cpu: ReferenceOps) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -INF, 2.0]])
    found = on_cpu.logprobs(logits.expand(3, -1), torch.tensor([2, 4, 3]), 2)
    expected = logits[0].double().softmax(0).log().float()
    torch.testing.assert_close(found.chosen_R, expected[[2, 4, 3]])
    assert found.rank_R.tolist() == [3, 1, 5]
    assert sorted(found.top_ids_RL[0].tolist()) == [1, 4]
    torch.testing.assert_close(found.top_logprobs_RL[0], expected[[1, 4]])


@pytest.mark.parametrize("how", [How(), How(0.7, 5), How(1.3, 0, 0.8), How(1.0, 0, 1.0, 0.2)])
def test_reference_draws_follow_the_distribution(on_cpu: ReferenceOps, how: How) -> None:
    logits, draws = [0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -3.0, 1.2], 20000
    counts = drawn_tokens(on_cpu, logits, how, draws)
    kept = sorted(kept_by_definition(np.array(logits), how))
    assert set(counts) <= set(kept)
    odds = np.exp(np.array(logits)[kept] / how.temperature)
    expected = draws * odds / odds.sum()
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in zip(kept, expected, strict=True))
    assert chi_square < 24.3  # 7 degrees of freedom: 0.1 %; fewer have a lower bound


# Both


@pytest.fixture(params=["reference", "kernels"])
def either(request: pytest.FixtureRequest, ops: TritonOps, reference: ReferenceOps) -> Ops:
    return reference if request.param == "reference" else ops


def test_unusable_rows_give_minus_one_and_spare_the_others(either: Ops) -> None:
    logits = torch.randn(5, 50, device=either.device)
    expected = either.sample(logits, make_sampling([How(top_k=9)] * 5, either.device))
    assert (expected >= 0).all()
    for how in (GREEDY, How(), How(1.0, 9), How(1.0, 0, 0.9, 0.1)):
        broken = logits.clone()
        broken[0, 7] = torch.nan
        broken[1, 49] = INF
        broken[3] = -INF
        sampling = make_sampling([how] * 5, either.device)
        tokens = either.sample(broken, sampling)
        assert tokens[[0, 1, 3]].tolist() == [-1, -1, -1]
        assert tokens[[2, 4]].tolist() == either.sample(logits, sampling)[[2, 4]].tolist()


def test_a_row_is_a_function_of_itself(either: Ops) -> None:
    logits = torch.randn(len(ROWS), 700, device=either.device) * 2
    sampling = make_sampling(ROWS, either.device)
    together = either.sample(logits, sampling)
    for at, how in enumerate(ROWS):
        alone = make_sampling([how], either.device)
        alone = replace(alone, seed_R=sampling.seed_R[at : at + 1], position_R=sampling.position_R[at : at + 1])
        assert either.sample(logits[at : at + 1], alone).tolist() == together[at : at + 1].tolist()


def test_masked_tokens_are_never_drawn(either: Ops) -> None:
    for how in (GREEDY, How(), How(5.0, 4), How(5.0, 0, 0.99), How(5.0, 0, 1.0, 0.01)):
        counts = drawn_tokens(either, [-INF, 1.0, -INF, 1.5, -INF], how, 10)
        assert set(counts) <= {1, 3}


def test_greedy_takes_the_lowest_id_of_the_best(either: Ops) -> None:
    logits = torch.zeros(2, 5000, device=either.device)
    logits[1, [4999, 4200, 4300]] = 1.0
    tokens = either.sample(logits, make_sampling([GREEDY] * 2, either.device))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [0, 4200]


def test_ties_at_the_border_are_all_drawn(either: Ops) -> None:
    logits = [2.0, 0.0, 2.0, 1.0, -0.0, 2.0]
    assert set(drawn_tokens(either, logits, How(top_k=2), 16)) == {0, 2, 5}
    assert set(drawn_tokens(either, logits, How(top_p=0.1), 16)) == {0, 2, 5}
    assert set(drawn_tokens(either, [0.0, -0.0, -9.0], How(top_k=1), 8)) == {0, 1}


def test_no_rows(either: Ops) -> None:
    logits = torch.empty(0, 10, device=either.device)
    empty = make_sampling([How(top_k=1)], either.device)
    empty = SamplingBatch(*(getattr(empty, f)[:0] for f in list(empty.__slots__)[:6]), False, True, True, True)
    assert either.sample(logits, empty).tolist() == []
    assert either.logprobs(logits, empty.seed_R, 2).top_ids_RL.shape == (0, 2)


# The kernels against the reference


@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [
        (torch.float32, 1),
        (torch.float16, 2),
        (torch.float32, 50),
        (torch.float16, 400),
        (torch.bfloat16, 400),
        (torch.float32, 2048),
        (torch.float32, 5003),  # several chunks
    ],
)
def test_kernels_draw_what_the_reference_draws(
    ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype, vocab: int
) -> None:
    # bfloat16 and float16 logits are full of ties.
    logits = (torch.randn(len(ROWS), vocab + 5, device=ops.device) * 4).to(dtype)[:, :vocab]  # rows are strided
    sampling = make_sampling(ROWS, ops.device)
    assert ops.sample(logits, sampling).tolist() == reference.sample(logits, sampling).tolist()


def test_draws_of_shards_hold_the_draw_of_the_whole(ops: TritonOps, reference: ReferenceOps) -> None:
    logits = torch.randn(len(ROWS), 5003, device=ops.device) * 4
    logits[3, :2000], logits[4, 100], logits[5, 4000] = -INF, torch.nan, INF
    sampling = make_sampling(ROWS, ops.device)
    scaled = definitions.scale_by_temperature(logits, sampling.temperature_R)
    threshold_R = scaled.topk(9, dim=-1).values[:, -1].nan_to_num(nan=-INF)
    for thresholds in (None, threshold_R):
        whole = reference.draw(logits, sampling, first_id=0, threshold_R=thresholds)
        for implementation in (ops, reference):
            parts = [
                implementation.draw(logits[:, cut], sampling, first_id=cut.start, threshold_R=thresholds)
                for cut in (slice(0, 1700), slice(1700, 3400), slice(3400, 5003))
            ]
            scores_SR = torch.stack([part.score_R for part in parts])
            torch.testing.assert_close(scores_SR.amax(0), whole.score_R, rtol=1e-5, atol=1e-5)
            tokens_R = torch.stack([part.token_R for part in parts]).gather(0, scores_SR.argmax(0)[None])[0]
            usable_R = whole.score_R.isfinite()
            assert usable_R.tolist() == [row not in (4, 5) for row in range(len(ROWS))]
            assert tokens_R[usable_R].tolist() == whole.token_R[usable_R].tolist()


@pytest.mark.parametrize("rows", [[How()], [GREEDY], [How(top_k=5)], [How(top_p=0.7)], [How(0.5, min_p=0.1)]])
def test_flags_leave_out_only_what_is_unused(ops: TritonOps, reference: ReferenceOps, rows: list[How]) -> None:
    logits = torch.randn(8, 400, device=ops.device) * 3
    few = make_sampling(rows * 8, ops.device)
    every = replace(few, all_greedy=False, max_top_k=1000, any_top_p=True, any_min_p=True)
    expected = reference.sample(logits, few).tolist()
    assert ops.sample(logits, few).tolist() == expected
    assert ops.sample(logits, every).tolist() == expected


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_search_finds_borders_at_any_scale(ops: TritonOps, reference: ReferenceOps, spread: float) -> None:
    logits = torch.randn(12, 600, device=ops.device) * spread + 1000 * spread
    rows = [How(spread, k) for k in (2, 5, 100, 599, 600, 601)] + [How(spread, 0, p) for p in (0.2, 0.5, 0.9)]
    rows += [How(spread, 50, p) for p in (0.2, 0.5, 0.9)]
    for first_seed in range(0, 24, 12):
        sampling = make_sampling(rows, ops.device, first_seed=first_seed)
        assert ops.sample(logits, sampling).tolist() == reference.sample(logits, sampling).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "num"), [(1, 1), (30, 0), (30, 5), (5003, 20), (3, 8)])
def test_logprobs(ops: TritonOps, reference: ReferenceOps, dtype: torch.dtype, vocab: int, num: int) -> None:
    logits = torch.stack([torch.randperm(vocab) for _ in range(4)]).to(ops.device, torch.float32) * 0.01
    logits[1] = (logits[1] * 100).clamp(max=200)  # sharp; then ties
    logits[2] -= 500
    tokens = torch.randint(0, vocab, (4,), device=ops.device)
    logits = logits.to(dtype)
    actual, expected = ops.logprobs(logits, tokens, num), reference.logprobs(logits, tokens, num)
    torch.testing.assert_close(actual.chosen_R, expected.chosen_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs_RL, expected.top_logprobs_RL, rtol=1e-5, atol=1e-5)
    assert actual.rank_R.tolist() == expected.rank_R.tolist()
    assert torch.equal(logits.gather(1, actual.top_ids_RL), logits.gather(1, expected.top_ids_RL))


def test_logprobs_of_an_unsampled_row_harm_nobody(ops: TritonOps) -> None:
    logits = torch.randn(2, 40, device=ops.device)
    logits[0] = torch.nan
    found = ops.logprobs(logits, torch.tensor([-1, 3], device=ops.device), 2)
    torch.testing.assert_close(found.chosen_R[1], logits[1].log_softmax(0)[3])
