"""Quantised products compile for the GPUs we name, and use what makes them fast there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).with_name("quant_compile.py")
SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}  # a block's most
TENSOR_CORES = {90: "wgmma", 80: "mma.sync"}
SHAPES = ["6144x4096", "28672x4096", "4096x14336"]
WEIGHT_ONLY = ["int4", "int4-fraction", "int4-32", "int8", "int8-16", "int8-128", "fp8", "fp8-block"]
DYNAMIC = {80: ["int8-dynamic"], 90: ["int8-dynamic", "fp8-dynamic", "fp8-block-dynamic"]}


def compile_for(capability: int, *cases: str, shared_memory: int | None = None) -> set[str]:
    """Names of the kernels that were compiled, each with no more than this.

    Every product's loads are asynchronous, and tensor cores multiply.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(CHECK.parent)
    command = [sys.executable, str(CHECK), str(capability), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = set()
    for line in done.stdout.splitlines():
        name, shared, *instructions = line.split()
        assert int(shared) <= (shared_memory or SHARED_MEMORY[capability]), line
        if name in ("_product_kernel", "_eight_bit_kernel"):
            assert {TENSOR_CORES[capability], "cp.async"} <= set(instructions[0].split(",")), line
        names.add(name)
    return names


def test_compiles_for_hopper() -> None:
    kernels = {"_product_kernel", "_unpack_kernel", "_quantise_kernel", "_eight_bit_kernel"}
    cases = ["int4:4096x4096:1", "int4:256x256:512", "fp8-dynamic:4096x4096:512", "fp8:4096x14336:512:codes"]
    assert compile_for(90, *cases) == kernels


def test_what_stands_around_a_product_leaves_room_for_three_on_a_multiprocessor() -> None:
    cases = ["dense:6144x4096:1:norm", "dense:28672x4096:1:gate", "dense:4096x14336:1:settle", "int4:6144x4096:1:gate"]
    assert compile_for(90, *cases, shared_memory=SHARED_MEMORY[90] // 3) == {"_product_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_every_variant(capability: int) -> None:
    if capability == 80:  # the older one has the same kernels: each way of reading codes once
        cases = [f"{name}:4096x4096:64" for name in ("int4", "int8-128", "fp8-block")]
    else:
        cases = [f"{name}:4096x4096:{rows}" for name in WEIGHT_ONLY for rows in (1, 400)] + ["int4:4096x4096:64"]
    cases += [f"{name}:4096x4096:{rows}" for name in DYNAMIC[capability] for rows in (128, 512)]
    cases += [f"dense:4096x4096:1:{around}" for around in ("norm", "gate", "settle")]
    cases += ["int4-fraction:4096x4096:1:gate", "int8-128:4096x4096:1:norm", "fp8-block:4096x4096:1:settle"]
    cases += ["int8:4096x4096:512:codes", *(["fp8-block:4096x14336:512:codes"] if capability == 90 else [])]
    if capability == 90:
        cases += [f"int4:{shape}:1" for shape in SHAPES] + ["int4:4096x4096:4096"]
    assert "_product_kernel" in compile_for(capability, *cases)
