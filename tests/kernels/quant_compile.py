"""Compiles quantised products of real shapes for a GPU that need not be there: see compile_check.py.

    python quant_compile.py CAPABILITY CASE...        a case: ENCODING:FEATURESxCOLUMNS:ROWS

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

from shoal.kernels.coded_weight import CodedWeight, fp8_weight, int4_weight, int8_weight
from shoal.kernels.eight_bit_matmul import dynamic_matmul
from shoal.kernels.quant_matmul import weight_only_matmul

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
    encoding, shape, rows = case.split(":")
    features, columns = map(int, shape.split("x"))
    product: Callable[[Tensor, CodedWeight], Tensor] = weight_only_matmul
    if encoding.endswith("dynamic"):
        product = dynamic_matmul
    product(torch.zeros(int(rows), columns, dtype=torch.bfloat16), weight_of(encoding, features, columns))


if __name__ == "__main__":
    driver.set_active(NamingDriver(int(sys.argv[1])))
    only_compile()
    for name in sys.argv[2:]:
        run(name)
