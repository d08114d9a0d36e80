# For pyright, which reads a @triton.jit function as Python. It is compiled by Triton and called in Triton's own way
# (`kernel[grid](..., num_warps=4)`), so everything of Triton's is Any here, as mypy is told in pyproject.toml.
from typing import Any

def __getattr__(name: str) -> Any: ...

jit: Any
