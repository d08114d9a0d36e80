"""An engine whose steps are launched before the last one's tokens are known, against one that waits for each.

On a CPU a step is computed when it is launched; that nobody looks at its tokens before they are collected is as on a
device. The steps of captured graphs are in test_graphs.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.parallel.comm import SoloComm
from shoal.parallel.grid import Grid
from shoal.parallel.group import LocalGroup
from shoal.runtime.blocks import BlockPool
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.policy import select_policy
from shoal.runtime.rank import Rank, RankSpec, build_worker, open_checkpoint
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.share import deal

from ..models.support import TINY, randomise
from .device_rank import DIARY
from .test_poison import engine_over, run

MAX_LEN, BLOCK, VOCAB = 128, 16, int(TINY["vocab_size"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **TINY | {"max_position_embeddings": MAX_LEN, "num_hidden_layers": 2})
    )
    randomise(model)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Rank]:
    """Of depth 1 and 2."""
    return [make_rank(folder, depth) for depth in (1, 2)]


def make_rank(folder: Path, depth: int) -> Rank:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        block_size=BLOCK,
        kv_cache_memory_gb=0.05,
        num_threads=1,
        deterministic=True,
    )
    spec = ModelSpec.from_config(open_checkpoint(folder).config)
    rank_spec = RankSpec.of(config, model_path=folder, spec=spec, depth=depth)
    return build_worker(rank_spec, deal(spec, Grid(1, 1))[0], comm=SoloComm(), ring=None)


def requests() -> list[GenerationRequest]:
    """Greedy and sampled; some that somebody must look at each step; some that stop early, where a row is in vain."""
    generator = torch.Generator().manual_seed(3)
    asked = [
        SamplingParams(temperature=0.0, max_tokens=40),
        SamplingParams(temperature=1.0, max_tokens=40, stop_token_ids=list(range(0, VOCAB, 9))),
        SamplingParams(temperature=1.0, max_tokens=1),
        SamplingParams(temperature=0.9, top_k=20, max_tokens=30),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=20),
        SamplingParams(temperature=0.7, logprobs=2, max_tokens=15),
        SamplingParams(temperature=1.0, prompt_logprobs=1, max_tokens=25),
        SamplingParams(temperature=1.0, min_tokens=8, stop_token_ids=list(range(0, VOCAB, 4)), max_tokens=30),
        SamplingParams(temperature=1.0, top_p=0.8, max_tokens=40),
        SamplingParams(temperature=1.1, min_p=0.05, max_tokens=50),
    ]
    return [
        GenerationRequest(
            id=str(i),
            prompt=torch.randint(3, VOCAB, (5 + 7 * i,), generator=generator).tolist(),
            params=params,
            seed=i,
        )
        for i, params in enumerate(asked)
    ]


class Run:
    """All the events of each log, with an abort of `left` after its third token."""

    def __init__(self, rank: Rank, *, depth: int, blocks: int, left: str = "9") -> None:
        limits = Limits(
            max_model_len=MAX_LEN,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            max_queued=100,
            vocab_size=VOCAB,
            prefix_caching=False,
        )
        self.scheduler = Scheduler(
            limits,
            pool=BlockPool(blocks, block_size=BLOCK),
            policy=select_policy("fcfs"),
            clock=time.monotonic,
            secret=b"0" * 32,
        )
        engine = Engine(self.scheduler, LocalGroup(rank.worker, depth=depth))
        self.events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests()}
        for request in requests():
            engine.add(request)
        self.most_in_flight = 0
        while engine.has_work:
            for event in engine.step():
                self.events[event.id].append(event)
            self.most_in_flight = max(self.most_in_flight, len(engine._in_flight))
            self.scheduler.check()
            if len(self.tokens(left)) >= 3 and self.reason(left) is None:
                last = engine.abort(left)
                assert last is not None
                self.events[left].append(last)

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events[name] for token in event.tokens]

    def reason(self, name: str) -> FinishReason | None:
        return self.events[name][-1].finish_reason if self.events[name] else None


@pytest.mark.parametrize("blocks", [100, 9], ids=["room", "preempted"])
def test_logs_are_the_same(ranks: list[Rank], blocks: int) -> None:
    waiting, ahead = (Run(rank, depth=depth, blocks=blocks) for depth, rank in enumerate(ranks, 1))
    assert ahead.most_in_flight == 1, "behind the one collected another one is under way"
    assert waiting.most_in_flight == 0
    for name in waiting.events:
        if name != "9":
            assert ahead.tokens(name) == waiting.tokens(name)
            assert ahead.reason(name) == waiting.reason(name)
    both = min(len(ahead.tokens("9")), len(waiting.tokens("9")))
    assert ahead.tokens("9")[:both] == waiting.tokens("9")[:both]
    assert {waiting.reason(name) for name in waiting.events} >= {FinishReason.STOP, FinishReason.LENGTH}
    assert ahead.reason("9") is FinishReason.ABORT
    if blocks == 9:
        assert ahead.scheduler.counters.preemptions
    assert ahead.scheduler.pool.num_free == blocks


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2)], ids=str)
def test_ranks_launch_a_step_before_the_last_one_is_over(folder: Path, grid: Grid, tmp_path: Path) -> None:
    """Real processes, whose steps take a while to be over, against such as wait for each."""
    found = []
    for factory in ("shoal.runtime.rank:start_rank", "device_rank:start"):
        engine = engine_over(folder, factory, grid, **{DIARY: str(tmp_path)})
        try:
            found.append(run(engine, requests()))
        finally:
            engine.close()
    assert found[0] == found[1]
    assert {reason for _, reason in found[0].values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert all(int(file.read_text()) >= 2 for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == grid.size
