"""Cuts cover everything exactly once, evenly, and keep query heads with the KV heads they read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.partition import cut_heads, cut_mlp, cut_vocab, even_cut, length


def covers(parts: list[slice], total: int) -> bool:
    return [i for part in parts for i in range(part.start, part.stop)] == list(range(total))


@given(st.integers(0, 5000), st.integers(1, 17), st.integers(1, 300))
def test_even_cut_covers_in_order_and_differs_by_at_most_one_unit(total, size, unit):
    parts = [even_cut(total, shard=shard, size=size, unit=unit) for shard in range(size)]
    assert covers(parts, total)
    units = [-(-length(part) // unit) for part in parts]
    assert max(units) - min(units) <= 1
    assert all(part.start % unit == 0 for part in parts if length(part))


@st.composite
def heads(draw):
    kv = draw(st.integers(1, 12))
    group = draw(st.integers(1, 9))
    return kv * group, kv, draw(st.integers(1, kv * group))


@given(heads())
def test_every_query_head_is_on_one_rank_beside_its_kv_head(case):
    num_heads, num_kv, size = case
    group = num_heads // num_kv
    cuts = [cut_heads(num_heads, num_kv, shard=shard, size=size) for shard in range(size)]
    assert covers([cut.query for cut in cuts], num_heads)
    assert all(cut.num_query and cut.num_kv for cut in cuts)
    for cut in cuts:
        # What the kernels assume: local query head h reads local KV head h // (local group).
        local_group, rest = divmod(cut.num_query, cut.num_kv)
        assert rest == 0
        for h in range(cut.num_query):
            assert (cut.query.start + h) // group == cut.kv.start + h // local_group
        assert cut.copies == sum(other.kv == cut.kv for other in cuts)
    if size <= num_kv:
        assert covers([cut.kv for cut in cuts], num_kv)
        sizes = [cut.num_kv for cut in cuts]
        assert max(sizes) - min(sizes) <= 1


def test_nine_heads_and_three_kv_heads_run_at_two_three_and_five_ranks():
    def shares(size: int) -> list[tuple[int, int]]:
        cuts = [cut_heads(9, 3, shard=shard, size=size) for shard in range(size)]
        return [(cut.num_query, cut.num_kv) for cut in cuts]

    assert shares(2) == [(6, 2), (3, 1)]
    assert shares(3) == [(3, 1)] * 3
    assert shares(5) == [(2, 1), (1, 1), (2, 1), (1, 1), (3, 1)]


def test_more_ranks_than_heads_names_the_knob():
    with pytest.raises(ValueError, match="tensor_parallel_size 10 is more than the model's 9 attention heads"):
        cut_heads(9, 3, shard=0, size=10)


@given(st.integers(1, 3000), st.integers(1, 16), st.sampled_from([1, 32, 256]))
def test_no_rank_is_left_without_mlp_columns(columns, size, unit):
    if size > columns:
        with pytest.raises(ValueError, match="tensor_parallel_size"):
            cut_mlp(columns, shard=0, size=size, unit=unit)
        return
    parts = [cut_mlp(columns, shard=shard, size=size, unit=unit) for shard in range(size)]
    assert covers(parts, columns)
    assert all(length(part) for part in parts)


def test_vocabulary_that_nothing_divides():
    assert [length(cut_vocab(50257, shard=shard, size=4)) for shard in range(4)] == [12565, 12564, 12564, 12564]
