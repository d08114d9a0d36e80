"""Compiles quantised products of real shapes for a GPU that need not be there: see compile_check.py.

    python quant_compile.py CAPABILITY CASE...        a case: ENCODING:FEATURESxCOLUMNS:ROWS[:AROUND]

Prints one line a kernel: its name, bytes of shared memory, and which of the instructions below it has.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from compile_check import NamingDriver
from torch import Tensor
from triton.runtime.driver import driver

from shoal.kernels.coded_weight import CodedWeight, dense_weight, fp8_weight, int4_weight, int8_weight
from shoal.kernels.eight_bit_matmul import coding_of, dynamic_matmul
from shoal.kernels.fused_product import normed_product, plain_product
from shoal.kernels.ops import Activation, NormWeight
from shoal.kernels.product import Stream
from shoal.kernels.quant_matmul import weight_only_matmul
from shoal.kernels.quantise import activate_and_quantise, norm_and_quantise

INSTRUCTIONS = ("wgmma", "mma.sync", "cp.async")


def only_compile() -> None:
    launch = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["warmup"] = True
        kernel = launch(self, *args, **kwargs)
        has = [name for name in INSTRUCTIONS if f"{name}." in kernel.asm["ptx"]]
        sys.stdout.write(f"{self.fn.__name__} {kernel.metadata.shared} {','.join(has)}\n")
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only


def weight_of(encoding: str, features: int, columns: int) -> CodedWeight:
    codes = torch.zeros(features, columns, dtype=torch.uint8)
    scales = torch.ones(features, columns // 128)
    match encoding:
        case "dense":
            return dense_weight(torch.zeros(features, columns, dtype=torch.bfloat16))
        case "int4":
            return int4_weight(codes, scales)
        case "int4-fraction":
            return int4_weight(codes, scales, scales * 7.3)
        case "int4-32":
            return int4_weight(codes, torch.ones(features, columns // 32))
        case "int8-16":
            return int8_weight(codes.view(torch.int8), torch.ones(features, columns // 16))
        case "int8-128":
            return int8_weight(codes.view(torch.int8), scales)
        case "fp8-block" | "fp8-block-dynamic":
            return fp8_weight(codes.view(torch.float8_e4m3fn), scales[::128])
        case "fp8" | "fp8-dynamic":
            return fp8_weight(codes.view(torch.float8_e4m3fn), scales[:, :1])
        case _:
            return int8_weight(codes.view(torch.int8), scales[:, :1])


def run(case: str) -> None:
    encoding, shape, rows, *around = case.split(":")
    features, columns = map(int, shape.split("x"))
    weight = weight_of(encoding, features, columns)
    if around:
        return run_around(around[0], weight, int(rows))
    product: Callable[[Tensor, CodedWeight], Tensor] = weight_only_matmul
    if encoding.endswith("dynamic"):
        product = dynamic_matmul
    product(torch.zeros(int(rows), columns, dtype=torch.bfloat16), weight)
    return None


def run_around(what: str, weight: CodedWeight, rows: int) -> None:
    def stream(columns: int) -> Stream:
        delta = torch.zeros(rows, columns, dtype=torch.bfloat16)
        return Stream(torch.zeros(rows, columns), (delta, delta))

    norm = NormWeight(torch.ones(weight.in_features), 1e-5)
    x = torch.zeros(rows, weight.in_features, dtype=torch.bfloat16)
    match what:
        case "norm":
            normed_product(stream(weight.in_features), norm, weight)
        case "codes":  # of the rows that the weight meets: the norm's, or an activation's
            delta, residual = stream(weight.in_features).deltas[0], torch.zeros(rows, weight.in_features)
            norm_and_quantise(delta, residual, norm, coding_of(weight))
            activate_and_quantise(torch.cat([x, x], 1), Activation.SILU, coding_of(weight))
        case "gate":
            normed_product(stream(weight.in_features), norm, weight, activation=Activation.SILU)
        case _:
            plain_product(x, weight, settled=stream(weight.out_features))


if __name__ == "__main__":
    driver.set_active(NamingDriver(int(sys.argv[1])))
    only_compile()
    for name in sys.argv[2:]:
        run(name)
