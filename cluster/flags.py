"""Flags made from the config models' fields: one source for the name, the type, the default and the help text.

A section is one of `shoal.yaml`'s, or a simulation, which has no file.

A command that lists fields gets one keyword parameter a field, all None unless given, so that a flag that was not
typed never hides what the file says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import ShoalConfig, flag_of
from .sim_autoscale_config import AutoscaleSimConfig
from .sim_config import SimConfig

SIMULATION, AUTOSCALE_SIMULATION = "simulation", "autoscale-simulation"
WITHOUT_FILE: dict[str, type[BaseModel]] = {SIMULATION: SimConfig, AUTOSCALE_SIMULATION: AutoscaleSimConfig}
SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp"}


def _fields(section: str) -> dict[str, FieldInfo]:
    model = WITHOUT_FILE.get(section) or ShoalConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model.model_fields


def section_fields(section: str, *, skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(section, field) for every field of one section."""
    return [(section, name) for name in _fields(section) if name not in skip]


ENGINE_FLAGS = section_fields("engine", skip=("model",))
# A list of processes shows flags; and what is no single value has no flag.
FILE_ONLY = ("secret", "tenants", "ladder", "node_labels", "ingress_node_labels")
SERVE_FLAGS = [*section_fields("server", skip=FILE_ONLY), *section_fields("router", skip=FILE_ONLY), *ENGINE_FLAGS]

MODEL_HELP = "A folder, a hub id already in the local cache, or a .gguf file."
MaybeModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="shoal.yaml; flags win over it.")]


def with_flags(fields: Sequence[tuple[str, str]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: gives a Typer command a flag for each field, and calls it with `overrides` of those that were given.

    The command takes its own parameters and `overrides: dict[tuple[str, str], Any]`.
    """
    by_name = {name: (section, name) for section, name in fields}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "overrides"]

        def run(**given: Any) -> None:
            overrides = {by_name[name]: value for name, value in given.items() if name in by_name and _was_given(value)}
            command(**{p.name: given[p.name] for p in own}, overrides=overrides)

        flags = [_parameter(section, name) for section, name in fields]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*keyword, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*keyword, *flags)}
        return run

    return decorate


def _was_given(value: Any) -> bool:
    return value is not None and value != []


def _parameter(section: str, name: str) -> inspect.Parameter:
    field = _fields(section)[name]
    flag = flag_of(name)
    names = [f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag]
    names += [SHORT[name]] if name in SHORT else []
    kind = _plain_type(field.annotation)
    metavar = "<str>" if kind == list[str] else None
    option = typer.Option(*names, help=_help(field), show_default=False, metavar=metavar)
    annotation = Annotated[Union[kind, None], option]  # type: ignore[valid-type]  # noqa: UP007
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """The type without `| None`; a tuple of strings is read as a list, which is what a command line can repeat."""
    if get_origin(annotation) in (UnionType, Union):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is Literal:
        return annotation
    if get_origin(annotation) in (tuple, list, frozenset):
        return list[str]
    return annotation


def _help(field: FieldInfo) -> str:
    default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
    if default is None or default == ():
        return f"{field.description}"
    if isinstance(default, tuple):
        default = ",".join(default)
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, float):
        default = f"{default:g}"
    return f"{field.description} [default: {default}]"
