"""`benchmarks/gpu.py` runs where there is no GPU: in the interpreter, at toy size; on its own it says what it lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_every_part_runs_at_toy_size() -> None:
    done = run("--interpret", "--only", "checks,matmul,few_rows,small,sampling,decode,engine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout[done.stdout.index("## GPU:") :]
    for what in (
        "copy",
        "checks that hold",
        "int4",
        "sums settled",
        "SwiGLU",
        "top-p",
        "batch 2, context 20, graph",
        "w8a8, int8 KV engine",
        "4 out",
    ):
        assert what in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--interpret" in done.stderr
