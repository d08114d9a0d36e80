"""What the CPU's operations cost at SmolLM2-135M's shapes: C++ kernels, torch with care, and the plain reference.

    python benchmarks/cpu_ops.py [--threads N]

Random weights: no model is needed. Times are minima; on a busy machine read the ratios.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from shoal.kernels.cpu import CpuOps
from shoal.kernels.cpu_native import NativeCpuOps
from shoal.kernels.native import DecodeShape, Native, decode_shape, load_native
from shoal.kernels.native_layer import DecodeRows, NativeAttend, NativeMlp, PackedWeight
from shoal.kernels.ops import (
    Activation,
    AttentionBatch,
    AttentionSpec,
    HeadSpec,
    KVLayer,
    NormWeight,
    Rotation,
    SamplingBatch,
)
from shoal.kernels.reference import ReferenceOps
from shoal.parallel.codes import Codes, Kind
from shoal.parallel.int4 import Int4Linear, probe_int4_layout
from shoal.parallel.native import NativeInt4Linear, NativeInt8Linear
from shoal.parallel.native_head import NativeHead
from shoal.parallel.quant import DenseLinear, HalfLinear, LinearMethod

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


def make_codes(rows: int, columns: int, kind: Kind) -> Codes:
    scale_FG = torch.rand(rows, columns // 32) / 100
    if kind is Kind.INT8:
        return Codes(torch.randint(-128, 128, (rows, columns), dtype=torch.int8), scale_FG, None, 32, columns)
    return Codes(torch.randint(0, 16, (rows, columns), dtype=torch.uint8), scale_FG, scale_FG + 7, 32, columns)


def linear_makers(native: Native | None) -> dict[str, Callable[[int, int], LinearMethod]]:
    layout = probe_int4_layout()
    assert layout is not None, "torch packs int4 in a way we do not know on this CPU"
    makers: dict[str, Callable[[int, int], LinearMethod]] = {
        "torch 4-bit": lambda n, k: Int4Linear(make_codes(n, k, Kind.INT4), layout),
        "dense": lambda n, k: DenseLinear(torch.randn(n, k).to(DTYPE)),
    }
    if native is not None:
        makers["4-bit"] = lambda n, k: NativeInt4Linear(native, make_codes(n, k, Kind.INT4))
        makers["8-bit"] = lambda n, k: NativeInt8Linear(native, make_codes(n, k, Kind.INT8))
    return makers


def linear_rows(native: Native | None) -> None:
    layers = {
        who: [make(n, k) for _ in range(LAYERS) for n, k in LINEARS] for who, make in linear_makers(native).items()
    }
    for tokens in (1, 8, 32, 128, 512):
        inputs = {k: torch.randn(tokens, k).to(DTYPE) for _, k in LINEARS}

        def run(methods: list[LinearMethod], inputs: dict[int, torch.Tensor] = inputs) -> None:
            for method in methods:
                method.apply(inputs[method.in_features])

        name = f"linears of {LAYERS} layers, {tokens} tokens (bf16)"
        compare(name, {who: partial(run, methods) for who, methods in layers.items()})


def head_rows(native: Native | None) -> None:
    codes = make_codes(VOCAB, HIDDEN, Kind.INT8)
    heads: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"16-bit": HalfLinear(codes.dense()).apply}
    if native is not None:
        heads["8-bit"] = NativeHead(native, codes).logits
    for rows in (1, 4, 8, 32):
        x = torch.randn(rows, HIDDEN)
        compare(f"head of {rows} rows (float32)", {who: partial(logits, x) for who, logits in heads.items()})


def layer_rows(native: Native) -> None:
    """A decoder layer's halves in one call each, against one call an operation."""
    ops, norm = NativeCpuOps(CPU, native), NormWeight(torch.rand(HIDDEN), 1e-5)
    qkv, out, up, down = (NativeInt4Linear(native, make_codes(n, k, Kind.INT4)) for n, k in LINEARS)
    packed = [PackedWeight(m.packed, 4, m.out_features, m.in_features) for m in (qkv, out, up, down)]
    heads = HeadSpec(HEADS, KV_HEADS, None, Rotation(torch.randn(1024, DIM), interleaved=False))
    spec = AttentionSpec(scale=DIM**-0.5)
    cache = KVLayer(*(torch.randn(PAGES, KV_HEADS, PAGE, DIM).to(DTYPE) for _ in range(2)))
    mlp = NativeMlp(native, norm, up=packed[2], down=packed[3])
    attend = NativeAttend(native, norm, qkv=packed[:1], out=packed[1], heads=heads)
    for tokens in (1, 8, 32):
        batch = make_batch([1] * tokens, [200] * tokens)
        positions, slots = torch.full((tokens,), 199), batch.block_table_SP[:, 12].long() * PAGE + 7
        shape = decode_shape(cache, batch, spec, heads=HEADS, query_stride=qkv.out_features)
        rows = DecodeRows(positions.data_ptr(), slots.data_ptr())
        delta, residual = torch.zeros(tokens, HIDDEN, dtype=DTYPE), torch.randn(tokens, HIDDEN)

        def apart(positions: torch.Tensor = positions, slots: torch.Tensor = slots, batch: AttentionBatch = batch,
                  delta: torch.Tensor = delta, residual: torch.Tensor = residual) -> None:  # fmt: skip
            x = ops.add_rms_norm(delta, residual, norm.weight_D, eps=norm.eps)
            qkv_TNE = qkv.apply(x).view(len(x), -1, DIM)
            q = ops.rotate_and_store(qkv_TNE, cache, heads, positions_T=positions, slots_T=slots)
            attended = out.apply(ops.attention(q, cache, batch, spec).flatten(1))
            x = ops.add_rms_norm(attended, residual, norm.weight_D, eps=norm.eps)
            down.apply(ops.gated_activation(up.apply(x), Activation.SILU))

        def fused(rows: DecodeRows = rows, shape: DecodeShape = shape,
                  delta: torch.Tensor = delta, residual: torch.Tensor = residual) -> None:  # fmt: skip
            mlp(attend(delta, residual, cache, rows=rows, shape=shape), residual)

        compare(f"layer, {tokens} tokens after 200", {"halves": fused, "apart": apart})


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
                max_top_k=top_k,
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
        if native is not None:
            layer_rows(native)
        for tokens in (1, 32, 512):
            small_rows(all_ops, tokens)
        attention_rows(all_ops)
        linear_rows(native)
        head_rows(native)
        sampling_rows(all_ops)


if __name__ == "__main__":
    main()
