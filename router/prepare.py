"""Station 4, on the way down: request bodies become generations, within the limits of the model and of the router.

Every choice of every prompt is a log of its own, with a seed of its own. Everything is refused here that can be, so
before the first byte of a 200 and before the engine.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ..runtime.errors import ContextTooLong, InvalidRequest
from ..runtime.generation import (
    GenerationRequest,
    SamplingParams,
    StructuredOutputs,
)
from ..runtime.text import Text, choice_seed
from .backend import ModelInfo
from .config import RouterConfig
from .ladder import NOTHING, Degradation
from .messages import read_messages
from .rates import most_tokens
from .schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseFormat,
    SamplingBody,
    TokenizeRequest,
    shown,
)
from .tenant import Tenant

COMPLETION_MAX_TOKENS = 16
_ANSWER_SHARE = 4  # of the context one part is the answer's, where a conversation must be cut
_LONG_TEXT = 4096  # characters or tokens; from here on reading would hold up the event loop: a thread takes it
# Fields of the body that are SamplingParams' as they stand.
_SAMPLING = (
    *("n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output"),
    *("skip_special_tokens", "prompt_logprobs"),
)
T = TypeVar("T")


class Prompt(msgspec.Struct, frozen=True):
    """Token ids, and the text they were made of (None: they came as ids)."""

    ids: list[int]
    text: str | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request, understood: `requests[prompt * n + choice]` are its logs.

    echo: the text of each prompt, where it is to stand before its answers. prompt_logprobs: whether they are wanted by
    themselves; an echo has them made, too. degraded: what was cut short under load, and to what.
    """

    prompts: list[Prompt]
    requests: list[GenerationRequest]
    n: int
    echo: list[str] | None = None
    prompt_logprobs: bool = False
    degraded: dict[str, int | str] = {}

    def most_tokens(self) -> int:
        """What it may come to: each prompt once, and all answers."""
        return sum(len(prompt.ids) for prompt in self.prompts) + sum(r.params.max_tokens or 0 for r in self.requests)


class Preparer:
    """Bodies -> jobs, within the limits of the model and of the router.

    given_up: what the load does not allow now. timeout_s: the deadline that the request's headers name, from now.
    """

    def __init__(
        self,
        text: Text,
        info: ModelInfo,
        config: RouterConfig,
        *,
        given_up: Degradation = NOTHING,
        timeout_s: float | None = None,
    ) -> None:
        self._text = text
        self._info = info
        self._config = config
        self._given_up = given_up
        self._timeout_s = timeout_s

    async def chat(self, body: ChatRequest, *, id: str, tenant: Tenant) -> Job:
        """Raises InvalidRequest, ContextTooLong."""
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise InvalidRequest(
                f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one",
                param="max_tokens",
            )
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if asked is not None and asked < 1:
            name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequest(f"{name} is {asked}; it must be at least 1", param=name)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest(f"top_logprobs is {body.top_logprobs}; it needs logprobs: true", param="top_logprobs")
        params = self._params(body, max_tokens=asked, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        ids = await self._encode_chat(body)
        return self._job([Prompt(ids)], body, params, default=None, id=id, tenant=tenant)

    async def completion(self, body: CompletionRequest, *, id: str, tenant: Tenant) -> Job:
        """Raises InvalidRequest, ContextTooLong."""
        params = self._params(body, max_tokens=body.max_tokens, logprobs=body.logprobs)
        if body.echo and body.logprobs is not None:
            params = _replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
        text = body.prompt
        if body.truncation == "auto":
            text = self._shortened(text)
        prompts = await self._prompts(text, add_special_tokens=body.add_special_tokens is not False)
        job = self._job(prompts, body, params, default=COMPLETION_MAX_TOKENS, id=id, tenant=tenant)
        if not body.echo:
            return job
        texts = await _off_loop(
            lambda: [self._text.decode(prompt.ids) if prompt.text is None else prompt.text for prompt in job.prompts],
            size=sum(len(prompt.ids) for prompt in job.prompts if prompt.text is None),
        )
        return msgspec.structs.replace(job, echo=texts)

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Raises InvalidRequest."""
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        if body.messages is not None:
            if body.add_special_tokens:
                raise InvalidRequest(
                    "add_special_tokens needs a prompt: templates write their own", param="add_special_tokens"
                )
            return await self._encode_chat(body)
        if not isinstance(body.prompt, str):
            raise InvalidRequest(f"prompt is {shown(body.prompt)}; it must be a string", param="prompt")
        (prompt,) = await self._prompts(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        return prompt.ids

    async def detokenize(self, body: DetokenizeRequest) -> str:
        """Raises InvalidRequest, ContextTooLong."""
        num, limit = len(body.tokens), self._info.max_model_len
        if num > limit:
            raise ContextTooLong(f"tokens has {num} ids; the context holds {limit} (--max-model-len)", param="tokens")
        self._text.check_tokens(body.tokens, param="tokens")
        return await _off_loop(lambda: self._text.decode(body.tokens), size=num)

    # Parameters

    def _params(self, body: SamplingBody, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Ranges are checked by `SamplingParams` itself; here what needs the model or the router's limits."""
        if body.n is not None and body.n > self._config.max_n:
            raise InvalidRequest(f"n is {body.n}; at most {self._config.max_n} are allowed (max_n)", param="n")
        given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        params = SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=self._bias(body.logit_bias or {}),
            structured_outputs=_constraint(body),
        )
        self._text.check_tokens(params.stop_token_ids, param="stop_token_ids")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        return params

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        bias: dict[int, float] = {}
        for key, value in given.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < self._info.vocab_size):
                raise InvalidRequest(
                    f"logit_bias has the key {key!r:.80}; keys are token ids from 0 to {self._info.vocab_size - 1}",
                    param="logit_bias",
                )
            bias[int(key)] = value
        return bias

    # Prompts

    async def _prompts(self, prompt: Any, *, add_special_tokens: bool) -> list[Prompt]:
        size = len(prompt) if isinstance(prompt, str) else sum(map(_size, prompt)) if isinstance(prompt, list) else 0
        return await _off_loop(lambda: self._read_prompts(prompt, add_special_tokens=add_special_tokens), size=size)

    def _read_prompts(self, prompt: Any, *, add_special_tokens: bool) -> list[Prompt]:
        """All four forms: text, texts, ids, lists of ids."""
        if isinstance(prompt, str):
            return [self._read_prompt(prompt, "prompt", kind=str, add_special_tokens=add_special_tokens)]
        if not isinstance(prompt, list) or not prompt:
            raise InvalidRequest(
                f"prompt is {shown(prompt)}; it must be a string, an array of strings, an array of token ids or an "
                "array of arrays of token ids, and not empty",
                param="prompt",
            )
        first: Any = prompt[0]
        if not isinstance(first, str | list):
            self._text.check_tokens(prompt)
            return [Prompt(prompt)]
        limit = self._config.max_prompts
        if len(prompt) > limit:
            raise InvalidRequest(f"prompt has {len(prompt)} prompts; at most {limit} are allowed", param="prompt")
        return [
            self._read_prompt(item, f"prompt.{i}", kind=type(first), add_special_tokens=add_special_tokens)
            for i, item in enumerate(prompt)
        ]

    def _read_prompt(self, item: Any, where: str, *, kind: type[Any], add_special_tokens: bool) -> Prompt:
        if type(item) is not kind or not item:
            what = "a string" if kind is str else "an array of token ids"
            raise InvalidRequest(f"{where} is {shown(item)}; it must be {what}, and not empty", param="prompt")
        if isinstance(item, str):
            return Prompt(self._text.encode_prompt(item, add_special_tokens=add_special_tokens), item)
        self._text.check_tokens(item, param=where)
        return Prompt(item)

    async def _encode_chat(self, body: ChatRequest | TokenizeRequest) -> list[int]:
        messages = read_messages(body.messages or [], limit=self._config.max_messages)
        resume = bool(body.continue_final_message)
        generate = not resume if body.add_generation_prompt is None else body.add_generation_prompt
        if resume and generate:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        return await _off_loop(
            lambda: self._text.encode_chat(
                messages,
                add_generation_prompt=generate,
                continue_final_message=resume,
                template_kwargs=body.chat_template_kwargs or {},
            ),
            size=sum(len(message["content"]) for message in messages),
        )

    # Generations

    def _job(
        self,
        prompts: list[Prompt],
        body: SamplingBody,
        params: SamplingParams,
        *,
        default: int | None,
        id: str,
        tenant: Tenant,
    ) -> Job:
        prompts = [self._truncated(prompt, body.truncate_prompt_tokens, params.max_tokens or 0) for prompt in prompts]
        degraded: dict[str, int | str] = {} if self._given_up.model is None else {"model": self._given_up.model}
        if body.truncation == "auto":
            prompts = self._truncated_to_fit(prompts, params.max_tokens, default, degraded)
        limits = self._config
        choices = len(prompts) * params.n
        if choices > limits.max_choices:
            raise InvalidRequest(
                f"{len(prompts)} prompts x n {params.n} are {choices} choices; at most {limits.max_choices} are "
                "allowed (max_choices)",
                param="n",
            )
        if tenant.max_in_flight is not None and choices > tenant.max_in_flight:
            raise InvalidRequest(
                f"{len(prompts)} prompts x n {params.n} are {choices} choices; {tenant.name} may have "
                f"{tenant.max_in_flight} in flight (the tenant's max_in_flight)",
                param="n",
            )
        room = _room(tenant, prompts, choices)
        fitted = [self._fit(params, len(prompt.ids), default, room) for prompt in prompts]
        fitted = [self._capped(params, degraded) for params in fitted]
        total = sum((p.max_tokens or 0) * params.n for p in fitted)
        if total > limits.max_total_tokens:
            raise InvalidRequest(
                f"prompts x n x max_tokens are {total} tokens; at most {limits.max_total_tokens} are allowed "
                "(max_total_tokens)",
                param="max_tokens",
            )
        seed = self._draw_seed() if params.seed is None else params.seed
        timeout = self._timeout(body.timeout)
        requests = [
            GenerationRequest(
                id=f"{id}-{i * params.n + j}",
                prompt=prompt.ids,
                params=fitted[i],
                seed=choice_seed(seed, i, j),
                tenant=tenant.salt,
                account=tenant.name,
                share=tenant.weight,
                priority=tenant.priority if body.priority is None else max(tenant.priority, body.priority),
                timeout_s=timeout,
                digest=self._info.digest,
            )
            for i, prompt in enumerate(prompts)
            for j in range(params.n)
        ]
        wanted = body.prompt_logprobs is not None
        return Job(prompts=prompts, requests=requests, n=params.n, prompt_logprobs=wanted, degraded=degraded)

    def _draw_seed(self) -> int:
        """Where all answers are cached, equal requests are to have equal ones."""
        return 0 if self._config.cache_mode == "all" else secrets.randbits(63)

    def _truncated(self, prompt: Prompt, keep: int | None, max_tokens: int) -> Prompt:
        """The prompt's last `keep` tokens; -1: as many as the context takes beside the answer."""
        if keep is None:
            return prompt
        if keep != -1 and not 1 <= keep <= self._info.max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {keep}; it must be -1 or 1 to {self._info.max_model_len}",
                param="truncate_prompt_tokens",
            )
        keep = max(1, self._info.max_model_len - max(1, max_tokens)) if keep == -1 else keep
        return prompt if len(prompt.ids) <= keep else Prompt(prompt.ids[-keep:])

    def _truncated_to_fit(
        self, prompts: list[Prompt], max_tokens: int | None, default: int | None, degraded: dict[str, int | str]
    ) -> list[Prompt]:
        """`truncation: auto`: the last tokens that fit, or as many as the load allows.

        Only ids are cut, from the left: what a template or tokenizer began the prompt with goes first. A prompt that is
        cut leaves room for an answer: of the length that was asked for, else the default's or a quarter of the context.
        """
        context, allowed = self._info.max_model_len, self._given_up.truncate_to
        most = context - max(1, max_tokens or 0)
        answer = max_tokens if max_tokens is not None else default if default is not None else context // _ANSWER_SHARE
        keep = max(1, context - max(1, answer))
        if allowed is not None and any(len(prompt.ids) > allowed for prompt in prompts):
            degraded["truncate_to"] = allowed
            most, keep = min(most, allowed), min(keep, allowed)
        return [prompt if len(prompt.ids) <= most else Prompt(prompt.ids[-keep:]) for prompt in prompts]

    def _shortened(self, prompt: Any) -> Any:
        """Text without what no tokenization could fit, so that it may be cut at all."""
        if isinstance(prompt, list):
            return [self._shortened(item) if isinstance(item, str) else item for item in prompt]
        return prompt[-self._text.max_characters :] if isinstance(prompt, str) else prompt

    def _capped(self, params: SamplingParams, degraded: dict[str, int | str]) -> SamplingParams:
        """No longer than the load allows."""
        allowed = self._given_up.max_tokens
        if allowed is None or params.max_tokens is None or params.max_tokens <= allowed:
            return params
        degraded["max_tokens"] = allowed
        return _replace(params, max_tokens=allowed, min_tokens=min(params.min_tokens, allowed))

    def _fit(self, params: SamplingParams, num_prompt: int, default: int | None, most: int | None) -> SamplingParams:
        """One log's parameters: n is 1, and max_tokens a number that context and `most` have room for."""
        asked = params.max_tokens
        self._text.check_length(num_prompt, asked)
        room = self._info.max_model_len - num_prompt
        if asked is None:
            room = room if most is None else min(room, most)
            asked = room if default is None else min(default, room)
        return _replace(params, n=1, seed=None, max_tokens=asked)

    def _timeout(self, asked: float | None) -> float:
        """The tighter of the body's deadline and the headers'."""
        limit = self._config.max_timeout_s
        named = [seconds for seconds in (asked, self._timeout_s) if seconds is not None]
        if any(seconds > limit for seconds in named):
            raise InvalidRequest(
                f"timeout is {max(named):g}; at most {limit:g} s are allowed (max_timeout_s)", param="timeout"
            )
        return min(named, default=min(self._config.default_timeout_s, limit))


def _room(tenant: Tenant, prompts: list[Prompt], num_choices: int) -> int | None:
    """Tokens of one answer whose length nobody named, so that the whole can be within the tenant's limits at all."""
    most = most_tokens(tenant)
    return None if most is None else max(1, (most - sum(len(prompt.ids) for prompt in prompts)) // num_choices)


def _constraint(body: SamplingBody) -> StructuredOutputs | None:
    given = body.structured_outputs
    wanted = None if body.response_format is None else _schema(body.response_format)
    if given is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest("response_format and structured_outputs exclude each other", param="structured_outputs")
    return StructuredOutputs(json=_text(given.json_), regex=given.regex, choice=given.choice, grammar=given.grammar)


def _schema(wanted: ResponseFormat) -> StructuredOutputs | None:
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputs(json='{"type":"object"}')
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise InvalidRequest(
            "response_format of type json_schema needs json_schema.schema", param="response_format.json_schema.schema"
        )
    return StructuredOutputs(json=_text(wanted.json_schema.schema_))


def _text(schema: dict[str, Any] | str | bool | None) -> str | None:
    """A schema travels as text: JSON's integers may be longer than the wire's."""
    return schema if schema is None or isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def _replace(params: SamplingParams, **changes: Any) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


def _size(item: object) -> int:
    return len(item) if isinstance(item, str | list) else 1


async def _off_loop(work: Callable[[], T], *, size: int) -> T:
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)
