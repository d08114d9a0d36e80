"""`LLM`: the engine for Python programs, offline and asynchronous. No Ray, no HTTP; one rank alone starts no process.

The engine runs in a thread of its own, and a private event loop in another turns its events into text. `generate` and
`chat` wait for that loop from outside, so they work unguarded in scripts, in notebooks and from `python -`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from ..parallel.group import RankInfo
from .async_engine import AsyncEngine
from .build import build_replica
from .config import EngineConfig
from .errors import ConfigError, InvalidRequest, RowFailed
from .generation import FinishReason, GenerationRequest, SamplingParams, StructuredOutputs, TokenEvent, TokenLogprob
from .grammar import FREE, Constraint, GrammarCompiler
from .progress import Progress
from .stats import Stats
from .text import OutputText, Text, choice_seed

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Result = TypeVar("Result")

NO_LIMIT = 1 << 30  # offline nobody is turned away: prompts wait in memory anyway


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability, its rank (1 is the most likely; None where it was not taken) and its text."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs[i]` maps token ids to `Logprob`, the drawn token's first."""

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


@dataclass(frozen=True, slots=True)
class _Job:
    """A prompt on its way: the output that fills up, and the log of each of its choices."""

    output: RequestOutput
    requests: list[GenerationRequest]
    texts: list[OutputText]


class LLM:
    """A model on this machine.

    model: a folder, a hub id already in the local cache, or a .gguf file. chat_template: the source of one, instead of
    the model's own. Other keywords are the fields of `EngineConfig`. Without tokenizer files prompts are token ids and
    texts come back empty.

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
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        config = _config(
            model=str(model),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            **{"max_queued": NO_LIMIT, **options},
        )
        self._closed = False
        self._ids = itertools.count()
        self._entropy = config.seed if config.seed is not None else secrets.randbits(63)
        replica = build_replica(config)
        try:
            self.text = Text.load(
                replica.model_path, replica.max_model_len, replica.spec.vocab_size, chat_template=chat_template
            )
            self._grammars = _grammars(self.text, replica.eos_token_ids)
        except BaseException:  # nobody else would end the ranks
            replica.engine.close()
            raise
        self._engine = AsyncEngine(replica.engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shoal-llm", daemon=True)
        self._thread.start()

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
            InvalidRequest, ContextTooLong: a prompt or parameter is wrong; nothing has run. RowFailed: a generation
            failed by itself. EngineDead: the engine broke.
        """
        many = _as_list(prompts)
        jobs = [self._job(p, s) for p, s in zip(many, _params_for(many, params), strict=True)]
        return self._run(self._answer_all(jobs, show=progress and len(jobs) > 1))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or many, through the model's chat template.

        template: `add_generation_prompt`, `continue_final_message`, `template_kwargs` (see `Text.encode_chat`).
        """
        many = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompts = [self.text.encode_chat(conversation, **template) for conversation in many]  # type: ignore[arg-type]
        return self.generate(prompts, params, progress=progress)

    # Asynchronous

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """One prompt's output each time it has grown, the last one `finished`. Many streams may run at once.

        The object is the same each time: read what you need before asking for the next. Leaving early aborts.
        """
        job = self._job(prompt, params or SamplingParams())
        grown: asyncio.Queue[Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(job, i, grown)) for i in range(len(job.requests))]
        try:
            while not job.output.finished:
                if (failure := await grown.get()) is not None:
                    raise failure
                yield job.output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stats(self) -> Stats:
        """How the engine stands."""
        return self._engine.stats()

    def ranks(self) -> list[RankInfo]:
        """The ranks that hold the model, and what each holds."""
        return self._engine.ranks()

    def close(self) -> None:
        """Abort what runs and free the model. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._engine.close()
        if self._grammars is not None:
            self._grammars.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # One prompt

    def _job(self, prompt: Prompt, params: SamplingParams) -> _Job:
        if self._closed:
            raise InvalidRequest("this LLM was closed")
        text, ids = self._read(prompt)
        self.text.check_length(len(ids), params.max_tokens)
        if params.structured_outputs is not None:
            self._need_grammars().check(params.structured_outputs)
        number = next(self._ids)
        seed = params.seed if params.seed is not None else choice_seed(self._entropy, number, 0)
        one = msgspec.structs.replace(params, n=1)
        requests = [
            GenerationRequest(id=f"{number}-{i}", prompt=ids, params=one, seed=choice_seed(seed, 0, i))
            for i in range(params.n)
        ]
        outputs = [CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        output = RequestOutput(str(number), text, ids, outputs)
        return _Job(output, requests, [self.text.output(params) for _ in requests])

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                prompt = prompt["prompt_token_ids"]
            elif "prompt" in prompt:
                prompt = prompt["prompt"]
            else:
                raise InvalidRequest(f"a prompt has the key prompt or prompt_token_ids; got {sorted(prompt)!r:.80}")
        if isinstance(prompt, str):
            return prompt, self.text.encode_prompt(prompt)
        ids: list[int] = list(prompt)  # type: ignore[arg-type]
        self.text.check_tokens(ids)
        return None, ids

    async def _answer_all(self, jobs: list[_Job], *, show: bool) -> list[RequestOutput]:
        with Progress("Generating", total=len(jobs), unit="prompts", show=show) as bar:

            async def answer(job: _Job) -> None:
                await asyncio.gather(*(self._follow(job, i) for i in range(len(job.requests))))
                bar.advance()

            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(answer(job))
        return [job.output for job in jobs]

    async def _follow(self, job: _Job, index: int, grown: asyncio.Queue[Exception | None] | None = None) -> None:
        """Run one choice's log to its end; `grown` hears of each event, and of a failure instead of the caller."""
        request, text = job.requests[index], job.texts[index]
        try:
            async with aclosing(self._engine.generate(request, self._constraint(request.params))) as batches:
                async for batch in batches:
                    for event in batch:
                        self._append(job.output, job.output.outputs[index], text=text, event=event)
                    if grown is not None:
                        grown.put_nowait(None)
                    if job.output.outputs[index].finish_reason is not None:
                        return
        except Exception as failure:
            if grown is None:
                raise
            grown.put_nowait(failure)

    def _append(self, output: RequestOutput, choice: CompletionOutput, *, text: OutputText, event: TokenEvent) -> None:
        if choice.finish_reason is not None:
            return  # behind a stop string
        before = text.num_tokens
        delta, stopped_by = text.push(event.tokens, event.finish_reason is not None)
        kept = text.num_tokens - before
        choice.text += delta
        choice.token_ids += event.tokens[:kept]
        if choice.logprobs is not None and event.logprobs is not None:
            entries = list(zip(event.tokens[:kept], event.logprobs[:kept], strict=True))
            choice.logprobs += [self._logprob(token, entry) for token, entry in entries]
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + sum(e.logprob for _, e in entries)
        if event.prompt_logprobs is not None and output.prompt_logprobs is None:
            following = zip(output.prompt_token_ids, event.prompt_logprobs, strict=True)
            output.prompt_logprobs = [None if e is None else self._logprob(token, e) for token, e in following]
        output.num_cached_tokens = max(output.num_cached_tokens, event.num_cached_tokens)
        if event.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT):
            raise RowFailed(event.error or "the generation failed")
        if stopped_by is not None:
            choice.finish_reason, choice.stop_reason = FinishReason.STOP.value, stopped_by
        elif event.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = event.finish_reason.value, event.stop_reason
        output.finished = all(c.finish_reason is not None for c in output.outputs)

    def _logprob(self, token: int, entry: TokenLogprob) -> dict[int, Logprob]:
        found = {token: Logprob(entry.logprob, entry.rank, self.text.token_text(token))}
        for rank, (id, logprob) in enumerate(entry.top, start=1):
            found.setdefault(id, Logprob(logprob, rank, self.text.token_text(id)))
        return found

    # Constraints, and the private loop

    def _constraint(self, params: SamplingParams) -> Constraint:
        spec: StructuredOutputs | None = params.structured_outputs
        return FREE if spec is None else self._need_grammars().constraint(spec)

    def _need_grammars(self) -> GrammarCompiler:
        if self._grammars is None:
            raise InvalidRequest("structured_outputs needs the model's tokenizer, which has no files here")
        return self._grammars

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run on the private loop and wait. Ctrl-C cancels the work, which aborts its generations."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            future.cancel()


def _config(**fields: Any) -> EngineConfig:
    try:
        return EngineConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"LLM({name}={first.get('input')!r:.80}): {first['msg']}") from None


def _grammars(text: Text, eos_token_ids: tuple[int, ...]) -> GrammarCompiler | None:
    return None if text.tokenizer is None else GrammarCompiler(text.tokenizer, text.vocab_size, eos_token_ids)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or many? A list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(
    prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise InvalidRequest(f"{len(prompts)} prompts but {len(params)} sampling params: give one, or one for each")
    return params


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of the failures of several prompts, one: they mostly have one cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
