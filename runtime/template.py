"""Chat messages -> prompt text (under station 4), by the template in the model's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.exceptions import TemplateError

from .errors import ContextTooLong, InvalidRequest
from .sandbox import MeteredEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE = 2**20  # characters
TIME_LIMIT_S = 2.0
_HERE = "~continue-here~ "  # ends in a space: if that is gone from the rendering, the template strips its messages
_RESERVED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "chat_template"]
)


class ChatTemplate:
    """A compiled template. Safe to use from several threads.

    special: the named special tokens (`bos_token`, ...) that the template may write.
    max_characters: the longest prompt it may make.

    Raises:
        InvalidRequest: it is no template. (The client's fault only in that no chat request can be served.)
    """

    def __init__(
        self, source: str, special: Mapping[str, str] | None = None, *, max_characters: int = 2**24,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:  # fmt: skip
        if len(source) > MAX_TEMPLATE:
            raise InvalidRequest(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are allowed")
        self._special = dict(special or {})
        self._max_characters = max_characters
        self._knows_developer = "developer" in source
        self._template = _compile(source, time_limit_s)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `continue_final_message`: it ends with the last message's content, for the model to go on with.

        Raises:
            InvalidRequest: a message is malformed, the template refuses the conversation, or it takes too long.
            ContextTooLong: over `max_characters`.
        """
        chat = self._read(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other")
            chat[-1] = {**chat[-1], "content": (chat[-1]["content"] or "") + _HERE}
        variables = {
            **self._special,
            **_kwargs(template_kwargs or {}),
            "messages": chat,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(variables)
        return _up_to_here(text) if continue_final_message else text

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
            raise InvalidRequest("messages must be an array with at least one message", param="messages")
        return [_read(message, f"messages.{i}", self._knows_developer) for i, message in enumerate(messages)]

    def _run(self, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > self._max_characters:
                    raise ContextTooLong(
                        f"the prompt has more than {self._max_characters} characters (--max-model-len)",
                        param="messages",
                    )
        except ContextTooLong:
            raise
        except Exception as error:  # a template picks its own operands: any of Python's errors may come
            raise InvalidRequest(
                f"the model's chat template cannot render these messages: {_reason(error)}", param="messages"
            ) from error
        return "".join(pieces)


def _compile(source: str, time_limit_s: float) -> Template:
    environment = MeteredEnvironment(time_limit_s=time_limit_s)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.compile_metered(source)
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise InvalidRequest(f"the model's chat template cannot be compiled: {_reason(error)}") from error


def _read(message: Mapping[str, Any], where: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role is {role!r:.40}; it must be one of {', '.join(ROLES)}", param=where)
    if role == "developer" and not knows_developer:
        role = "system"
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "role": role}
    return {**message, "role": role, "content": _text(content, f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A string, or the texts of an array of parts, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be a string or an array of text parts", param=where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f'{where}.{i} must be {{"type": "text", "text": "..."}}', param=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _kwargs(given: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in given:
        if name in _RESERVED or not str(name).isidentifier() or str(name).startswith("_"):
            raise InvalidRequest(f"chat_template_kwargs cannot set {name!r:.80}", param="chat_template_kwargs")
    return given


def _up_to_here(text: str) -> str:
    """Cut behind the last message's content; stripped, where the template strips contents."""
    mark = _HERE.rstrip()
    at = text.rfind(mark)
    if at < 0:
        raise InvalidRequest("the model's chat template does not show the final message, so it cannot be continued")
    return text[:at] if text.startswith(_HERE, at) else text[:at].rstrip()


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _reason(error: BaseException) -> str:
    """A template's own words may quote a message at any length."""
    return f"{str(error) or type(error).__name__:.200}"
