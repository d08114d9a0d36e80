"""What a client wants its output held to -> one llguidance grammar, within static limits (under station 4).

Nothing is compiled here and no pattern of a client's is run: only sizes, depths and references are looked at.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher

from .errors import InvalidRequest
from .generation import StructuredOutputs
from .tokenizer import check_unicode

MAX_SOURCE = 64 * 1024  # bytes of a schema, regex, grammar, or of all choices
MAX_GBNF = 8 * 1024  # its conversion takes quadratic time
MAX_DEPTH = 64
MAX_ENUM = 4096
_PARAM = "structured_outputs"

# Compact JSON: a model that may write spaces between tokens can do so until max_tokens. `oneOf` is taken as `anyOf`:
# telling the alternatives apart is what its users mean by it, and the engine cannot count how many match.
_JSON_OPTIONS: Any = {
    "whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False, "coerce_one_of": True,
}  # fmt: skip
_LARK_RULE = re.compile(r"[ \t]*(%|start[ \t]*:)")


def grammar_source(spec: StructuredOutputs) -> str:
    """The constraint as llguidance reads it; equal specs have equal texts.

    Raises:
        InvalidRequest: over a limit, a reference out of the schema, or not a schema at all; names the limit.
    """
    if spec.json is not None:
        return _json_source(spec.json)
    if spec.choice is not None:
        return _choice_source(spec.choice)
    if spec.regex is not None:
        return str(LLMatcher.grammar_from_regex(_regex(spec.regex)))
    assert spec.grammar is not None
    return str(LLMatcher.grammar_from_lark(_lark(spec.grammar)))


def _json_source(given: dict[str, Any] | str | bool) -> str:
    schema = _parsed(given) if isinstance(given, str) else given
    if schema is False:
        raise _refusal("the JSON schema is false: nothing satisfies it")
    if schema is True or schema == {}:
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise _refusal(f"the JSON schema must be an object; got {type(schema).__name__}")
    _check_schema(schema)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal("the JSON schema is not JSON") from error
    _check_size("the JSON schema", text, MAX_SOURCE)
    return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _parsed(text: str) -> Any:
    _check_size("the JSON schema", text, MAX_SOURCE)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal("the JSON schema is not JSON, or nested too deep") from error


def _check_schema(schema: dict[str, Any]) -> None:
    """Depth, sizes of enums, and that references stay inside. Not recursive: the depth is the client's."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _refusal(f"the JSON schema is nested more than {MAX_DEPTH} deep")
        if isinstance(node, dict):
            _check_node(node)
            waiting.extend((child, depth + 1) for child in node.values())
        elif isinstance(node, list):
            waiting.extend((child, depth + 1) for child in node)


def _check_node(node: dict[str, Any]) -> None:
    reference, enum = node.get("$ref"), node.get("enum")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise _refusal(f'the JSON schema has $ref {reference!r:.80}; only references into itself ("#...") are followed')
    if isinstance(enum, list) and len(enum) > MAX_ENUM:
        raise _refusal(f"an enum in the JSON schema has {len(enum)} values; at most {MAX_ENUM} are allowed")


def _choice_source(choices: list[str]) -> str:
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise _refusal("choice must be an array of at least one string")
    if len(choices) > MAX_ENUM:
        raise _refusal(f"choice has {len(choices)} entries; at most {MAX_ENUM} are allowed")
    rule = "start: " + " | ".join(_literal(choice) for choice in dict.fromkeys(choices))
    _check_size("choice", rule, MAX_SOURCE)
    return str(LLMatcher.grammar_from_lark(rule))


def _literal(text: str) -> str:
    check_unicode(text)
    return json.dumps(text, ensure_ascii=False)


def _regex(regex: str) -> str:
    """The whole answer must match, so anchors at the ends say nothing new; llguidance knows none."""
    _check_size("the regex", regex, MAX_SOURCE)
    regex = regex.removeprefix("^")
    body = regex.removesuffix("$")
    escaped = (len(body) - len(body.rstrip("\\"))) % 2
    return regex if escaped else body


def _lark(grammar: str) -> str:
    """Lark's syntax as it is; GBNF (llama.cpp's) converted."""
    _check_size("the grammar", grammar, MAX_SOURCE)
    if any(_LARK_RULE.match(line) for line in grammar.splitlines()):
        return grammar
    _check_size("the GBNF grammar", grammar, MAX_GBNF)
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # IndexError, RecursionError and others: it was not written for hostile input
        raise _refusal(f"the grammar is neither Lark (no start rule) nor GBNF: {error!s:.200}") from error


def _check_size(what: str, text: str, limit: int) -> None:
    check_unicode(text)
    size = len(text.encode())
    if size > limit:
        raise _refusal(f"{what} has {size} bytes; at most {limit} are allowed")


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param=_PARAM)
