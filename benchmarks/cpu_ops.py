"""What the CPU's operations cost at SmolLM2-135M's shapes: C++ kernels, torch with care, and the plain reference.

    python benchmarks/cpu_ops.py [--threads N]

Random weights: no model is needed. Times are minima; on a busy machine read the ratios.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.cpu import CpuOps
from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.native import Native, load_native
from shoal.kernels.ops import Activation, AttentionBatch, AttentionSpec, KVLayer, SamplingBatch
from shoal.kernels.reference import ReferenceOps
from shoal.parallel.native import NativeInt4Linear
from shoal.parallel.quant import DenseLinear, Int4Linear, LinearMethod, _read_q4_blocks, probe_int4_layout

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
HIDDEN, MLP, HEADS, KV_HEADS, DIM, VOCAB, PAGE, PAGES = 576, 1536, 9, 3, 64, 49152, 16, 2048
LINEARS = [((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * MLP, HIDDEN), (HIDDEN, MLP)]
LAYERS = 30

AllOps = dict[str, ReferenceOps]


def best_us(call: Callable[[], object], seconds: float = 0.3) -> float:
    """The fastest of the calls that fit into `seconds`, in microseconds."""
    call()
    end, best = time.perf_counter() + seconds, float("inf")
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def compare(name: str, calls: dict[str, Callable[[], object]]) -> None:
    times = {who: best_us(call) for who, call in calls.items()}
    print(f"{name:44s}", "   ".join(f"{who} {time:10.1f} us" for who, time in times.items()))


def make_batch(query_lens: list[int], kv_lens: list[int]) -> AttentionBatch:
    counts = [-(-kv // PAGE) for kv in kv_lens]
    table = torch.zeros(len(kv_lens), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.randperm(PAGES)[: sum(counts)].split(counts), strict=True):
        row[: len(pages)] = pages
    return AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32),
        block_table_SP=table,
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
    )


def attention_rows(all_ops: AllOps) -> None:
    cache = KVLayer(*(torch.randn(PAGES, KV_HEADS, PAGE, DIM).to(DTYPE) for _ in range(2)))
    spec = AttentionSpec(scale=DIM**-0.5)
    ragged = [50 + 12 * i for i in range(32)]
    steps: dict[str, tuple[list[int], list[int]]] = {
        "1 sequence of 100": ([1], [100]),
        "1 sequence of 500": ([1], [500]),
        "8 sequences of 300": ([1] * 8, [300] * 8),
        "32 sequences of 300": ([1] * 32, [300] * 32),
        "32 sequences of 50 to 422": ([1] * 32, ragged),
        "prompt of 512": ([512], [512]),
        "256 tokens after 256": ([256], [512]),
    }
    for name, (query_lens, kv_lens) in steps.items():
        batch = make_batch(query_lens, kv_lens)
        q = torch.randn(sum(query_lens), HEADS, DIM).to(DTYPE)
        compare(f"attention, {name}", {who: partial(o.attention, q, cache, batch, spec) for who, o in all_ops.items()})


def small_rows(all_ops: AllOps, tokens: int) -> None:
    x, residual = torch.randn(tokens, HIDDEN).to(DTYPE), torch.zeros(tokens, HIDDEN)
    weight, table = torch.rand(HIDDEN), torch.randn(1024, DIM)
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM).to(DTYPE)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
    gate_up = torch.randn(tokens, 2 * MLP).to(DTYPE)
    cache = KVLayer(*(torch.zeros(PAGES, KV_HEADS, PAGE, DIM, dtype=DTYPE) for _ in range(2)))
    positions = torch.arange(tokens)

    calls: dict[str, Callable[[ReferenceOps], object]] = {
        "add and RMS norm": lambda ops: ops.add_rms_norm(x, residual, weight, eps=1e-5),
        "rope": lambda ops: ops.rope(q, k, positions, table, interleaved=False),
        "write_kv": lambda ops: ops.write_kv(k, v, cache, positions),
        "SwiGLU": lambda ops: ops.gated_activation(gate_up, Activation.SILU),
    }
    for name, call in calls.items():
        compare(f"{name}, {tokens} tokens", {who: partial(call, ops) for who, ops in all_ops.items()})


def q4_layer(native: Native | None, blocks: NDArray[np.uint8], in_features: int) -> LinearMethod:
    if native is not None:
        return NativeInt4Linear(native, partial(_read_q4_blocks, "Q4_1"), [blocks], in_features)
    layout = probe_int4_layout()
    assert layout is not None, "torch packs int4 in a way we do not know on this CPU"
    return Int4Linear("Q4_1", [blocks], in_features, layout)


def linear_rows(native: Native | None) -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 100, (n, k // 32 * 20), np.uint8) for n, k in LINEARS]
    layers: dict[str, list[LinearMethod]] = {
        who: [q4_layer(how, b, k) for _ in range(LAYERS) for b, (_, k) in zip(blocks, LINEARS, strict=True)]
        for who, how in {"native": native, "torch": None}.items()
        if who == "torch" or how is not None
    }
    layers["dense"] = [DenseLinear(torch.randn(n, k).to(DTYPE)) for _ in range(LAYERS) for n, k in LINEARS]
    for tokens in (1, 8, 32, Int4Linear.UNPACK_FROM - 1, Int4Linear.UNPACK_FROM, 512):
        inputs = {k: torch.randn(tokens, k).to(DTYPE) for _, k in LINEARS}

        def run(methods: list[LinearMethod], inputs: dict[int, torch.Tensor] = inputs) -> None:
            for method in methods:
                method.apply(inputs[method.in_features])

        name = f"linears of {LAYERS} layers, {tokens} tokens (bf16)"
        compare(name, {who: partial(run, methods) for who, methods in layers.items()})


def sampling_rows(all_ops: AllOps) -> None:
    for rows in (1, 32):
        logits = torch.randn(rows, VOCAB).to(DTYPE) * 3
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 1.0, 0, 1.0),
            ("top-k 40", 1.0, 40, 1.0),
            ("top-p 0.9", 0.7, 0, 0.9),
            ("top-k 50, top-p 0.9", 1.0, 50, 0.9),
        ):
            sampling = SamplingBatch(
                temperature_R=torch.full((rows,), temperature),
                top_k_R=torch.full((rows,), top_k, dtype=torch.int32),
                top_p_R=torch.full((rows,), top_p),
                min_p_R=torch.zeros(rows),
                seed_R=torch.arange(rows),
                position_R=torch.arange(rows),
                all_greedy=temperature == 0,
                any_top_k=top_k > 0,
                any_top_p=top_p < 1,
                any_min_p=False,
            )
            calls = {who: partial(ops.sample, logits, sampling) for who, ops in all_ops.items() if who != "native"}
            compare(f"sample {rows} x {VOCAB}, {name}", calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    native = load_native()
    all_ops: AllOps = {"torch": CpuOps(CPU), "plain": ReferenceOps(CPU)}
    if native is not None:
        all_ops = {"native": NativeCpuOps(CPU, native), **all_ops}
    with torch.inference_mode():
        for tokens in (1, 32, 512):
            small_rows(all_ops, tokens)
        attention_rows(all_ops)
        linear_rows(native)
        sampling_rows(all_ops)


if __name__ == "__main__":
    main()
