"""What is wrong with a config, a line for each problem: where it was said, what it is, what may have been meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..runtime.errors import ConfigError
from ..runtime.misfit import Misfit
from .yaml_lines import Step

Place = Callable[[Sequence[Step]], str]
"""Of a path in the config: the file and line that said it, or the flag."""

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class Problem(NamedTuple):
    """What a value that may stand by itself makes of others. path: of the key that is most to blame."""

    path: tuple[Step, ...]
    sentence: str


def refuse(problems: Iterable[Problem], place: Place | None = None) -> None:
    """Raises ConfigError: a line for each problem, with its place where that is known."""
    if lines := [sentence if place is None else f"{place(path)}: {sentence}" for path, sentence in problems]:
        raise ConfigError("\n".join(lines))


def explain(error: ValidationError, root: type[BaseModel], place: Place) -> list[str]:
    """One line for each problem that pydantic found in a `root`."""
    problems = map(_blamed, error.errors(include_url=False))
    return [f"{place(problem['loc'])}: {_sentence(problem, root)}" for problem in problems]


def misread(said: Any, meant: Any, path: tuple[Step, ...] = ()) -> Iterator[Problem]:
    """Where what is `said` in a file is of another kind than what pydantic makes of it: "8" for 8, true for 1.

    Editors and the chart refuse that by the schema, so it is refused everywhere.
    """
    if isinstance(meant, BaseModel) and isinstance(said, Mapping):
        for name in meant.model_fields_set & said.keys():
            yield from misread(said[name], getattr(meant, name), (*path, name))
    elif isinstance(meant, Mapping) and isinstance(said, Mapping):
        for name in meant.keys() & said.keys():
            yield from misread(said[name], meant[name], (*path, name))
    elif isinstance(meant, tuple) and isinstance(said, list):
        for i, (one, other) in enumerate(zip(said, meant, strict=False)):
            yield from misread(one, other, (*path, i))
    elif isinstance(meant, bool | int | float) and (
        isinstance(said, str) or isinstance(said, bool) != isinstance(meant, bool)
    ):
        hint = f"; without quotes it is {said}" if isinstance(said, str) else ""
        yield Problem(
            path, f"{dotted(path)} is {_KINDS[type(said)]} ({said!r:.80}) and must be {_KINDS[type(meant)]}{hint}"
        )


def dotted(path: Sequence[Step]) -> str:
    """`router.tenants[0].name`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def is_secret(path: Sequence[Step], root: type[BaseModel]) -> bool:
    """Whether a model on the way keeps the field out of its repr; then it stays out of messages, too."""
    model: type[BaseModel] | None = root
    for step in path:
        field = None if model is None else model.model_fields.get(str(step))
        if field is not None and not field.repr:
            return True
        model = _below(model, step)
    return False


def nested(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds: bare, or None, or in a list or as a mapping's values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict, Annotated):
        return next((model for part in get_args(annotation) if (model := nested(part)) is not None), None)
    return None


def _blamed(problem: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the key that is to blame, where a validator of several says which."""
    error = problem.get("ctx", {}).get("error")
    if not isinstance(error, Misfit):
        return problem
    return {**problem, "type": "misfit", "loc": (*problem["loc"], *error.path), "msg": str(error)}


def _sentence(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    path = problem["loc"]
    here = dotted(path) or "the root"
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {here}{_suggestion(path, root)}"
    if problem["type"] == "model_type":
        known = ", ".join((_model_at(path, root) or root).model_fields)
        return f"{here} is {kind_of(problem['input'])}; it must be a mapping with {known}"
    if problem["type"] == "missing":
        return f"{here} is missing"
    if problem["type"] == "misfit":
        return f"{here}: {problem['msg']}"
    if problem["input"] is None:
        return f"{here} has no value: give it one, or leave the key out"
    hidden = isinstance(problem["input"], Mapping) or is_secret(path, root)
    given = "" if hidden else f" (got {problem['input']!r:.80})"
    return f"{here}: {_words(problem, path, root)}{given}"


def _words(problem: Mapping[str, Any], path: Sequence[Step], root: type[BaseModel]) -> str:
    """What it must be: pydantic's sentence, where that is not Python's own tongue."""
    if problem["type"] in ("tuple_type", "list_type"):
        return f"must be a list and is {kind_of(problem['input'])}"
    if problem["type"] == "dict_type":
        return f"must be a mapping and is {kind_of(problem['input'])}"
    words = str(problem["msg"]).removeprefix("Value error, ")
    model = _model_at(path[:-1], root) if path else None
    field = None if model is None else model.model_fields.get(str(path[-1]))
    if problem["type"] == "string_pattern_mismatch" and field is not None:
        return f"{words}. {field.description}"
    return words


def kind_of(value: Any) -> str:
    """What a value is, in YAML's words."""
    return "empty" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def _suggestion(path: Sequence[Step], root: type[BaseModel]) -> str:
    """The nearest known key: in the same mapping, or in the section where it belongs."""
    *outer, key = path
    wanted = str(key).replace("-", "_")
    model = _model_at(outer, root) or root
    near = get_close_matches(wanted, model.model_fields, n=1)
    if near:
        return f"; did you mean {dotted((*outer, near[0]))}?"
    everywhere = {
        field: section
        for section, info in root.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for field in info.annotation.model_fields
    }
    near = get_close_matches(wanted, everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {everywhere[near[0]]}.{near[0]}?"
    return f"; known here: {', '.join(model.model_fields)}"


def _model_at(path: Sequence[Step], root: type[BaseModel]) -> type[BaseModel] | None:
    """The model at the end of `path`, or None."""
    model: type[BaseModel] | None = root
    for step in path:
        model = _below(model, step)
    return model


def _below(model: type[BaseModel] | None, step: Step) -> type[BaseModel] | None:
    """The model one step down. A step into a list stays: the list's field has led to its model already."""
    if model is None or isinstance(step, int):
        return model
    field = model.model_fields.get(step)
    return None if field is None else nested(field.annotation)
