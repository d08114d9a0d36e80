"""Station 1, chat: messages as clients send them -> messages as a template reads them (role and plain text)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime.errors import InvalidRequest
from .schema import shown

ROLES = ("system", "developer", "user", "assistant")
_UNSUPPORTED_ROLES = ("tool", "function")
_UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "audio", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning")


def read_messages(messages: Sequence[dict[str, Any]], *, limit: int) -> list[dict[str, str]]:
    """Checked messages with string contents.

    Raises:
        InvalidRequest: an unknown role, a part that is not text, a field that is not supported; names its place.
    """
    if len(messages) > limit:
        raise InvalidRequest(
            f"messages has {len(messages)} entries; at most {limit} are allowed (max_messages)", param="messages"
        )
    return [_read(message, f"messages.{i}") for i, message in enumerate(messages)]


def _read(message: dict[str, Any], where: str) -> dict[str, str]:
    role = message.get("role")
    if role in _UNSUPPORTED_ROLES:
        raise _refusal(f"{where}.role", f"is {role!r}, which this server does not support yet", "unsupported_value")
    if role not in ROLES:
        raise _refusal(f"{where}.role", f"is {shown(role)}; it must be one of {', '.join(ROLES)}")
    for field in _UNSUPPORTED_FIELDS:
        if message.get(field):
            raise _refusal(f"{where}.{field}", "is given, which this server does not support yet", "unsupported_value")
    out = {"role": str(role), "content": _content(message.get("content"), where)}
    if message.get("name") is not None:
        out["name"] = _string(message["name"], f"{where}.name")
    for key in _REASONING:
        if role == "assistant" and message.get(key) is not None:
            out["reasoning_content"] = _string(message[key], f"{where}.{key}")
    return out


def _content(content: Any, where: str) -> str:
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(where, f"is {shown(content)}; it must be a string or an array of text parts")
    if not content:
        raise _refusal(where, "is an empty array; it must hold at least one text part")
    return "\n".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise _refusal(where, f"is {shown(part)}; it must be an object with a type")
    kind = part.get("type")
    if kind != "text":
        raise _refusal(f"{where}.type", f"is {shown(kind)}; only text parts are supported", "unsupported_value")
    return _string(part.get("text"), f"{where}.text")


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _refusal(where, f"is {shown(value)}; it must be a string")
    return value


def _refusal(param: str, problem: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"{param} {problem}", param=param, code=code)
