"""Kernel tests run by Triton's interpreter where there is no GPU, and on the GPU where there is one.

Triton must be told before it is imported, hence the lines ahead of the imports. `pytest -m gpu` needs torch and Triton.
"""

import os
import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

from shoal.kernels.reference import ReferenceOps  # noqa: E402
from shoal.kernels.triton_ops import TritonOps  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run in this test."""
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("needs a CUDA device")
    if request.param == "cpu":
        if not INTERPRETED:
            pytest.skip("kernels are compiled for the GPU in this process")
        assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported before it could be told to interpret"
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture
def ops(device: torch.device) -> TritonOps:
    return TritonOps(device)


@pytest.fixture
def reference(device: torch.device) -> ReferenceOps:
    """The oracle, on the same device."""
    return ReferenceOps(device)


@pytest.fixture
def on_cpu() -> ReferenceOps:
    """The oracle alone, for tests of itself."""
    torch.manual_seed(0)
    return ReferenceOps(torch.device("cpu"))
