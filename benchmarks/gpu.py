"""One GPU: are the kernels right, and how far from the hardware's limits are kernels, a decode step and the engine?

    python benchmarks/gpu.py [--only attention,matmul] [--budget-s 480] [--append] [--commit NAME]
    python benchmarks/gpu.py --interpret      every part at toy size in Triton's interpreter, without a GPU

Needs torch, triton and this repository, which need not be installed. Parts `decode` and `engine` need msgspec, too, and
`engine` pydantic (with pydantic-core, annotated-types and typing-inspection: 3 MB of wheels in all). Weights are
random, of real shapes. Beside us, where they can be imported: FlashInfer and transformers' `generate_batch`.

Every time is of calls in a CUDA graph, with data that the L2 cache does not hold, the median of many replays. Floors
are those of this very device: bytes over the bandwidth of a large copy, operations over the rate of a large product.
A part that fails does not stop the others. Exit status: 0; 1 where something failed or was wrong; 2 without a GPU.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
INTERPRET = "--interpret" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before Triton is imported
if find_spec("shoal") is None:  # the repository's folders are the package's
    shoal = ModuleType("shoal")
    shoal.__path__ = [str(ROOT)]
    sys.modules["shoal"] = shoal

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from shoal.kernels.kv_codes import encode, largest_code  # noqa: E402
from shoal.kernels.ops import (  # noqa: E402
    Activation,
    AttentionBatch,
    AttentionSpec,
    HeadNorms,
    HeadSpec,
    KVLayer,
    Rotation,
    SamplingBatch,
)
from shoal.kernels.quant_tiles import FEW_ROWS  # noqa: E402
from shoal.kernels.reference import ReferenceOps  # noqa: E402
from shoal.kernels.triton_ops import TritonOps  # noqa: E402

Call = Callable[[], object]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, INT8 = torch.float8_e4m3fn, torch.int8
TOLERANCE = {FP32: 1e-5, FP16: 4e-3, BF16: 3.2e-2}
SHORT = 12  # lines of an error that are shown


class Figure(NamedTuple):
    """One line of the table. Times are in us, ms or s; all other units are rates. floor: the best there can be."""

    what: str
    value: float
    unit: str
    floor: float | None = None
    peer: str = ""

    def percent(self) -> str:
        if not self.floor:
            return ""
        share = self.floor / self.value if self.unit in ("us", "ms", "s") else self.value / self.floor
        return f"{100 * share:.0f} %"

    def cells(self) -> list[str]:
        floor = "" if self.floor is None else f"{self.floor:,.4g}"
        return [self.what, f"{self.value:,.4g} {self.unit}", floor, self.percent(), self.peer]


class Model(NamedTuple):
    """The shape of a model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    mlp: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False


LLAMA_8B = Model("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256)
QWEN_8B = Model("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
QWEN_SMALL = Model("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936, tied=True, qk_norm=True)
TOY = Model("toy", 2, 64, 4, 2, 16, 64, 96, qk_norm=True)


@dataclass
class Bench:
    """The device, what it can do at best, and the time that is left."""

    on: torch.device
    ends: float
    toy: bool
    bandwidth: float = math.inf  # bytes/s
    rate: float = math.inf  # 16-bit operations/s
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ops = TritonOps(self.on)
        self.reference = ReferenceOps(self.on)
        self.dtype = FP16 if self.toy else BF16
        self.page = 16 if self.toy else 64

    def left(self) -> float:
        return self.ends - time.monotonic()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.on, dtype=dtype or self.dtype)

    def floor_us(self, num_bytes: float, operations: float = 0.0) -> float:
        return max(num_bytes / self.bandwidth, operations / self.rate) * 1e6

    def copies(self, num_bytes: int) -> range:
        """As many sets of data of this size as the L2 cache does not hold."""
        return range(1 if self.toy else min(max(1, (192 << 20) // max(num_bytes, 1)), 64))

    def time_us(self, *calls: Call) -> float:
        """Of one of the calls, which all do the same with data of their own."""
        if self.toy:
            return _once_us(*calls)
        for call in calls:
            call()
        torch.cuda.synchronize()
        rounds = max(1, 16 // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls * rounds:
                call()
        graph.replay()
        times: list[float] = []
        end = time.monotonic() + 0.15
        while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
            begin, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            done.record()
            done.synchronize()
            times.append(begin.elapsed_time(done) * 1e3)
        return statistics.median(times) / (rounds * len(calls))


def _once_us(*calls: Call) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) * 1e6 / len(calls)


# What the device can do


def ceilings(bench: Bench) -> Iterator[Figure]:
    size, side = (1 << 12, 32) if bench.toy else (1 << 30, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=bench.on) for _ in range(2))
    bench.bandwidth = 2 * size / bench.time_us(partial(target.copy_, source)) * 1e6
    yield Figure("copy", bench.bandwidth / 1e9, "GB/s")
    del source, target
    a, b = bench.randn(side, side), bench.randn(side, side)
    bench.rate = 2 * side**3 / bench.time_us(lambda: a @ b) * 1e6
    yield Figure(f"product of {side} x {side}, {bench.dtype}", bench.rate / 1e12, "TFLOP/s")


# Attention


class Paged(NamedTuple):
    """One layer's attention over a cache of random pages."""

    q_THE: Tensor
    cache: KVLayer
    batch: AttentionBatch

    def kv_bytes(self) -> int:
        """What must be read of the cache."""
        scales = 0 if self.cache.k_scale_NKB is None else 4
        _, kv_heads, _, dim = self.cache.k_NKBE.shape
        return sum(self.batch.kv_lens) * 2 * kv_heads * (dim * self.cache.k_NKBE.itemsize + scales)


def paged(
    bench: Bench,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Paged:
    dtype = dtype or bench.dtype
    counts = [-(-kv // bench.page) for kv in kv_lens]
    table = torch.zeros(len(kv_lens), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.randperm(sum(counts)).int().split(counts), strict=True):
        row[: len(pages)] = pages
    batch = AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(bench.on, torch.int32),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32, device=bench.on),
        block_table_SP=table.to(bench.on),
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
    )
    shape = (sum(counts), kv_heads, bench.page, dim)
    cache = make_cache(bench, shape, kv_dtype or dtype)
    return Paged(bench.randn(sum(query_lens), heads, dim, dtype=dtype), cache, batch)


def make_cache(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype) -> KVLayer:
    if not largest_code(dtype):
        return KVLayer(*(bench.randn(*shape, dtype=dtype) for _ in range(2)))
    (k, k_scale), (v, v_scale) = (encode(bench.randn(*shape), dtype) for _ in range(2))
    return KVLayer(k, v, k_scale, v_scale)


def attention(bench: Bench) -> Iterator[Figure]:
    grid = [(1, 1024), (1, 8192), (1, 65536), (8, 1024), (8, 8192), (64, 1024), (64, 4096), (256, 1024), (256, 2048)]
    spec = AttentionSpec(128**-0.5)
    for batch, context in [(2, 40)] if bench.toy else grid:
        for kv_dtype in (bench.dtype, FP8, INT8):
            make = partial(paged, bench, [1] * batch, [context] * batch, kv_dtype=kv_dtype)
            first = make()
            sets = [first, *(make() for _ in bench.copies(first.kv_bytes())[1:])]
            us = bench.time_us(*(partial(bench.ops.attention, *one, spec) for one in sets))
            peer = flashinfer_decode(bench, sets) if kv_dtype is bench.dtype and not bench.toy else ""
            name = str(kv_dtype).removeprefix("torch.")
            yield Figure(f"decode {batch} x {context}, {name} KV", us, "us", bench.floor_us(first.kv_bytes()), peer)
    for dim, heads, kv_heads in ((64, 32, 8), (128, 32, 8)):
        length = 20 if bench.toy else 8192
        one = paged(bench, [length], [length], heads=heads, kv_heads=kv_heads, dim=dim)
        us = bench.time_us(partial(bench.ops.attention, *one, AttentionSpec(dim**-0.5)))
        operations = 2 * length**2 * heads * dim  # of the half that is not masked, two products
        q, k, v = (bench.randn(1, n, length, dim) for n in (heads, kv_heads, kv_heads))
        sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        peer = f"SDPA {operations / bench.time_us(sdpa) / 1e6:.0f}"
        yield Figure(
            f"prefill, {length} causal, head dim {dim}", operations / us / 1e6, "TFLOP/s", bench.rate / 1e12, peer
        )


def flashinfer_decode(bench: Bench, sets: list[Paged]) -> str:
    """FlashInfer on the same pages; nothing where it is not there or does not run."""
    if find_spec("flashinfer") is None:
        return ""
    import flashinfer

    try:
        calls = []
        for q_THE, cache, batch in sets:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(128 << 20, dtype=torch.uint8, device=bench.on), "HND", use_tensor_cores=True
            )
            counts = torch.tensor([-(-kv // bench.page) for kv in batch.kv_lens], device=bench.on)
            wrapper.plan(
                F.pad(counts.cumsum(0), (1, 0)).int(),
                torch.cat([row[:n] for row, n in zip(batch.block_table_SP, counts.tolist(), strict=True)]),
                ((batch.kv_lens_S - 1) % bench.page + 1).int(),
                q_THE.shape[1],
                *(cache.k_NKBE.shape[1], q_THE.shape[2], bench.page),
                q_data_type=q_THE.dtype,
                kv_data_type=cache.k_NKBE.dtype,
            )
            calls.append(partial(wrapper.run, q_THE, tuple(cache)))
        return f"FlashInfer {bench.time_us(*calls):.4g} us"
    except Exception as error:  # noqa: BLE001 (a peer's trouble is not ours)
        return f"FlashInfer: {str(error).splitlines()[0][:40]}"


# Products


def matmul(bench: Bench) -> Iterator[Figure]:
    from shoal.kernels.coded_weight import fp8_weight, int4_weight, int8_weight
    from shoal.kernels.eight_bit_matmul import dynamic_matmul
    from shoal.kernels.quant_matmul import weight_only_matmul

    shapes = [(6144, 4096), (28672, 4096), (4096, 14336)]
    for features, columns in [(64, 128)] if bench.toy else shapes:
        groups = columns // 128
        codes = torch.randint(0, 256, (features, columns), device=bench.on)
        dense = bench.randn(features, columns)
        scale_FG = torch.rand(features, groups, device=bench.on) * 0.01
        eighth = codes.sub(128).to(INT8)
        blocks = torch.rand(-(-features // 128), groups, device=bench.on) * 0.01
        formats: dict[str, tuple[Callable[..., Tensor], Any]] = {
            "int4": (weight_only_matmul, int4_weight((codes & 15).to(torch.uint8), scale_FG)),
            "int8": (weight_only_matmul, int8_weight(eighth, scale_FG[:, :1])),
            "w8a8": (dynamic_matmul, int8_weight(eighth, scale_FG[:, :1])),
            "fp8": (dynamic_matmul, fp8_weight((codes.float() / 64).to(FP8), blocks)),
        }
        for rows in (3,) if bench.toy else (1, 16, 64, 512, 4096):
            x = bench.randn(rows, columns)
            operations, moved = 2 * rows * features * columns, 2 * rows * (features + columns)
            usual = bench.time_us(lambda x=x, dense=dense: F.linear(x, dense))
            for name, (product, weight) in formats.items():
                if name == "fp8" and not bench.toy and torch.cuda.get_device_capability(bench.on) < (8, 9):
                    continue
                us = bench.time_us(partial(product, x, weight))
                # 8-bit products run at twice the rate of 16-bit ones.
                fast = 2 if product is dynamic_matmul and rows > 64 else 1
                floor = bench.floor_us(weight.num_bytes() + moved, operations / fast)
                yield Figure(f"{name} {rows} x {columns} x {features}", us, "us", floor, f"16-bit torch {usual:.4g} us")


def few_rows(bench: Bench) -> Iterator[Figure]:
    """A layer's products with what stands around them, against torch's products with kernels of their own around."""
    from shoal.kernels.coded_weight import dense_weight
    from shoal.kernels.fused_product import normed_product, plain_product
    from shoal.kernels.ops import NormWeight
    from shoal.kernels.product import Stream

    ops, model = bench.ops, TOY if bench.toy else LLAMA_8B
    norm = NormWeight(torch.rand(model.hidden, device=bench.on), 1e-5)
    gated = partial(ops.gated_activation, activation=Activation.SILU)

    def enter(stream: Stream) -> Tensor:
        return ops.add_rms_norm(stream.deltas[0], stream.residual_TD, norm.weight_D, eps=norm.eps)

    # What it is: [features, columns], ours and torch's, of the stream, an input and a weight.
    parts: dict[str, tuple[tuple[int, int], Callable[..., Tensor], Callable[..., Tensor]]] = {
        "norm and qkv": (
            ((model.heads + 2 * model.kv_heads) * model.dim, model.hidden),
            lambda stream, x, weight: normed_product(stream, norm, weight),
            lambda stream, x, weight: F.linear(enter(stream), weight),
        ),
        "out": (
            (model.hidden, model.heads * model.dim),
            lambda stream, x, weight: plain_product(x, weight),
            lambda stream, x, weight: F.linear(x, weight),
        ),
        "norm, gate and up, SwiGLU": (
            (2 * model.mlp, model.hidden),
            lambda stream, x, weight: normed_product(stream, norm, weight, activation=Activation.SILU),
            lambda stream, x, weight: gated(F.linear(enter(stream), weight)),
        ),
        "down, sums settled": (
            (model.hidden, model.mlp),
            lambda stream, x, weight: plain_product(x, weight, settled=stream),
            lambda stream, x, weight: F.linear(x, weight),
        ),
    }
    for name, (shape, ours, theirs) in parts.items():
        num_bytes = shape[0] * shape[1] * bench.dtype.itemsize
        sets = [bench.randn(*shape) for _ in bench.copies(num_bytes)]
        for rows in (2,) if bench.toy else (1, 4, 16):
            delta = torch.zeros(rows, model.hidden, dtype=bench.dtype, device=bench.on)
            stream = Stream(bench.randn(rows, model.hidden, dtype=FP32), (delta, delta))
            x = bench.randn(rows, shape[1])
            separate = bench.time_us(*(partial(theirs, stream, x, weight) for weight in sets))
            us = bench.time_us(*(partial(ours, stream, x, dense_weight(weight)) for weight in sets))
            yield Figure(
                f"{name}, {rows} rows", us, "us", bench.floor_us(num_bytes), f"by themselves {separate:.4g} us"
            )


# Small kernels


def small(bench: Bench) -> Iterator[Figure]:
    ops, model = bench.ops, TOY if bench.toy else LLAMA_8B
    weight = torch.rand(model.hidden, device=bench.on)
    fused = model.heads + 2 * model.kv_heads
    spec = head_spec(bench, model)
    for rows in (2,) if bench.toy else (1, 256, 8192):
        x, residual = bench.randn(rows, model.hidden), bench.randn(rows, model.hidden, dtype=FP32)
        qkv, gate_up = bench.randn(rows, fused, model.dim), bench.randn(rows, 2 * model.mlp)
        cache = make_cache(bench, (-(-rows // bench.page), model.kv_heads, bench.page, model.dim), bench.dtype)
        places = torch.arange(rows, device=bench.on)
        norm = partial(ops.add_rms_norm, x, residual, weight, eps=1e-5)
        prepare = partial(ops.rotate_and_store, qkv, cache, spec, positions_T=places % 64, slots_T=places)
        calls: dict[str, tuple[Call, int]] = {
            "add and RMS norm": (norm, x.nbytes * 2 + residual.nbytes * 2),
            "rotate and store": (prepare, qkv.nbytes * 2),
            "SwiGLU": (partial(ops.gated_activation, gate_up, Activation.SILU), gate_up.nbytes * 3 // 2),
        }
        for name, (call, num_bytes) in calls.items():
            yield Figure(f"{name}, {rows} rows", bench.time_us(call), "us", bench.floor_us(num_bytes))


def head_spec(bench: Bench, model: Model) -> HeadSpec:
    q_weight_E, k_weight_E = torch.rand(2, model.dim, device=bench.on)
    norms = HeadNorms(q_weight_E, k_weight_E, 1e-6)
    return HeadSpec(model.heads, model.kv_heads, norms, Rotation(bench.randn(64, model.dim, dtype=FP32), False))


def sampling_of(
    on: torch.device, rows: int, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> SamplingBatch:
    full = partial(torch.full, (rows,), device=on)
    return SamplingBatch(
        temperature_R=full(fill_value=temperature, dtype=FP32),
        top_k_R=full(fill_value=top_k, dtype=torch.int32),
        top_p_R=full(fill_value=top_p, dtype=FP32),
        min_p_R=full(fill_value=0.0, dtype=FP32),
        seed_R=torch.arange(rows, device=on),
        position_R=torch.arange(rows, device=on),
        all_greedy=temperature == 0,
        max_top_k=top_k,
        any_top_p=top_p < 1,
        any_min_p=False,
    )


def sampling(bench: Bench) -> Iterator[Figure]:
    vocab = 300 if bench.toy else 151936
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    }
    for rows in (2,) if bench.toy else (1, 32, 256):
        logits = bench.randn(rows, vocab, dtype=FP32) * 3
        for name, how in ways.items():
            us = bench.time_us(partial(bench.ops.sample, logits, sampling_of(bench.on, rows, **how)))
            yield Figure(f"sample {rows} x {vocab}, {name}", us, "us", bench.floor_us(logits.nbytes))


# Correctness


def checks(bench: Bench) -> Iterator[Figure]:
    """Every kernel against `ReferenceOps`, on small shapes with ragged edges."""
    cases = {**elementwise_checks(bench), **attention_checks(bench), **product_checks(bench), **sampling_checks(bench)}
    right = 0
    for name, case in cases.items():
        try:
            case()
            right += 1
        except Exception as error:  # noqa: BLE001 (whatever it is, the others are to run)
            bench.errors.append(f"check {name}: " + shortened(error))
    yield Figure("kernels' checks that hold", right, "checks", len(cases))


def same(found: object, expected: object, dtype: torch.dtype, *, times: float = 1.0) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype] * times, atol=TOLERANCE[dtype] * times)


def elementwise_checks(bench: Bench) -> dict[str, Call]:
    def check(dtype: torch.dtype) -> None:
        x, residual = bench.randn(5, 576, dtype=dtype), bench.randn(5, 576, dtype=FP32)
        weight, bias = bench.randn(2, 576, dtype=FP32)
        model = Model("", 1, 576, 9, 3, 64, 0, 0)
        qkv, places = bench.randn(5, 15, 64, dtype=dtype), torch.tensor([0, 9, -1, 17, 31], device=bench.on)
        spec = head_spec(bench, model)
        found = []
        for ops in (bench.ops, bench.reference):
            total, cache = residual.clone(), KVLayer(*torch.zeros(2, 2, 3, 16, 64, dtype=dtype, device=bench.on))
            parts = [
                ops.add_rms_norm(x, total, weight, eps=1e-5),
                ops.layer_norm(x, weight, bias, eps=1e-5),
                ops.rotate_and_store(qkv.clone(), cache, spec, positions_T=places.abs(), slots_T=places),
                *(ops.gated_activation(x, activation) for activation in Activation),
            ]
            found.append((*parts, total, *cache))
        ours, theirs = found
        same(ours, theirs, dtype, times=2)

    return {f"elementwise, {dtype}": partial(check, dtype) for dtype in dtypes(bench)}


def dtypes(bench: Bench) -> tuple[torch.dtype, ...]:
    return (FP32, FP16) if bench.toy else (FP32, FP16, BF16)


def attention_checks(bench: Bench) -> dict[str, Call]:
    specs = {"plain": AttentionSpec(0.1), "window, softcap": AttentionSpec(0.1, window=37, softcap=20.0)}
    steps = {"decode": ([1] * 3, [1, 70, 700]), "mixed": ([1, 70, 33], [300, 70, 90])}
    if bench.toy:
        steps = {"mixed": ([1, 20], [40, 25])}

    def check(step: str, spec: str, dtype: torch.dtype, kv_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        heads, kv_heads, dim = shape
        one = paged(bench, *steps[step], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, kv_dtype=kv_dtype)
        same(bench.ops.attention(*one, specs[spec]), bench.reference.attention(*one, specs[spec]), dtype)

    shapes = [(4, 2, 64)] if bench.toy else [(32, 8, 128), (9, 3, 64), (4, 1, 256), (8, 8, 80)]
    pairs = [*((dtype, dtype) for dtype in dtypes(bench)), (bench.dtype, FP8), (bench.dtype, INT8)]
    return {
        f"attention {step}, {spec}, {dtype} over {kv_dtype}, {shape}": partial(
            check, step, spec, dtype, kv_dtype, shape
        )
        for step in steps
        for spec in specs
        for dtype, kv_dtype in pairs
        for shape in shapes
    }


def product_checks(bench: Bench) -> dict[str, Call]:
    def check(name: str, rows: int) -> None:
        from shoal.kernels.coded_weight import fp8_weight, int4_weight, int8_weight
        from shoal.kernels.quant_matmul import weight_only_matmul

        features, columns = 80, 256
        x = bench.randn(rows, columns, dtype=bench.dtype)
        codes = torch.randint(0, 16, (features, columns), device=bench.on)
        scale_FG = (1 + torch.rand(features, 2, device=bench.on)) * 0.02
        wide = scale_FG.half().float().repeat_interleave(128, dim=1)
        match name:
            case "int4":
                weight, dense = int4_weight(codes.to(torch.uint8), scale_FG), (codes - 8) * wide
            case "int8":
                weight, dense = int8_weight((codes - 8).to(INT8), scale_FG.half().float()), (codes - 8) * wide
            case _:
                one = torch.full((1, 1), 0.02, device=bench.on)
                weight, dense = fp8_weight((codes - 8).float().to(FP8), one), (codes - 8).float() * 0.02
        same(weight_only_matmul(x, weight).float(), x.float() @ dense.T, bench.dtype, times=4)

    plain = {
        f"{name} product of {n} rows": partial(check, name, n) for name in ("int4", "int8", "fp8") for n in (1, 33)
    }
    around = {f"product of {n} rows and what stands around it": partial(around_check, bench, n) for n in (1, 16)}
    return {**plain, **around}


def around_check(bench: Bench, rows: int) -> None:
    from shoal.kernels.coded_weight import dense_weight
    from shoal.kernels.fused_product import normed_product, plain_product
    from shoal.kernels.ops import NormWeight
    from shoal.kernels.product import Stream

    hidden, mlp = 1024, 96
    norm = NormWeight(torch.rand(hidden, device=bench.on) + 0.5, 1e-5)
    up, down = bench.randn(2 * mlp, hidden) * hidden**-0.5, bench.randn(hidden, mlp) * mlp**-0.5
    residual, deltas = bench.randn(rows, hidden, dtype=FP32), (bench.randn(rows, hidden), bench.randn(rows, hidden))
    total = residual + deltas[0].float() + deltas[1].float()
    stream = Stream(residual, deltas)
    gated = normed_product(stream, norm, dense_weight(up), activation=Activation.SILU)
    normed = bench.reference.rms_norm(total, norm.weight_D, eps=norm.eps)
    expected = bench.reference.gated_activation(normed @ up.float().T, Activation.SILU)
    same(gated.float(), expected, bench.dtype, times=4)
    out = plain_product(gated, dense_weight(down), settled=stream)
    same(out.float(), gated.float() @ down.float().T, bench.dtype, times=4)
    assert torch.equal(residual, total)


def sampling_checks(bench: Bench) -> dict[str, Call]:
    def check(temperature: float, top_k: int, top_p: float) -> None:
        logits = bench.randn(3, 300 if bench.toy else 5000, dtype=FP32) * 4
        how = sampling_of(bench.on, 3, temperature=temperature, top_k=top_k, top_p=top_p)
        found, expected = bench.ops.sample(logits, how), bench.reference.sample(logits, how)
        assert torch.equal(found, expected), f"{found.tolist()} instead of {expected.tolist()}"

    ways = [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.2, 20, 1.0), (1.0, 50, 0.8)]
    return {f"sampling {way}": partial(check, *way) for way in ways}


# A decode step, and the engine


class RandomCheckpoint:
    """A `Checkpoint` of random weights, made on the device when they are asked for. coded: layers in 8 bits."""

    def __init__(self, bench: Bench, model: Model, *, coded: bool = False) -> None:
        self.config: dict[str, Any] = {}
        self._bench, self._shapes, self._coded = bench, _shapes(model), coded

    def names(self) -> list[str]:
        return list(self._shapes)

    def file_of(self, name: str) -> str:
        return "random"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str, cut: tuple[slice, ...] = ()) -> Tensor:
        made = torch.empty(self._cut(name, cut), dtype=self._bench.dtype, device=self._bench.on)
        return made.fill_(1.0) if made.dim() == 1 else made.normal_(0, self._size(name))

    def _cut(self, name: str, cut: tuple[slice, ...]) -> list[int]:
        whole = self._shapes[name]
        return [len(range(size)[part]) for size, part in zip(whole, (*cut, *[slice(None)] * 2), strict=False)]

    def _size(self, name: str) -> float:
        return 0.7 / math.sqrt(self._shapes[name][1])

    def form(self, name: str) -> Any:
        from shoal.parallel.codes import Kind
        from shoal.runtime.checkpoint import Form

        return Form("int8", 1, Kind.INT8) if self._coded and "layers" in name else None

    def codes(self, name: str, cut: tuple[slice, ...] = ()) -> Any:
        from shoal.parallel.codes import Codes

        if self.form(name) is None:
            return None
        rows, columns = self._cut(name, cut)
        codes = torch.randint(-128, 128, (rows, columns), dtype=INT8, device=self._bench.on)
        scale = torch.full((rows, 1), self._size(name) / 74, device=self._bench.on)  # 74: these codes' deviation
        return Codes(codes, scale, None, columns, columns, round_inputs=True)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    query, keys = model.heads * model.dim, model.kv_heads * model.dim
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (model.hidden,),
        "post_attention_layernorm": (model.hidden,),
        "self_attn.q_proj": (query, model.hidden),
        "self_attn.k_proj": (keys, model.hidden),
        "self_attn.v_proj": (keys, model.hidden),
        "self_attn.o_proj": (model.hidden, query),
        "mlp.gate_proj": (model.mlp, model.hidden),
        "mlp.up_proj": (model.mlp, model.hidden),
        "mlp.down_proj": (model.hidden, model.mlp),
    }
    if model.qk_norm:
        parts |= {"self_attn.q_norm": (model.dim,), "self_attn.k_norm": (model.dim,)}
    shapes = {f"model.layers.{i}.{n}.weight": shape for i in range(model.layers) for n, shape in parts.items()}
    ends = ["model.embed_tokens.weight"] if model.tied else ["model.embed_tokens.weight", "lm_head.weight"]
    return {**shapes, **dict.fromkeys(ends, (model.vocab, model.hidden)), "model.norm.weight": (model.hidden,)}


def build_decoder(bench: Bench, model: Model, max_len: int, *, coded: bool = False) -> Any:
    from shoal.runtime.loader import load_decoder
    from shoal.runtime.models.naming import LLAMA
    from shoal.runtime.models.spec import LayerSpec, MLPSpec, ModelSpec, NormKind, NormSpec, QKNorm, RopeSpec

    rope = RopeSpec(tuple(1e6 ** (-i / model.dim) for i in range(0, model.dim, 2)))
    layer = LayerSpec(AttentionSpec(model.dim**-0.5), rope, MLPSpec(model.mlp, Activation.SILU))
    spec = ModelSpec(
        family=model.name,
        names=LLAMA,
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.dim,
        max_len=max_len,
        layers=(layer,) * model.layers,
        norm=NormSpec(NormKind.RMS, 1e-6),
        qk_norm=QKNorm.HEAD if model.qk_norm else QKNorm.NONE,
        tied=model.tied,
    )
    weights = RandomCheckpoint(bench, model, coded=coded)
    return load_decoder(weights, spec, ops=bench.ops, dtype=bench.dtype, max_len=max_len)


def runners(
    bench: Bench, decoder: Any, cache: list[KVLayer], *, rows: int, max_len: int, recall: Any = None
) -> dict[str, Any]:
    from shoal.runtime.graphs import GraphRunner, cuda_capture
    from shoal.runtime.runner import EagerRunner
    from shoal.runtime.upload import select_upload

    eager = EagerRunner(decoder, cache, upload=select_upload(bench.on), recall=recall)
    graph = GraphRunner(
        decoder,
        cache,
        eager=eager,
        capture=(lambda launch: launch) if bench.toy else cuda_capture(),
        draw=bench.ops.sample,
        max_rows=rows,
        max_model_len=max_len,
        device=bench.on,
        recall=recall,
    )
    return {"graph": graph, "eager": eager}


def kv_caches(bench: Bench, model: Model, tokens: int, *, dtype: torch.dtype | None = None) -> list[KVLayer]:
    shape, dtype = (1 + tokens // bench.page, model.kv_heads, bench.page, model.dim), dtype or bench.dtype
    scales = 2 if largest_code(dtype) else 0
    return [
        KVLayer(
            *torch.zeros(2, *shape, dtype=dtype, device=bench.on),
            *torch.zeros(scales, *shape[:3], device=bench.on),
        )
        for _ in range(model.layers)
    ]


def decode(bench: Bench) -> Iterator[Figure]:
    """Steps of a batch that decodes, from the host's batch to the host's tokens."""
    plans = [(LLAMA_8B, [1, 8]), (QWEN_8B, [1, 64, 256]), (QWEN_SMALL, [1, 256])]
    context = 20 if bench.toy else 1024
    for model, batches in [(TOY, [2])] if bench.toy else plans:
        limit = context + bench.page
        decoder = build_decoder(bench, model, limit)
        pages = -(-limit // bench.page)
        cache = kv_caches(bench, model, max(batches) * pages * bench.page)
        unread = 0 if model.tied else model.vocab * model.hidden * bench.dtype.itemsize  # the embedding's other rows
        for rows in batches:
            batch = decoding(bench, rows, context=context, pages=pages)
            kv_bytes = rows * context * model.layers * 2 * model.kv_heads * model.dim * bench.dtype.itemsize
            floor = rows / ((decoder.weight_bytes - unread + kv_bytes) / bench.bandwidth)
            drawn: dict[str, list[int]] = {}
            for name, runner in runners(bench, decoder, cache, rows=rows, max_len=limit).items():
                step = partial(one_step, bench, runner, batch)
                drawn[name] = step()
                times = [_once_us(step) for _ in range(1 if bench.toy else 30)]
                rate = rows / statistics.median(times) * 1e6
                yield Figure(f"{model.name} step, batch {rows}, context {context}, {name}", rate, "tok/s", floor)
            if not bench.toy and rows <= FEW_ROWS:
                with patch("shoal.runtime.models.gpu_blocks.ByRows.__call__", lambda by, *step: by.many(*step)):
                    runner = runners(bench, decoder, cache, rows=rows, max_len=limit)["graph"]
                    step = partial(one_step, bench, runner, batch)
                    step()
                    rate = rows / statistics.median(_once_us(step) for _ in range(30)) * 1e6
                yield Figure("  the same, nine launches a layer", rate, "tok/s", floor)
            if drawn["graph"] != drawn["eager"]:  # near-ties of random weights may fall either way: few of them
                differ = sum(a != b for a, b in zip(drawn["graph"], drawn["eager"], strict=True))
                if differ > rows // 8:
                    bench.errors.append(f"{model.name}: {differ} of {rows} tokens of the graph are not the eager ones")
        del decoder, cache


def one_step(bench: Bench, runner: Any, batch: Any) -> list[int]:
    mine = runner.upload(batch)
    hidden_TD = runner.layers(runner.embed(mine), mine)
    tokens_R = runner.drawn(mine)
    if tokens_R is None:
        tokens_R = bench.ops.sample(runner.row_logits(hidden_TD, mine), mine.sampling)
    tokens: list[int] = tokens_R.tolist()
    return tokens


def decoding(bench: Bench, rows: int, *, context: int, pages: int) -> Any:
    """A batch in the host's memory whose rows decode the token behind `context - 1` others."""
    import numpy as np

    from shoal.runtime.batch import StepBatch

    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    last = torch.full((rows,), context - 1)
    attention = AttentionBatch(
        query_start_S1=torch.arange(rows + 1, dtype=torch.int32),
        kv_lens_S=torch.full((rows,), context, dtype=torch.int32),
        block_table_SP=table,
        num_decodes=rows,
        max_query_len=1,
        max_kv_len=context,
        query_lens=(1,) * rows,
        kv_lens=(context,) * rows,
    )
    return StepBatch(
        token_ids_T=torch.arange(rows) % 90,
        positions_T=last,
        kv_slots_T=table[:, (context - 1) // bench.page].long() * bench.page + (context - 1) % bench.page,
        seq_slots_T=torch.arange(rows),
        attention=attention,
        rows_R=torch.arange(rows),
        slots=list(range(rows)),
        next_positions=np.full(rows, context, np.int32),
        sampling=sampling_of(torch.device("cpu"), rows, temperature=0.0),
    )


class Load(NamedTuple):
    """Requests that all come at once."""

    requests: int
    prompt: int
    output: int

    def prompts(self, vocab: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab, (self.requests, self.prompt), generator=generator).tolist()

    def __str__(self) -> str:
        return f"{self.requests} requests of {self.prompt} in, {self.output} out"


PUBLISHED = Load(256, 1024, 1024)
SHARED = Load(256, 1024, 128)  # what generate_batch is given, too
TOY_LOAD = Load(3, 6, 4)


class Variant(NamedTuple):
    """How the engine's model and its cache are stored, and what it is asked for."""

    name: str
    coded: bool
    kv_dtype: torch.dtype | None
    loads: dict[Load, str]  # and what others needed


PUBLISHED_BY = "H200: FlashInfer 30.9, FA3 34.7, Triton 36.9 s"
VARIANTS = [
    Variant("", False, None, {SHARED: "", PUBLISHED: PUBLISHED_BY}),
    Variant(" w8a8, int8 KV", True, INT8, {Load(256, 1000, 1000): ""}),
]


def engine(bench: Bench) -> Iterator[Figure]:
    """Whole generations through scheduler, worker and runner, without HTTP."""
    for variant in VARIANTS:
        yield from of_variant(bench, variant, TOY if bench.toy else QWEN_8B)


def of_variant(bench: Bench, variant: Variant, model: Model) -> Iterator[Figure]:
    from shoal.runtime.ahead import LastTokens

    limit = 64 if bench.toy else 2048 + bench.page
    decoder = build_decoder(bench, model, limit, coded=variant.coded)
    tokens = 256 if bench.toy else PUBLISHED.requests * (PUBLISHED.prompt + PUBLISHED.output + bench.page)
    if not bench.toy:  # a smaller GPU: fewer run at once
        a_token = model.layers * 2 * model.kv_heads * model.dim * (variant.kv_dtype or bench.dtype).itemsize
        tokens = min(tokens, int((torch.cuda.mem_get_info(bench.on)[0] - (12 << 30)) / a_token))
    cache, rows = kv_caches(bench, model, tokens, dtype=variant.kv_dtype), min(256, tokens // 64)
    recall = LastTokens(rows, bench.on)
    runner = runners(bench, decoder, cache, rows=rows, max_len=limit, recall=recall)["graph"]
    run = partial(serve, bench, runner, model, num_blocks=tokens // bench.page, rows=rows)
    run(Load(2, 6, 3) if bench.toy else Load(32, 64, 8))
    if not variant.coded:
        seconds, made = run(TOY_LOAD if bench.toy else SHARED)
        yield Figure(f"{model.name} engine, each step waits for the one before", made / seconds, "tok/s")
    run = partial(run, recall=recall)
    for load, peer in {TOY_LOAD: ""}.items() if bench.toy else variant.loads.items():
        seconds, made = run(load)
        cut = "" if made == load.requests * load.output else f": cut after {made:,} tokens"
        yield Figure(f"{model.name}{variant.name} engine, {load}{cut}", seconds, "s", None, peer)
        yield Figure("  the same", made / seconds, "tok/s")


def serve(
    bench: Bench, runner: Any, model: Model, load: Load, *, num_blocks: int, rows: int, recall: Any = None
) -> tuple[float, int]:
    """(seconds, tokens) of a load, or of as much of it as there is time for. recall: the runner's, to run ahead."""
    from shoal.kernels.select import prepare_ops
    from shoal.parallel.group import LocalGroup
    from shoal.runtime.batch import SequenceTable
    from shoal.runtime.blocks import BlockPool
    from shoal.runtime.engine import Engine
    from shoal.runtime.generation import GenerationRequest, SamplingParams
    from shoal.runtime.policy import FirstCome
    from shoal.runtime.sampler import Sampler
    from shoal.runtime.scheduler import Scheduler
    from shoal.runtime.sequence import Limits
    from shoal.runtime.worker import Drawn, Known, ModelWorker

    prepare_ops(bench.on)
    limit = load.prompt + load.output + 1
    limits = Limits(
        max_model_len=limit,
        max_num_seqs=rows,
        max_num_batched_tokens=64 if bench.toy else 8192,
        max_queued=load.requests,
        vocab_size=model.vocab,
        eos_token_ids=frozenset(),
    )
    table = SequenceTable(num_slots=rows, max_model_len=limit, block_size=bench.page)
    sampler = Sampler(bench.ops, model.vocab)
    worker = ModelWorker(table=table, runner=runner, entry=Known(runner), exit=Drawn(runner, table, sampler, recall))
    pool = BlockPool(num_blocks, block_size=bench.page)
    scheduler = Scheduler(limits, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=b"")
    served = Engine(scheduler, LocalGroup(worker, depth=1 if recall is None else 2))
    params = SamplingParams(temperature=0.0, max_tokens=load.output, ignore_eos=True)
    for index, prompt in enumerate(load.prompts(model.vocab)):
        served.add(GenerationRequest(id=str(index), prompt=prompt, params=params, seed=index))
    begin, made = time.perf_counter(), 0
    while served.has_work and bench.left() > 0:
        made += sum(len(event.tokens) for event in served.step())
    return time.perf_counter() - begin, made


def generate_batch(bench: Bench) -> Iterator[Figure]:
    """transformers' continuous batching on the engine's smaller load."""
    if bench.toy:
        return
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    shape = QWEN_8B
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
    )
    with torch.device(bench.on):
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype, attn_implementation="sdpa_paged").eval()
    how = GenerationConfig(max_new_tokens=SHARED.output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begin = time.perf_counter()
    outputs = model.generate_batch(inputs=SHARED.prompts(shape.vocab), generation_config=how)
    seconds = time.perf_counter() - begin
    made = sum(len(output.generated_tokens) for output in outputs.values())
    yield Figure(f"transformers generate_batch, {shape.name}, {SHARED}: {made:,} tokens", seconds, "s")


# The whole

PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "checks": checks,
    "attention": attention,
    "matmul": matmul,
    "few_rows": few_rows,
    "small": small,
    "sampling": sampling,
    "decode": decode,
    "engine": engine,
    "generate_batch": generate_batch,
}
HEADERS = ["", "figure", "floor", "of floor", "peer"]


def run(bench: Bench, name: str, part: Callable[[Bench], Iterator[Figure]]) -> list[Figure]:
    """The part's figures, as many as there are time for and as come before an error."""
    figures: list[Figure] = []
    try:
        for figure in part(bench):
            figures.append(figure)
            print("  ".join(cell for cell in figure.cells() if cell), flush=True)
            if bench.left() < 0:
                bench.errors.append(f"{name}: out of time")
                break
    except Exception as error:  # noqa: BLE001 (whatever it is, the other parts are to run)
        bench.errors.append(f"{name}: " + shortened(error))
        print(bench.errors[-1], flush=True)
    if not bench.toy:
        torch.cuda.empty_cache()
    return figures


def shortened(error: Exception) -> str:
    lines = [line for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return "\n  ".join([*lines[:SHORT], f"at {where.filename}:{where.lineno}"])


def as_table(figures: list[Figure]) -> str:
    rows = [HEADERS, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def described(bench: Bench, commit: str) -> str:
    import triton

    name = "Triton's interpreter" if bench.toy else torch.cuda.get_device_name(bench.on)
    return f"{name}, torch {torch.__version__}, Triton {triton.__version__}, commit {commit}"


def current_commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, out of {', '.join(PARTS)}")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds in all")
    parser.add_argument("--interpret", action="store_true", help="toy sizes, in Triton's interpreter")
    parser.add_argument("--append", action="store_true", help="add the table to benchmarks/RESULTS.md")
    parser.add_argument("--commit", default=None, help="what to call this state of the code; default: git's name")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA device here: use --interpret to run every part at toy size on the CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    on = torch.device("cpu" if options.interpret else "cuda")
    bench = Bench(on, time.monotonic() + options.budget_s, options.interpret)
    figures: list[Figure] = []
    with torch.inference_mode():
        for name, part in {"device": ceilings, **{name: PARTS[name] for name in names}}.items():
            print(f"== {name}", flush=True)
            if bench.left() < 5:
                bench.errors.append(f"{name}: left out, --budget-s {options.budget_s:g} is spent")
                continue
            figures += run(bench, name, part)
    title = described(bench, options.commit or current_commit())
    text = "\n".join([f"\n## GPU: {title}", "`python benchmarks/gpu.py`", "", as_table(figures)])
    print(text, *(f"\nfailed: {error}" for error in bench.errors), flush=True)
    if options.append:
        with (ROOT / "benchmarks" / "RESULTS.md").open("a", encoding="utf-8") as results:
            results.write("\n".join([text, *(f"\nFailed: {error}" for error in bench.errors)]) + "\n")
    return 1 if bench.errors else 0


if __name__ == "__main__":
    sys.exit(main())
