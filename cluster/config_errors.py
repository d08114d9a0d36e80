"""What is wrong with a config, a line for each problem: where it was said, what it is, what may have been meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .yaml_lines import Step

Place = Callable[[Sequence[Step]], str]
"""Of a path in the config: the file and line that said it, or the flag."""


def explain(error: ValidationError, root: type[BaseModel], place: Place) -> list[str]:
    """One line for each problem that pydantic found in a `root`."""
    return [f"{place(problem['loc'])}: {_sentence(problem, root)}" for problem in error.errors(include_url=False)]


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


def _sentence(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    path = problem["loc"]
    here = dotted(path) or "the root"
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {here}{_suggestion(path, root)}"
    if problem["type"] == "model_type":
        known = ", ".join((_model_at(path, root) or root).model_fields)
        return f"{here} is a {type(problem['input']).__name__}; it must be a mapping with {known}"
    if problem["type"] == "missing":
        return f"{here} is missing"
    hidden = isinstance(problem["input"], Mapping) or is_secret(path, root)
    given = "" if hidden else f" (got {problem['input']!r:.80})"
    return f"{here}: {problem['msg'].removeprefix('Value error, ')}{given}"


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
