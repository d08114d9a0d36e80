"""`--deterministic`, observed from outside: a generation's tokens and logprobs are the same bits whatever befalls it.

The undisturbed run is the one that decodes alone. Others share the batch, are preempted and computed again, come in
chunks, or find their prefix in the cache.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shoal.parallel.comm import SoloComm
from shoal.parallel.grid import Grid
from shoal.parallel.group import LocalGroup
from shoal.runtime.blocks import BlockPool
from shoal.runtime.config import EngineConfig
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams, TokenLogprob
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.plan import StepPlan, StepResult
from shoal.runtime.policy import select_policy
from shoal.runtime.rank import Rank, RankSpec, build_worker, open_checkpoint
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.share import deal

from ..models.support import TINY, randomise

MAX_LEN, BLOCK = 192, 16
Log = tuple[list[int], list[TokenLogprob]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Rank]:
    """A rank around a tiny random model of a family, in a dtype."""
    built: dict[tuple[str, str], Rank] = {}

    def make(family: str, dtype: str) -> Rank:
        from transformers import AutoConfig, AutoModelForCausalLM

        if (family, dtype) not in built:
            sizes = TINY | {"max_position_embeddings": MAX_LEN, "sliding_window": 50, "num_hidden_layers": 2}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
            randomise(model)
            model.tie_weights()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            built[family, dtype] = make_rank(folder, dtype)
        return built[family, dtype]

    return make


def make_rank(folder: Path, dtype: str) -> Rank:
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,  # type: ignore[arg-type]
        device="cpu",
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        kv_cache_memory_gb=0.05,
        num_threads=1,
        deterministic=True,
    )
    spec = ModelSpec.from_config(open_checkpoint(folder).config)
    rank_spec = RankSpec.of(config, model_path=folder, spec=spec, depth=1)
    return build_worker(rank_spec, deal(spec, Grid(1, 1))[0], comm=SoloComm(), ring=None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Run:
    """An engine around a rank that outlives it."""

    def __init__(self, rank: Rank, *, chunk: int = 2048, blocks: int | None = None, prefixes: bool = False) -> None:
        limits = Limits(
            max_model_len=MAX_LEN,
            max_num_seqs=16,
            max_num_batched_tokens=chunk,
            max_queued=100,
            vocab_size=int(TINY["vocab_size"]),
            prefix_caching=prefixes,
        )
        scheduler = Scheduler(
            limits,
            pool=BlockPool(blocks or rank.memory.num_blocks, block_size=BLOCK),
            policy=select_policy("fcfs"),
            clock=time.monotonic,
            secret=b"0" * 32,
        )
        group: LocalGroup[StepPlan, StepResult] = LocalGroup(rank.worker)
        self.engine = Engine(scheduler, group)

    def logs(self, requests: list[GenerationRequest]) -> list[Log]:
        """All of them at once, to their ends."""
        found: dict[str, Log] = {request.id: ([], []) for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for event in self.engine.step():
                found[event.id][0].extend(event.tokens)
                found[event.id][1].extend(event.logprobs or [])
                assert event.error is None
        return list(found.values())


def make_requests(count: int, *, longest: int, tokens: int) -> list[GenerationRequest]:
    """Prompts of 1 to `longest` tokens; every second one is sampled."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(longest, 1, count).int().tolist()
    return [
        GenerationRequest(
            id=f"r{i}",
            prompt=torch.randint(3, 101, (length,), generator=generator).tolist(),
            params=SamplingParams(temperature=float(i % 2), max_tokens=tokens, ignore_eos=True, logprobs=3),
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


MODELS = [("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "float32"), ("phi", "bfloat16")]


@pytest.fixture(params=MODELS, ids=["-".join(model) for model in MODELS])
def rank(request: pytest.FixtureRequest, build: Callable[[str, str], Rank]) -> Rank:
    return build(*request.param)


def test_bits_are_the_same_whatever_else_happens(rank: Rank) -> None:
    requests = make_requests(16, longest=140, tokens=24)
    alone = [Run(rank).logs([request])[0] for request in requests]
    assert [len(tokens) for tokens, _ in alone] == [24] * 16
    assert [len(logprobs) for _, logprobs in alone] == [24] * 16

    assert Run(rank).logs(requests) == alone, "in a batch"
    for chunk in (7, 24):
        assert Run(rank, chunk=chunk).logs(requests[::3]) == alone[::3], f"in chunks of {chunk}"
    assert Run(rank, chunk=1).logs(requests[-3:]) == alone[-3:], "token by token"

    tight = Run(rank, chunk=64, blocks=11)
    assert tight.logs(requests) == alone, "preempted"
    assert tight.engine.stats().preemptions > 0

    caching = Run(rank, prefixes=True)
    assert caching.logs(requests) == alone, "cold cache"
    assert caching.logs(requests) == alone, "prefixes from the cache"
    assert caching.engine.stats().prefix_hit_tokens > 0


def test_a_log_goes_on_where_it_was_cut(rank: Rank) -> None:
    """Resume: what was decoded is prefilled."""
    request = make_requests(1, longest=100, tokens=40)[0]
    tokens, logprobs = Run(rank).logs([request])[0]
    for cut in (1, 28, 29, 39):
        rest = SamplingParams(temperature=0, max_tokens=40 - cut, ignore_eos=True, logprobs=3)
        resumed = GenerationRequest(id="rest", prompt=request.prompt + tokens[:cut], params=rest, seed=0)
        assert Run(rank).logs([resumed])[0] == (tokens[cut:], logprobs[cut:])
