"""A captured decode step over the Triton kernels: what they read of a step they read from tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.ops import AttentionBatch, KVLayer, SamplingBatch
from shoal.kernels.reference import ReferenceOps
from shoal.kernels.triton_ops import TritonOps
from shoal.parallel.vocab import vocab_ops
from shoal.runtime.ahead import LastTokens
from shoal.runtime.batch import StepBatch
from shoal.runtime.graphs import GraphRunner, cuda_capture
from shoal.runtime.loader import load_decoder
from shoal.runtime.runner import EagerRunner
from shoal.runtime.upload import select_upload

from ..one_of_two import OneOfTwo
from ..random_model import HEAD_DIM, KV_HEADS, RandomCheckpoint, random_spec

PAGE, PAGES, MAX_LEN = 16, 4, 64
SPEC = random_spec(num_layers=1, max_len=MAX_LEN)


def decoding(lens: list[int]) -> StepBatch:
    """Rows whose sequences have these lengths, the last token being new; half of them sample with filters."""
    rows = len(lens)
    lens_S = torch.tensor(lens, dtype=torch.int32)
    table = torch.arange(rows * PAGES, dtype=torch.int32).view(rows, PAGES).flip(1).contiguous()
    last = lens_S.long() - 1
    warm = torch.arange(rows) % 2 == 1
    return StepBatch(
        token_ids_T=torch.arange(rows) + 3,
        positions_T=last,
        kv_slots_T=table.gather(1, last[:, None] // PAGE).long()[:, 0] * PAGE + last % PAGE,
        attention=AttentionBatch(
            query_start_S1=torch.arange(rows + 1, dtype=torch.int32),
            kv_lens_S=lens_S,
            block_table_SP=table,
            num_decodes=rows,
            max_query_len=1,
            max_kv_len=max(lens),
            query_lens=(1,) * rows,
            kv_lens=tuple(lens),
        ),
        seq_slots_T=torch.arange(rows),
        rows_R=torch.arange(rows),
        slots=list(range(rows)),
        next_positions=lens_S.numpy(),
        sampling=SamplingBatch(
            temperature_R=warm.float(),
            top_k_R=warm.int() * 7,
            top_p_R=torch.ones(rows),
            min_p_R=torch.zeros(rows),
            seed_R=torch.arange(rows),
            position_R=lens_S.long(),
            all_greedy=rows == 1,
            max_top_k=7 if rows > 1 else 0,
            any_top_p=False,
            any_min_p=False,
        ),
    )


@torch.inference_mode()
def test_padded_steps_draw_the_tokens_of_eager_ones(ops: TritonOps, reference: ReferenceOps) -> None:
    runners = []
    for chosen in (ops, reference):
        decoder = load_decoder(RandomCheckpoint(SPEC), SPEC, ops=chosen, dtype=torch.float32, max_len=MAX_LEN)
        generator = torch.Generator().manual_seed(1)
        shape = (3 * PAGES, KV_HEADS, PAGE, HEAD_DIM)
        cache = [KVLayer(*(torch.randn(shape, generator=generator).to(ops.device) for _ in range(2)))]
        runners.append((EagerRunner(decoder, cache, upload=select_upload(ops.device)), decoder, cache))
    (eager, decoder, cache), (plain, _, plain_cache) = runners
    graphs = GraphRunner(
        decoder,
        cache,
        eager=eager,
        capture=cuda_capture() if ops.device.type == "cuda" else lambda launch: launch,
        draw=ops.sample,
        max_rows=4,
        max_model_len=MAX_LEN,
        device=ops.device,
    )
    for lens in ([30, 1, 64], [17], [31, 2], [16, 3, 50]):
        batch = graphs.upload(decoding(lens))
        hidden_TD = graphs.layers(graphs.embed(batch), batch)
        tokens_R = graphs.drawn(batch)
        expected = plain.upload(decoding(lens))
        expected_TD = plain.layers(plain.embed(expected), expected)
        logits_RV = plain.row_logits(expected_TD, expected)
        torch.testing.assert_close(hidden_TD, expected_TD, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(graphs.row_logits(hidden_TD, batch), logits_RV, rtol=1e-3, atol=1e-3)
        assert tokens_R is not None
        assert torch.equal(tokens_R, reference.sample(logits_RV, expected.sampling))
    torch.testing.assert_close(cache[0].k_NKBE, plain_cache[0].k_NKBE, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache[0].v_NKBE, plain_cache[0].v_NKBE, rtol=1e-4, atol=1e-4)


class Watch(TorchDispatchMode):
    """Notes every operation that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(func.name().removeprefix("aten::").partition(".")[0])
        return func(*args, **(kwargs or {}))


REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "scalar_tensor", "equal", "_unique2"}


@torch.inference_mode()
@pytest.mark.parametrize("max_top_k", [0, 40, 5000])
def test_shards_draw_without_a_look_at_any_value(max_top_k: int) -> None:
    """What would wait for the device, at each step."""
    if torch.cuda.is_available():
        pytest.skip("torch is watched on a CPU")
    ops, rows, vocab, watch = TritonOps(torch.device("cpu")), 3, 20_000, Watch()
    sampling = SamplingBatch(
        temperature_R=torch.tensor([0.0, 1.0, 0.7]),
        top_k_R=torch.tensor([0, 0, max_top_k], dtype=torch.int32),
        top_p_R=torch.tensor([1.0, 0.9, 1.0]),
        min_p_R=torch.tensor([0.0, 0.0, 0.1]),
        seed_R=torch.arange(rows),
        position_R=torch.arange(rows),
        all_greedy=False,
        max_top_k=max_top_k,
        any_top_p=True,
        any_min_p=True,
    )
    shard = vocab_ops(ops, vocab_size=vocab, comm=OneOfTwo(1))
    logits_RV = torch.randn(rows, vocab // 2)
    with watch:
        tokens_R = shard.sample(logits_RV, sampling)
    assert {"scatter_add_", "cumsum"} <= watch.seen
    assert not REFUSED & watch.seen
    assert (tokens_R >= vocab // 2).all()


@torch.inference_mode()
def test_a_captured_step_asks_for_no_value_and_brings_none() -> None:
    """What CUDA refuses to capture: waiting for the device, shapes that follow from values, tensors of the host's."""
    if torch.cuda.is_available():
        pytest.skip("the capture itself is tested there")
    ops = TritonOps(torch.device("cpu"))
    decoder = load_decoder(RandomCheckpoint(SPEC), SPEC, ops=ops, dtype=torch.float32, max_len=MAX_LEN)
    cache = [KVLayer(torch.zeros(9, KV_HEADS, PAGE, HEAD_DIM), torch.zeros(9, KV_HEADS, PAGE, HEAD_DIM))]
    recall, watch = LastTokens(4, ops.device), Watch()

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        launch()  # kernels are compiled outside a capture, too
        with watch:
            launch()
        return launch

    graphs = GraphRunner(
        decoder,
        cache,
        eager=EagerRunner(decoder, cache, recall=recall),
        capture=capture,
        draw=ops.sample,
        max_rows=4,
        max_model_len=MAX_LEN,
        device=ops.device,
        recall=recall,
    )
    graphs.prepare(show=False)
    assert {"embedding", "linear", "index_copy_"} <= watch.seen, "the step was not seen"
    assert not REFUSED & watch.seen
