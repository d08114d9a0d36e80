"""The rank's table and the batch read off it."""

import numpy as np
import torch

from shoal.runtime.batch import SequenceTable
from shoal.runtime.generation import SamplingParams
from shoal.runtime.plan import Admission, Slice, StepPlan

CPU = torch.device("cpu")


def table(*, block_size: int = 16) -> SequenceTable:
    return SequenceTable(num_slots=4, max_model_len=64, block_size=block_size)


def admission(slot: int, tokens: list[int], **params: object) -> Admission:
    return Admission(slot, tokens, len(tokens), SamplingParams(**params), 7, [])  # type: ignore[arg-type]


def test_mixed_step_has_decodes_first_and_reads_each_row_from_its_own_pages() -> None:
    sequences = table()
    first, second = list(range(100, 117)), list(range(200, 220))
    plan = StepPlan(
        0,
        [admission(2, first, temperature=0.0), admission(0, second, temperature=0.5, top_k=3)],
        [(2, [5, 9]), (0, [7, 1])],
        [Slice(2, 16, 1, True), Slice(0, 3, 15, False)],
    )
    sequences.apply(plan)
    batch = sequences.batch(plan.slices)
    assert batch.token_ids_T.tolist() == [116, *second[3:18]]
    assert batch.positions_T.tolist() == [16, *range(3, 18)]
    assert batch.kv_slots_T.tolist() == [9 * 16, *range(7 * 16 + 3, 7 * 16 + 16), 16, 17]
    assert batch.attention.query_start_S1.tolist() == [0, 1, 16]
    assert batch.attention.kv_lens_S.tolist() == [17, 18]
    assert batch.attention.num_decodes == 1
    assert batch.attention.block_table_SP.tolist() == [[5, 9], [7, 1]]
    assert (batch.rows_R.tolist(), batch.slots, batch.next_positions.tolist()) == ([0], [2], [17])
    assert batch.sampling.all_greedy
    assert batch.sampling.position_R.tolist() == [17]


def test_drawn_tokens_are_read_by_the_next_step_without_being_sent() -> None:
    sequences = table()
    sequences.apply(StepPlan(0, [admission(1, [3, 4])], [(1, [0])], []))
    sequences.append([1], np.array([2], np.int32), np.array([42]))
    assert sequences.batch([Slice(1, 2, 1, True)]).token_ids_T.tolist() == [42]


def test_an_admission_empties_the_slots_block_table() -> None:
    sequences = table()
    sequences.apply(StepPlan(0, [admission(1, [3] * 20)], [(1, [6, 7])], []))
    sequences.apply(StepPlan(1, [admission(1, [4] * 20)], [(1, [2]), (1, [3])], []))
    batch = sequences.batch([Slice(1, 0, 20, True)])
    assert batch.attention.block_table_SP.tolist() == [[2, 3]]
    assert batch.kv_slots_T.tolist() == [*range(32, 48), *range(48, 52)]


def test_the_last_token_of_a_full_context_has_a_place() -> None:
    sequences = table()
    sequences.apply(StepPlan(0, [admission(0, [1] * 64)], [(0, [0, 1, 2, 3])], []))
    batch = sequences.batch([Slice(0, 63, 1, True)])
    sequences.append(batch.slots, batch.next_positions, np.array([9]))
    assert sequences.tokens[0, 64] == 9
