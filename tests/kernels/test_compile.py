"""Every kernel compiles for the GPUs we name, whether or not one is here: Triton brings its own assembler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).with_name("compile_check.py")
SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}  # a block's most
KERNELS = {
    "_matmul_kernel",
    "_norm_kernel",
    "_rotate_and_store_kernel",
    "_activation_kernel",
    "_write_kv_kernel",
    "_threshold_kernel",
    "_draw_kernel",
    "_pick_kernel",
    "_logprobs_kernel",
    "_decode_kernel",
    "_prefill_kernel",
    "_one_shot_kernel",
}


def compile_for(capability: int, *cases: str) -> set[str]:
    """Names of the kernels that were compiled; fails where one was not, or needs too much shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(CHECK), str(capability), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    needs = [line.split() for line in done.stdout.splitlines()]
    assert all(int(shared) <= SHARED_MEMORY[capability] for _, shared in needs), needs
    return {name for name, _ in needs}


@pytest.mark.slow
def test_compiles_every_variant() -> None:
    kinds = ("attention", "attention-wide", "attention-odd", "attention-fp32", "attention-int8", "attention-fp8")
    assert compile_for(90, "elementwise", "sampling", "noise", "products", "one-shot", *kinds) == KERNELS


@pytest.mark.slow
def test_compiles_for_ampere() -> None:
    assert compile_for(80, "elementwise", "sampling", "products", "one-shot", "attention", "attention-odd") == KERNELS
