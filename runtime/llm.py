"""`LLM`: the engine for Python programs, offline and asynchronous. No Ray, no HTTP; on one rank no process is started.

The engine runs in a thread of its own, and a private event loop in another turns its events into text. `generate` and
`chat` wait for that loop from outside, so they work unguarded in scripts, in notebooks and from `python -`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from .build import build_engine
from .config import EngineConfig
from .errors import ConfigError, EngineDead, InvalidRequest, RowFailed
from .generation import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from .progress import Progress
from .text import Text, choice_seed

Prompt = str | Sequence[int] | dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs[i]` maps token ids to `Logprob`, the drawn token first."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What a prompt gave: one output for each of `params.n` choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False


class LLM:
    """A model on this machine.

    model: a folder, a hub id already in the local cache, or a .gguf file. The keywords are `EngineConfig`'s fields.
    Without tokenizer files prompts are token ids and texts come back empty.

    Raises:
        ConfigError, CheckpointError, MemoryPlanError: see `errors.py`.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        config = _config(
            model=model,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            **options,
        )
        self._ids = itertools.count()
        self._built = build_engine(config)
        self._text = Text.load(self._built.model_path, self._built.max_model_len, self._built.spec.vocab_size)
        self._engine = AsyncEngine(self._built.engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shoal-llm", daemon=True)
        self._thread.start()
        self._closed = False

    # Offline

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt; results come in the order of the prompts.

        prompts: one or many, each a text, a list of token ids, or {"prompt": text} / {"prompt_token_ids": ids}.
        params: one for all or one for each. progress: a bar on a terminal where there are several prompts.

        Raises:
            InvalidRequest, ContextTooLong: nothing has run then. EngineDead: the engine broke.
        """
        many = _as_list(prompts)
        jobs = [self._prepare(p, s) for p, s in zip(many, _params_for(many, params), strict=True)]
        return self._run(self._collect(jobs, Progress("generate", total=len(jobs), show=progress and len(jobs) > 1)))
