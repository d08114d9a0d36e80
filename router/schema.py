"""Station 1, the meaning: OpenAI's request bodies as strict models, with vLLM's names for what goes beyond.

Types are checked here, ranges by `SamplingParams`, lengths by `text.py`. Nothing is coerced: `"5"` is no integer. A
field that OpenAI or vLLM know, that would change the answer and that we lack is refused by name; one that changes
nothing is accepted; one that nobody knows is accepted and logged.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..runtime.errors import InvalidRequest
from ..runtime.generation import MAX_LOGPROBS

logger = logging.getLogger("shoal.router")

_STRICT = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)
_MAX_ENTRIES = 4096


def _check_size(value: Any) -> Any:
    """Before any entry is looked at."""
    if isinstance(value, dict) and len(value) > _MAX_ENTRIES:
        raise ValueError(f"at most {_MAX_ENTRIES} entries are allowed")
    return value


# Pydantic keeps every problem that it finds, and a body has room for millions: lists stop at the first one.
_FIRST = Field(fail_fast=True)
Bounded = Annotated[str, Field(max_length=512)]
Texts = Annotated[list[str], _FIRST]
Integers = Annotated[list[int], _FIRST]
Messages = Annotated[list[dict[str, Any]], _FIRST]
Strings = Annotated[Texts | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Body(BaseModel):
    model_config = _STRICT

    model: Bounded


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: changes no answer
    continuous_usage_stats: Literal[False] | None = None


class JsonSchema(BaseModel):
    model_config = _STRICT

    name: Bounded
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # we are always strict


class ResponseFormat(BaseModel):
    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputsBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None


class SamplingBody(Body):
    """What both generating routes share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: Strings = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_size)] = None
    response_format: ResponseFormat | None = None
    user: Bounded | None = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_check_size)] = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    structured_outputs: StructuredOutputsBody | None = None
    # ours
    truncation: Literal["auto", "disabled"] | None = None  # OpenAI's Responses API
    timeout: Annotated[float, Field(gt=0)] | None = None


class TemplateBody(BaseModel):
    """How messages become a prompt."""

    model_config = _STRICT

    messages: Annotated[Messages, Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(SamplingBody, TemplateBody):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(SamplingBody):
    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Body):
    prompt: Any = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: Integers


AnyBody = TypeVar("AnyBody", bound=BaseModel)

# Known, harmless: they change how OpenAI bills, stores or routes, never what is answered.
_HARMLESS = {
    "best_of",  # where it equals n
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "include_reasoning",
}
# Known, not supported: the values besides null that ask for nothing, so may pass.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "suffix": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "moderation": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "return_token_ids": (False,),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "thinking_token_budget": (),
    "truncation_side": ("left",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
_HINTS = {
    "guided_json": "; use structured_outputs",
    "guided_regex": "; use structured_outputs",
    "guided_choice": "; use structured_outputs",
    "guided_grammar": "; use structured_outputs",
    "chat_template": "; the model's own template is used",
}
# Of the other generating route: a client that sends them here expects an effect.
_CHAT_ONLY: dict[str, tuple[Any, ...]] = {
    "messages": (),
    "max_completion_tokens": (),
    "top_logprobs": (),
    "add_generation_prompt": (),
    "continue_final_message": (),
    "chat_template_kwargs": (),
}
_COMPLETION_ONLY: dict[str, tuple[Any, ...]] = {"prompt": (), "echo": (False,), "add_special_tokens": (False,)}
_ELSEWHERE = {ChatRequest: _COMPLETION_ONLY, CompletionRequest: _CHAT_ONLY}


def parse(kind: type[AnyBody], raw: dict[str, Any]) -> AnyBody:
    """The body as `kind`.

    Raises:
        InvalidRequest: a field is missing, of the wrong type, or known and not supported; names field and value.
    """
    try:
        body = kind.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from None
    _refuse_unsupported(raw, kind)
    _log_unknown(raw, kind)
    return body


def _refuse_unsupported(raw: dict[str, Any], kind: type[BaseModel]) -> None:
    for name, value in raw.items():
        if value is None:
            continue
        if name == "best_of":
            if isinstance(value, bool) or value != (raw.get("n") or 1):
                raise _unsupported(name, value, "; it must equal n")
        elif name in _UNSUPPORTED:
            if not any(value == idle and isinstance(value, type(idle)) for idle in _UNSUPPORTED[name]):
                raise _unsupported(name, value, _HINTS.get(name, ""))
        elif name in (elsewhere := _ELSEWHERE.get(kind, {})) and value not in elsewhere[name]:
            raise _unsupported(name, value, " on this route")


def _unsupported(name: str, value: Any, hint: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is {shown(value)}, which this server does not support yet{hint}",
        param=name,
        code="unsupported_parameter",
    )


def _log_unknown(raw: dict[str, Any], kind: type[BaseModel]) -> None:
    """Names only, and not many of them: values are the client's."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    names = [name for name in raw if name not in known and name not in _UNSUPPORTED and name not in _HARMLESS]
    if names:
        logger.info("ignored %d unknown request fields: %s", len(names), ", ".join(f"{n!r:.64}" for n in names[:16]))


def _explain(error: ValidationError) -> InvalidRequest:
    """The first problem, with the path to it; a union's branches are no part of the path."""
    problem = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in problem["loc"] if not _is_branch(part)]
    param = ".".join(path)[:200]
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param=param, code="missing_required_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidRequest(
        f"{param} is {shown(problem['input'])}: {message[:1].lower()}{message[1:300]}",
        param=param,
        code="invalid_type" if problem["type"].endswith("_type") else "invalid_value",
    )


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("str", "bool", "int") or "[" in part)


def shown(value: Any) -> str:
    """A value as an error may show it: its kind and a short repr."""
    if isinstance(value, str) and len(value) > 60:
        return f"a string of {len(value)} characters"
    if isinstance(value, list) and len(value) > 8:
        return f"an array of {len(value)} entries"
    if isinstance(value, dict) and len(value) > 8:
        return f"an object of {len(value)} entries"
    return f"{value!r:.80}"
