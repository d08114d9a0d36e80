"""Compiles every kernel for a GPU that need not be there: a script, run by test_compile.py in a process of its own.

    python compile_check.py CAPABILITY CASE...

Triton compiles where it would launch: a driver that only names its target stands in for CUDA, and launches end once the
binary is made. Prints one line a kernel: its name and bytes of shared memory.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from shoal.kernels.kv_codes import largest_code
from shoal.kernels.matmul import matmul
from shoal.kernels.one_shot import Peers, one_shot_sum
from shoal.kernels.ops import (
    Activation,
    AttentionBatch,
    AttentionSpec,
    HeadNorms,
    HeadSpec,
    KVLayer,
    Rotation,
    SamplingBatch,
)
from shoal.kernels.triton_ops import TritonOps

CPU = torch.device("cpu")


class NamingDriver:
    """What Triton asks of a driver until a kernel is launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def only_compile() -> None:
    """Make every launch end with its binary made, and print what that needs."""
    launch = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["warmup"] = True
        kernel = launch(self, *args, **kwargs)
        sys.stdout.write(f"{self.fn.__name__} {kernel.metadata.shared}\n")
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only


def zero_cache(dtype: torch.dtype, kv_heads: int, dim: int, *, page: int = 64) -> KVLayer:
    shape = (80, kv_heads, page, dim)
    scales = [torch.zeros(shape[:3]) for _ in range(2)] if largest_code(dtype) else []
    return KVLayer(*(torch.zeros(shape, dtype=dtype) for _ in range(2)), *scales)


def attention(
    dtype: torch.dtype, shape: tuple[int, int, int], spec: AttentionSpec, *, stored: torch.dtype | None = None
) -> None:
    """A mixed step: two decodes and a prefill. shape: (query heads, KV heads, head dim). With sinks if capped."""
    heads, kv_heads, dim = shape
    query_lens, kv_lens = (1, 1, 70), (5, 4000, 70)
    cache = zero_cache(stored or dtype, kv_heads, dim)
    batch = AttentionBatch(
        torch.tensor([0, 1, 2, 72], dtype=torch.int32),
        torch.tensor(kv_lens, dtype=torch.int32),
        torch.zeros(3, 64, dtype=torch.int32),
        2,
        70,
        4000,
        query_lens,
        kv_lens,
    )
    sinks_H = None if spec.softcap is None else torch.zeros(heads)
    TritonOps(CPU).attention(torch.zeros(72, heads, dim, dtype=dtype), cache, batch, spec, sinks_H=sinks_H)


def elementwise(dtype: torch.dtype) -> None:
    ops = TritonOps(CPU)
    x, weight, qkv = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096), torch.zeros(4, 48, 128, dtype=dtype)
    q, k, v = qkv.split([32, 8, 8], dim=1)
    ops.rms_norm(x, weight, eps=1e-5)
    ops.rms_norm(q, torch.zeros(128), eps=1e-5)
    ops.add_rms_norm(x, x, weight, eps=1e-5)
    ops.layer_norm(x, weight, None, eps=1e-5)
    ops.add_layer_norm(x, x, weight, weight, eps=1e-5)
    for activation in Activation:
        ops.gated_activation(x, activation)
        ops.activation(x, activation)
    spec = HeadSpec(32, 8, HeadNorms(torch.zeros(128), torch.zeros(128), 1e-5), Rotation(torch.zeros(9, 128), False))
    at = torch.zeros(4, dtype=torch.int64)
    for stored in (dtype, torch.int8):
        cache = zero_cache(stored, 8, 128)
        ops.write_kv(k, v, cache, at)
        ops.rotate_and_store(qkv, cache, spec, positions_T=at, slots_T=at)


def sampling(dtype: torch.dtype, *, greedy: bool, filtered: bool) -> None:
    ops, logits = TritonOps(CPU), torch.zeros(2, 128256, dtype=dtype)
    floats, longs = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    batch = SamplingBatch(floats, floats.int(), floats, floats, longs, longs, greedy, filtered, filtered, filtered)
    ops.sample(logits, batch)
    ops.logprobs(logits, longs, 2)


def run(case: str) -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    plain, capped = AttentionSpec(0.1), AttentionSpec(0.1, window=4096, softcap=50.0)
    match case:
        case "elementwise":
            elementwise(bf16)
        case "sampling":
            sampling(fp32, greedy=False, filtered=True)
            sampling(bf16, greedy=True, filtered=False)
        case "attention":
            attention(bf16, (32, 8, 128), plain)
        case "attention-wide":
            attention(fp16, (8, 4, 256), capped)
        case "attention-odd":
            attention(bf16, (9, 3, 80), plain)
        case "attention-fp32":
            attention(fp32, (8, 8, 128), plain)
            attention(fp32, (4, 1, 256), capped)
        case "attention-int8":
            attention(bf16, (32, 8, 128), plain, stored=torch.int8)
            attention(fp16, (8, 4, 256), capped, stored=torch.int8)
        case "attention-fp8":  # from 8.9 on
            attention(bf16, (32, 8, 128), plain, stored=torch.float8_e4m3fn)
            k, v = torch.zeros(2, 4, 8, 128, dtype=bf16)
            cache = zero_cache(torch.float8_e4m3fn, 8, 128)
            TritonOps(CPU).write_kv(k, v, cache, torch.zeros(4, dtype=torch.int64))
        case "products":
            matmul(torch.zeros(5, 576, dtype=bf16), torch.zeros(101, 576, dtype=bf16), fp32)
            matmul(torch.zeros(5, 576, dtype=fp32), torch.zeros(101, 576, dtype=fp32))
        case "one-shot":
            for size, dtype in ((2, fp32), (3, fp16), (8, bf16)):
                peers = Peers(torch.zeros(size, dtype=torch.int64), 1, held=None)
                one_shot_sum(torch.zeros(4, 4096, dtype=dtype), peers)
        case "noise":
            sampling(fp32, greedy=False, filtered=False)


if __name__ == "__main__":
    driver.set_active(NamingDriver(int(sys.argv[1])))
    only_compile()
    for name in sys.argv[2:]:
        run(name)
