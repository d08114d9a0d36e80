"""Captured steps against eager ones, on a CPU: a recorder stands in for CUDA and replays by calling the function.

What a graph must not do shows here as well: `AsOnDevice` reads lengths from tensors, as kernels do, and the graph's
batch tells it others; a replay reads and writes the same memory as the capture.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.kernels.ops import AttentionBatch, AttentionSpec, KVLayer
from shoal.kernels.reference import ReferenceOps
from shoal.parallel.group import Begun
from shoal.runtime.ahead import LastTokens, Recall
from shoal.runtime.batch import SequenceTable, StepBatch
from shoal.runtime.errors import StartupError
from shoal.runtime.generation import SamplingParams
from shoal.runtime.graphs import Capture, GraphRunner, graph_sizes
from shoal.runtime.loader import load_decoder
from shoal.runtime.models.decoder import Decoder
from shoal.runtime.plan import Admission, Slice, StepPlan, StepResult
from shoal.runtime.runner import EagerRunner, Runner
from shoal.runtime.sampler import Sampler
from shoal.runtime.upload import ALIGN, PackedUpload, tensors_of
from shoal.runtime.worker import Drawn, Known, ModelWorker

from ..random_model import HEAD_DIM, KV_HEADS, RandomCheckpoint, random_spec

CPU = torch.device("cpu")
SLOTS, PAGE, MAX_LEN = 12, 16, 64
PAGES_A_SLOT = MAX_LEN // PAGE
SPEC = random_spec(max_len=MAX_LEN)


class AsOnDevice(ReferenceOps):
    """Lengths are what the tensors say, whatever the host believes."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.seen: tuple[int, ...] = ()  # the lengths of the last call

    def attention(
        self, q_THE: Tensor, cache: KVLayer, batch: AttentionBatch, spec: AttentionSpec, **more: Tensor | None
    ) -> Tensor:
        starts = batch.query_start_S1.tolist()
        query_lens = tuple(end - start for start, end in pairwise(starts))
        self.seen = tuple(batch.kv_lens_S.tolist())
        batch = replace(batch, query_lens=query_lens, kv_lens=self.seen)
        return super().attention(q_THE, cache, batch, spec, **more)


class Recorder:
    """Stands in for CUDA graphs, and counts."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        launch()
        launch()

        def replay() -> None:
            self.replayed += 1
            launch()

        return replay


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_cache(num_layers: int = SPEC.num_layers) -> list[KVLayer]:
    shape = (1 + SLOTS * PAGES_A_SLOT, KV_HEADS, PAGE, HEAD_DIM)
    return [KVLayer(torch.zeros(shape), torch.zeros(shape)) for _ in range(num_layers)]


def make_decoder(layers: range | None = None, *, ops: ReferenceOps | None = None) -> Decoder:
    ops = ops or AsOnDevice()
    return load_decoder(RandomCheckpoint(SPEC), SPEC, ops=ops, dtype=torch.float32, max_len=MAX_LEN, layers=layers)


def graph_runner(
    decoder: Decoder,
    cache: list[KVLayer],
    recorder: Capture,
    *,
    max_rows: int = SLOTS,
    recall: Recall | None = None,
) -> GraphRunner:
    return GraphRunner(
        decoder,
        cache,
        eager=EagerRunner(decoder, cache, recall=recall),
        capture=recorder,
        draw=ReferenceOps(CPU).sample,
        max_rows=max_rows,
        max_model_len=MAX_LEN,
        device=CPU,
        recall=recall,
    )


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=0.9, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.1, top_k=20, top_p=0.9),
]


LOOKED_AT = [SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.8, repetition_penalty=1.3)]


@dataclass
class Running:
    slot: int
    computed: int
    known: int


class Rank:
    """A table and a runner, driven as the worker drives them."""

    def __init__(self, runner: Runner, cache: list[KVLayer]) -> None:
        self.table = SequenceTable(num_slots=SLOTS, max_model_len=MAX_LEN, block_size=PAGE)
        self.runner = runner
        self.cache = cache

    def step(self, plan: StepPlan) -> tuple[list[int], Tensor]:
        """The tokens it draws and their logits."""
        self.table.apply(plan)
        batch = self.runner.upload(self.table.batch(plan.slices))
        hidden_TD = self.runner.layers(self.runner.embed(batch), batch)
        logits_RV = self.runner.row_logits(hidden_TD, batch)
        drawn_R = self.runner.drawn(batch)
        tokens_R = ReferenceOps(CPU).sample(logits_RV, batch.sampling) if drawn_R is None else drawn_R
        self.table.append(batch.slots, batch.next_positions, tokens_R.numpy())
        return tokens_R.tolist(), logits_RV.clone()


def random_plans(
    seed: int, *, steps: int, params: Sequence[SamplingParams] = PARAMS, fewest: int = 0, leaving: float = 0.03
) -> Iterator[StepPlan]:
    """Sequences come, are computed in chunks, decode in changing company, and leave their pages to the next.

    fewest: slices of a plan while there are sequences. leaving: share of the sequences that end with a step.
    """
    rng = random.Random(seed)
    running: list[Running] = []
    for step in range(steps):
        free = [slot for slot in range(SLOTS) if slot not in {sequence.slot for sequence in running}]
        admissions, blocks = [], []
        if free and rng.random() < 0.5:
            slot, num = rng.choice(free), rng.randint(1, 30)
            tokens = [rng.randrange(SPEC.vocab_size) for _ in range(num)]
            admissions.append(Admission(slot, tokens, num, rng.choice(params), rng.randrange(1 << 40), []))
            pages = list(range(1 + slot * PAGES_A_SLOT, 1 + (slot + 1) * PAGES_A_SLOT))
            rng.shuffle(pages)
            blocks.append((slot, pages))
            running.append(Running(slot, 0, num))
        slices = []
        for sequence in rng.sample(running, rng.randint(min(fewest, len(running)), len(running))):
            count = min(sequence.known - sequence.computed, rng.randint(1, 20))
            sequence.computed += count
            samples = sequence.computed == sequence.known
            sequence.known += samples
            slices.append(Slice(sequence.slot, sequence.computed - count, count, samples))
        running = [sequence for sequence in running if sequence.known < MAX_LEN and rng.random() > leaving]
        if slices or admissions:
            yield StepPlan(step, admissions, blocks, sorted(slices, key=lambda part: part.count > 1))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_logits_and_cache_are_those_of_eager_steps(seed: int) -> None:
    decoder, recorder = make_decoder(), Recorder()
    caches = make_cache(), make_cache()
    eager = Rank(EagerRunner(decoder, caches[0]), caches[0])
    graphs = Rank(graph_runner(decoder, caches[1], recorder, max_rows=8), caches[1])
    drawn = 0
    for plan in random_plans(seed, steps=120):
        if not plan.slices:
            for rank in (eager, graphs):
                rank.table.apply(plan)
            continue
        (expected, expected_RV), (found, found_RV) = eager.step(plan), graphs.step(plan)
        assert found == expected
        torch.testing.assert_close(found_RV, expected_RV, rtol=1e-4, atol=1e-4)
        drawn += len(found)
    for theirs, ours in zip(caches[0], caches[1], strict=True):
        torch.testing.assert_close(ours.k_NKBE, theirs.k_NKBE, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.v_NKBE, theirs.v_NKBE, rtol=1e-4, atol=1e-4)
    assert drawn > 100
    assert recorder.replayed > 20
    assert recorder.captured <= len(graph_sizes(8))


@pytest.mark.parametrize("launches", ["eager", "graphs"])
@pytest.mark.parametrize("seed", range(3))
def test_steps_launched_before_the_last_token_is_known_draw_the_same(seed: int, launches: str) -> None:
    """Two plans in flight, while slots change hands; some rows are penalised or want log-probabilities."""
    decoder, caches = make_decoder(), (make_cache(), make_cache())
    sampler = partial(Sampler, ReferenceOps(CPU), SPEC.vocab_size)
    runner: Runner = EagerRunner(decoder, caches[0])
    table = new_table()
    one_by_one = ModelWorker(table=table, runner=runner, entry=Known(runner), exit=Drawn(runner, table, sampler()))
    recall = LastTokens(SLOTS, CPU)
    runner = EagerRunner(decoder, caches[1], recall=recall)
    if launches == "graphs":
        runner = graph_runner(decoder, caches[1], Recorder(), recall=recall)
    table = new_table()
    ahead_of = Drawn(runner, table, sampler(), recall)
    ahead = ModelWorker(table=table, runner=runner, entry=Known(runner), exit=ahead_of)
    expected, found, under_way = [], [], deque[Begun[StepResult]]()
    for plan in random_plans(seed, steps=300, params=[*PARAMS * 3, LOOKED_AT[seed % 2]], fewest=1, leaving=0.15):
        expected.append(one_by_one.begin(plan).result())
        under_way.append(ahead.begin(plan))
        if len(under_way) == 2:
            found.append(under_way.popleft().result())
    found.append(under_way.popleft().result())
    assert [(r.step, r.tokens) for r in found] == [(r.step, r.tokens) for r in expected]
    assert [len(r.logprobs or []) for r in found] == [len(r.logprobs or []) for r in expected]
    assert sum(len(r.tokens) for r in found) > 100


def decoding(table: SequenceTable, slots: list[int], *, length: int = 5) -> StepBatch:
    """A batch of rows that decode the token at `length`; what came before it is not in the cache."""
    pages = {slot: [1 + slot * PAGES_A_SLOT] for slot in slots}
    admissions = [Admission(slot, [slot] * (length + 1), length + 1, PARAMS[0], 0, []) for slot in slots]
    table.apply(StepPlan(0, admissions, list(pages.items()), []))
    return table.batch([Slice(slot, length, 1, True) for slot in slots])


def new_table() -> SequenceTable:
    return SequenceTable(num_slots=SLOTS, max_model_len=MAX_LEN, block_size=PAGE)


def test_a_capture_writes_nothing_for_the_step_before_it() -> None:
    cache, recorder = make_cache(), Recorder()
    runner, table = graph_runner(make_decoder(), cache, recorder), new_table()
    batch = runner.upload(decoding(table, [0, 1]))
    runner.layers(runner.embed(batch), batch)
    for layer in cache:  # the pages go to others
        layer.k_NKBE.fill_(9.0)
    runner.upload(decoding(table, [2, 3, 4, 5]))
    assert recorder.captured == 2
    assert all((layer.k_NKBE == 9.0).all() for layer in cache)


def test_a_step_takes_the_next_larger_graph_and_its_spare_rows_read_nothing() -> None:
    cache, recorder, ops = make_cache(), Recorder(), AsOnDevice()
    runner, table = graph_runner(make_decoder(ops=ops), cache, recorder), new_table()
    for rows, size in ((8, 8), (5, 8), (4, 4), (3, 4), (1, 1)):
        batch = runner.upload(decoding(table, list(range(rows))))
        runner.layers(runner.embed(batch), batch)
        assert ops.seen == (6,) * rows + (0,) * (size - rows)


def test_prepared_graphs_are_not_captured_again() -> None:
    cache, recorder = make_cache(), Recorder()
    runner, table = graph_runner(make_decoder(), cache, recorder), new_table()
    runner.prepare(show=False)
    assert recorder.captured == len(graph_sizes(SLOTS))
    assert not any(layer.k_NKBE.any() for layer in cache)
    for rows in (1, 3, SLOTS):
        batch = runner.upload(decoding(table, list(range(rows))))
        runner.layers(runner.embed(batch), batch)
    assert recorder.captured == len(graph_sizes(SLOTS))
    assert recorder.replayed == 3


def test_a_failed_capture_names_the_flag_that_does_without() -> None:
    def fails(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("out of memory\nand much more")

    cache = make_cache()
    runner = graph_runner(make_decoder(), cache, fails)
    with pytest.raises(StartupError, match=r"12 rows .*\(out of memory\): use --enforce-eager .*--max-num-seqs \(12\)"):
        runner.prepare(show=False)


def test_steps_that_no_graph_fits_run_eagerly() -> None:
    cache, recorder = make_cache(), Recorder()
    runner, table = graph_runner(make_decoder(), cache, recorder, max_rows=4), new_table()
    decoding(table, [0, 1, 2, 3, 4])
    too_many = [Slice(slot, 5, 1, True) for slot in range(5)]
    prompt = [Slice(0, 5, 1, True), Slice(1, 2, 3, True)]
    in_mid_prompt = [Slice(0, 5, 1, True), Slice(1, 2, 1, False)]  # a chunk of one token draws nothing
    for slices in (too_many, prompt, in_mid_prompt):
        batch = runner.upload(table.batch(slices))
        hidden_TD = runner.layers(runner.embed(batch), batch)
        assert runner.row_logits(hidden_TD, batch).shape[0] == sum(part.samples for part in slices)
        assert runner.drawn(batch) is None
    assert recorder.captured == recorder.replayed == 0


def test_stages_in_a_row_are_the_whole_model() -> None:
    whole_cache, table = make_cache(), new_table()
    whole = EagerRunner(make_decoder(), whole_cache)
    parts = [range(1), range(1, SPEC.num_layers)]
    first, last = (graph_runner(make_decoder(part), make_cache(len(part)), Recorder()) for part in parts)
    for slots in ([0, 1, 2], [3], [4, 0, 5, 6, 7]):
        batch = decoding(table, slots)
        expected = whole.row_logits(whole.layers(whole.embed(batch), batch), batch)
        ours = first.upload(batch)
        sent = first.layers(first.embed(ours), ours)
        assert first.drawn(ours) is None
        theirs = last.upload(batch)
        found = last.row_logits(last.layers(sent.clone(), theirs), theirs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        drawn = last.drawn(theirs)
        assert drawn is not None
        assert drawn.tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_sizes_of_few_rows(most: int, expected: list[int]) -> None:
    assert graph_sizes(most) == expected


@pytest.mark.parametrize("most", [256, 1000, 4096])
def test_sizes_end_at_the_most_and_waste_little(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most
    assert all(a < b <= max(2 * a, 16, a + 8, a * 9 / 8) for a, b in pairwise(sizes))
    assert {16, 24, 64, 128} <= set(sizes)


def test_a_packed_batch_is_the_same_batch_in_one_piece_of_memory() -> None:
    table, upload = new_table(), PackedUpload(CPU, num_bytes=512)
    decoding(table, [0, 1, 2], length=20)
    batches = [table.batch([Slice(0, 20, 1, True), Slice(1, 4, 17, True), Slice(2, 0, 3, False)]), decoding(table, [3])]
    sent = [upload(batch) for batch in batches]  # the second fills the same staging memory
    for batch, copy in zip(batches, sent, strict=True):
        pairs = list(zip(tensors_of(batch), tensors_of(copy), strict=True))
        pairs.append((batch.attention.block_table_SP, copy.attention.block_table_SP))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        assert all(b.data_ptr() % ALIGN == 0 for _, b in pairs)
        assert len({b.untyped_storage().data_ptr() for _, b in pairs}) == 1
        assert (copy.slots, copy.attention.kv_lens) == (batch.slots, batch.attention.kv_lens)
        assert np.array_equal(copy.next_positions, batch.next_positions)
