"""The flags of `shoal simulate`, made from its config's fields. Cheap to import: the help loads no simulation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from .config import flag_of
from .sim_config import SimConfig


def with_sim_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: gives a Typer command a flag for each field, and calls it with `values` of those that were given."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "values"]

    def run(**given: Any) -> None:
        values = {name: given[name] for name in SimConfig.model_fields if given[name] is not None}
        command(**{p.name: given[p.name] for p in own}, values=values)

    flags = [_parameter(name, field) for name, field in SimConfig.model_fields.items()]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return run


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind: Any = field.annotation
    if get_origin(kind) is UnionType:
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    if get_origin(kind) is tuple:
        kind = str
    default = field.default
    shown = (
        ",".join(default) if isinstance(default, tuple) else f"{default:g}" if isinstance(default, float) else default
    )
    text = f"{field.description}" + ("" if default is None else f" [default: {shown}]")
    option = typer.Option(flag_of(name), help=text, show_default=False)
    kind = kind if get_origin(kind) is Literal or isinstance(kind, type) else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
