"""Ranks that each hold some columns of the logits come to the tokens of one rank that holds them all, bit for bit."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.cpu import CpuOps
from shoal.kernels.ops import Ops, SamplingBatch
from shoal.kernels.reference import ReferenceOps
from shoal.parallel.partition import cut_vocab
from shoal.parallel.vocab import vocab_ops
from shoal.runtime.batch import SequenceTable
from shoal.runtime.generation import SamplingParams
from shoal.runtime.plan import Admission, Slice, StepPlan
from shoal.runtime.sampler import Sampled, Sampler

CPU = torch.device("cpu")
INF = float("inf")
SIZES = [2, 3, 5]
KINDS = ["plain", "rounded", "masked", "peaked", "flat", "equal"]
# Rows of (temperature, top_k, top_p, min_p).
ROWS = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 7, 1.0, 0.0),
    (1.0, 10**9, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.5, 0, 0.1, 0.0), (1.0, 0, 1e-9, 0.0), (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.2), (2.0, 0, 1.0, 1.0), (0.8, 20, 0.8, 0.0), (1.2, 40, 0.95, 0.01), (3.0, 3, 0.5, 0.5),
    (1e-5, 5, 0.5, 0.0), (1e-42, 5, 0.5, 0.1), (1e-42, 0, 1.0, 0.0), (5.0, 0, 0.999, 0.0), (100.0, 0, 0.99999, 0.0),
]  # fmt: skip


class Group:
    """Shards in lockstep in one process; remembers how many numbers its largest exchange had."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[Tensor] = [torch.empty(0)] * size
        self.largest = 0
        self.exchanges = 0

    def exchange(self, shard: int, x: Tensor) -> Tensor:
        self.given[shard] = x.clone()
        if shard == 0:
            self.largest = max(self.largest, x.numel())
            self.exchanges += 1
        self.barrier.wait()
        given = torch.stack(self.given)  # fails if the ranks do not agree about the shape
        self.barrier.wait()
        return given


class GroupComm:
    def __init__(self, group: Group, shard: int) -> None:
        self.group, self.shard, self.size = group, shard, group.barrier.parties

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.group.exchange(self.shard, x).sum(0))

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x.copy_(self.group.exchange(self.shard, x).amax(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return self.group.exchange(self.shard, x)


def on_shards(size: int, work: Callable[[GroupComm], Any]) -> tuple[list[Any], Group]:
    group = Group(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda shard: work(GroupComm(group, shard)), range(size))), group


def columns(logits: Tensor, comm: GroupComm) -> Tensor:
    return logits[:, cut_vocab(logits.shape[1], shard=comm.shard, size=comm.size)].clone()


def make_logits(kind: str, rows: int, vocab: int) -> Tensor:
    logits = torch.randn(rows, vocab) * 3
    match kind:
        case "rounded":  # many ties at every border
            return (logits / 3).round() * 3 * torch.tensor([1.0, -0.0, 1.0])[torch.arange(vocab) % 3]
        case "masked":
            return logits.masked_fill(torch.rand(rows, vocab) < 0.9, -INF)
        case "peaked":
            logits[:, vocab // 2] += 30
        case "flat":
            logits *= 1e-6
        case "equal":
            logits.zero_()
    return logits


def make_sampling(rows: list[tuple[float, int, float, float]], seed: int) -> SamplingBatch:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingBatch(
        temperature_R=torch.tensor(temperature, dtype=torch.float32),
        top_k_R=torch.tensor(top_k, dtype=torch.int32),
        top_p_R=torch.tensor(top_p, dtype=torch.float32),
        min_p_R=torch.tensor(min_p, dtype=torch.float32),
        seed_R=torch.arange(len(rows)) * 0x5DEECE66D + seed,
        position_R=torch.arange(len(rows)) + seed,
        all_greedy=not any(temperature),
        max_top_k=max((k for t, k, _, _ in rows if t), default=0),
        any_top_p=any(p < 1 for t, _, p, _ in rows if t),
        any_min_p=any(p for t, _, _, p in rows if t),
    )


@pytest.fixture(params=[ReferenceOps, CpuOps])
def ops(request: pytest.FixtureRequest) -> Ops:
    torch.manual_seed(0)
    made: Ops = request.param(CPU)
    return made


def drawn(ops: Ops, logits: Tensor, sampling: SamplingBatch, size: int) -> list[int]:
    """The tokens of all shards, which are the same."""

    def draw(comm: GroupComm) -> list[int]:
        tokens: list[int] = (
            vocab_ops(ops, vocab_size=logits.shape[1], comm=comm).sample(columns(logits, comm), sampling).tolist()
        )
        return tokens

    found, _ = on_shards(size, draw)
    assert all(tokens == found[0] for tokens in found)
    return list(found[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("vocab", "seeds"), [(1, 1), (3, 3), (7, 3), (50, 2), (3001, 1)])
def test_every_width_draws_the_same(ops: Ops, size: int, vocab: int, seeds: int) -> None:
    for seed, kind in itertools.product(range(seeds), KINDS):
        logits, sampling = make_logits(kind, len(ROWS), vocab), make_sampling(ROWS, seed)
        assert drawn(ops, logits, sampling, size) == ops.sample(logits, sampling).tolist(), kind


def near_borders() -> list[tuple[float, float]]:
    """(x, top_p): of two tokens with logits 0 and x the first one's share is within 1e-9 of top_p, on either side."""
    x = np.linspace(-1, -0.2, 100_000).astype(np.float32)
    share = 1 / (1 + np.exp(x.astype(np.float64)))
    gap = share - share.astype(np.float32)
    near = np.flatnonzero((abs(gap) > 1e-11) & (abs(gap) < 1e-9))
    chosen = [*near[gap[near] > 0][:6], *near[gap[near] < 0][:6]]
    return [(float(x[i]), float(share.astype(np.float32)[i])) for i in chosen]


@pytest.mark.parametrize("vocab", [5, 4000])
def test_the_border_of_top_p_is_where_the_masses_have_it(ops: Ops, vocab: int) -> None:
    cases = near_borders()
    assert len(cases) == 12
    draws = 32  # the second token has at least a quarter of the mass
    for at, (x, top_p) in enumerate(cases):
        logits = torch.full((draws, vocab), -60.0)
        logits[:, vocab - 1], logits[:, 1] = 0.0, x
        sampling = make_sampling([(1.0, 0, top_p, 0.0)] * draws, 7)
        kept = {vocab - 1} if at < 6 else {1, vocab - 1}  # its share is more than top_p, or less
        assert set(ops.sample(logits, sampling).tolist()) == kept
        assert set(drawn(ops, logits, sampling, 3)) == kept


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            st.sampled_from([0, 1, 2, 5, 30]),
            st.one_of(st.just(1.0), st.floats(0, 1)),
            st.one_of(st.just(0.0), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    vocab=st.integers(1, 40),
    size=st.sampled_from(SIZES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**40),
)
def test_any_mix_of_rows(
    rows: list[tuple[float, int, float, float]], *, vocab: int, size: int, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    ops = CpuOps(CPU)
    logits, sampling = make_logits(kind, len(rows), vocab), make_sampling(rows, seed)
    expected = ops.sample(logits, sampling).tolist()
    assert expected == ReferenceOps(CPU).sample(logits, sampling).tolist()
    assert drawn(ops, logits, sampling, size) == expected


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], (1.0, 9, 1.0, 0.0), (1.0, 0, 0.9, 0.1)])
@pytest.mark.parametrize("vocab", [7, 50])
def test_a_bad_row_fails_on_every_rank_and_alone(ops: Ops, row: tuple[float, int, float, float], vocab: int) -> None:
    sampling = make_sampling([row] * 6, 3)
    logits = torch.randn(6, vocab)
    expected = ops.sample(logits, sampling).tolist()
    assert min(expected) >= 0
    logits[0, 1] = torch.nan
    logits[1, vocab - 1] = INF
    logits[3] = -INF
    logits[4, 2], logits[4, vocab - 2] = torch.nan, INF
    for size in SIZES:
        assert drawn(ops, logits, sampling, size) == [-1, -1, expected[2], -1, -1, expected[5]]


def test_what_is_exchanged_is_small_and_for_filters_only_where_a_row_has_them(ops: Ops) -> None:
    vocab, rows = 20_000, 4
    logits = torch.randn(rows, vocab)

    def cost(row: tuple[float, int, float, float], others: tuple[float, int, float, float]) -> tuple[int, int]:
        sampling = make_sampling([row] + [others] * (rows - 1), 0)

        def draw(comm: GroupComm) -> None:
            vocab_ops(ops, vocab_size=vocab, comm=comm).sample(columns(logits, comm), sampling)

        _, group = on_shards(2, draw)
        return group.exchanges, group.largest

    plain, filtered = (1.0, 0, 1.0, 0.0), (1.0, 40, 0.9, 0.1)
    assert cost(plain, plain) == (1, rows)
    assert cost((0.0, 0, 1.0, 0.0), plain) == (1, rows)
    assert cost((0.0, 40, 0.9, 0.1), plain) == (1, rows)  # a greedy row filters nothing
    assert cost(filtered, plain) == (7, 256 * rows)
    assert cost((1.0, 5000, 1.0, 0.0), plain) == (6, 256 * rows)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("vocab", "num"), [(1, 1), (3, 8), (7, 5), (50, 0), (50, 20), (3001, 20)])
def test_logprobs(ops: Ops, size: int, vocab: int, num: int) -> None:
    logits = torch.stack([torch.randperm(vocab) for _ in range(4)]).float() * 0.1
    logits[1] -= 500
    if vocab > 5:
        logits[2, :5] = -INF
    tokens = torch.randint(0, vocab, (4,))
    expected = ReferenceOps(CPU).logprobs(logits.double().float(), tokens, num)
    found, _ = on_shards(
        size, lambda comm: vocab_ops(ops, vocab_size=vocab, comm=comm).logprobs(columns(logits, comm), tokens, num)
    )
    for one in found:
        torch.testing.assert_close(one.chosen_R, expected.chosen_R, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(one.top_logprobs_RL, expected.top_logprobs_RL, rtol=1e-6, atol=2e-6)
        assert one.rank_R.tolist() == expected.rank_R.tolist()
        assert one.top_ids_RL[[0, 1, 3]].tolist() == expected.top_ids_RL[[0, 1, 3]].tolist()
        assert all(len(set(ids)) == len(ids) and max(ids, default=0) < vocab for ids in one.top_ids_RL.tolist())


def test_logprobs_of_an_unsampled_row_harm_nobody(ops: Ops) -> None:
    logits = torch.randn(2, 40)
    logits[0, 30] = torch.nan
    found, _ = on_shards(
        3,
        lambda comm: vocab_ops(ops, vocab_size=40, comm=comm).logprobs(columns(logits, comm), torch.tensor([-1, 3]), 2),
    )
    for one in found:
        torch.testing.assert_close(one.chosen_R[1], logits[1].log_softmax(0)[3])


# The sampler above it


ASKED = [
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.9, top_k=4, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=0),
    SamplingParams(temperature=1.3, top_p=0.7, logit_bias={0: 2.0, 5: -100.0, 6: 1.5}),
    SamplingParams(temperature=0.0, min_tokens=3, presence_penalty=1.0, max_tokens=9),
    SamplingParams(temperature=1.0, min_p=0.05, top_p=0.95, min_tokens=2, max_tokens=9, logprobs=2),
]


def rank_draws(vocab: int, comm: GroupComm | None, *, seed: int) -> list[Sampled]:
    """Six steps of six sequences; sequences 1 and 3 are under a mask in every other step."""
    sampler = Sampler(CpuOps(CPU), vocab, comm=comm)
    table = SequenceTable(num_slots=len(ASKED), max_model_len=32, block_size=16)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocab, (4,), generator=generator).tolist()
    for slot, params in enumerate(ASKED):
        bias = (
            {token: value for token, value in params.logit_bias.items() if token < vocab} if params.logit_bias else {}
        )
        params = SamplingParams(**{f: getattr(params, f) for f in params.__struct_fields__} | {"logit_bias": bias})
        admission = Admission(slot, prompt, 3, params, seed + slot, [1, vocab - 1])  # one token is output already
        table.apply(StepPlan(0, [admission], [(slot, [0, 1])], []))
        sampler.admit(admission)
    steps = []
    for step in range(6):
        logits = torch.randn(len(ASKED), vocab, generator=generator) * 2
        allowed = (torch.rand(2, -(-vocab // 32) * 32, generator=generator) < 0.6).numpy()
        allowed[:, 0] = True
        packed = np.packbits(allowed, axis=1, bitorder="little")
        masks = {1: packed[0].tobytes(), 3: packed[1].tobytes()} if step % 2 else {}
        slices = [Slice(slot, 3 + step, 1, True) for slot in range(len(ASKED))]
        mine = logits if comm is None else columns(logits, comm)
        steps.append(sampler.sample(mine.clone(), table.batch(slices), StepPlan(step, [], [], slices, masks)))
    return steps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab", [3, 7, 45, 300])
def test_the_sampler_is_the_same_at_every_width(size: int, vocab: int) -> None:
    for seed in range(2):
        expected = rank_draws(vocab, None, seed=seed)
        found, _ = on_shards(size, lambda comm, seed=seed: rank_draws(vocab, comm, seed=seed))  # type: ignore[misc]
        for steps in found:
            assert [step.tokens for step in steps] == [step.tokens for step in expected]
            for step, other in zip(steps, expected, strict=True):
                assert step.logprobs is not None
                assert other.logprobs is not None
                for one, two in zip(step.logprobs, other.logprobs, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None and two is not None:
                        assert one.rank == two.rank
                        assert one.logprob == pytest.approx(two.logprob, abs=1e-6)
                        assert [token for token, _ in one.top] == [token for token, _ in two.top]
