"""One replica: turns generation logs into tokens. The public Python API is `LLM` and `SamplingParams`.

Re-exported lazily, so that `import shoal.runtime.errors` costs no `import torch`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import SamplingParams, StructuredOutputs
    from .llm import LLM, CompletionOutput, RequestOutput

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputs"]

_HOMES = {"SamplingParams": "generation", "StructuredOutputs": "generation"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'llm')}"), name)
