"""`shoal config`: what a deployment's config says once file and flags are put together, and what one may say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel

from .config import Overrides, flag_of, load_config
from .flags import SERVE_FLAGS, ConfigFile, MaybeModel, with_flags
from .parts import EngineChanges
from .yaml_lines import Step, YamlFile

HIDDEN = "(hidden)"

config = typer.Typer(help="What shoal.yaml says, and what it may say.", no_args_is_help=True, rich_markup_mode=None)


@config.command()
@with_flags(SERVE_FLAGS)
def show(model: MaybeModel = None, *, config: ConfigFile = None, overrides: dict[tuple[str, str], Any]) -> None:
    """Print all that a service would be told, and where each value comes from. Secrets are not shown."""
    print(shown(_with_model(overrides, model), config), end="")


@config.command()
def schema() -> None:
    """Print the JSON schema of shoal.yaml, for editors."""
    from .config_doc import rendered
    from .config_doc import schema as made

    print(rendered(made()), end="")


@config.command("serve-config")
@with_flags(SERVE_FLAGS)
def serve_config(model: MaybeModel = None, *, config: ConfigFile = None, overrides: dict[tuple[str, str], Any]) -> None:
    """Print the Serve config that `shoal deploy` would apply, or why it would not."""
    from .preflight import grid_problems
    from .serve_config import deployed
    from .serve_config import serve_config as made

    loaded = load_config(_with_model(overrides, model), file=config, checks=(deployed, grid_problems))
    print(yaml.safe_dump(made(loaded), sort_keys=False), end="")


def shown(overrides: Overrides, file: Path | None) -> str:
    """The whole config as YAML, with each value's origin behind it: file and line, flag, or default.

    Raises:
        ConfigError: as `load_config`.
    """
    from .preflight import grid_problems

    return "".join(_Page(overrides, file).mapping(load_config(overrides, file=file, checks=(grid_problems,)), ()))


class _Page:
    """Writes one config down."""

    def __init__(self, overrides: Overrides, file: Path | None) -> None:
        self._overrides = overrides
        self._said = None if file is None else YamlFile(file)

    def mapping(self, model: BaseModel, path: tuple[Step, ...]) -> Iterator[str]:
        """One line a value, indented as deep as `path` is long. Of an `engine` in a part, what it changes."""
        indent = "  " * len(path)
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            here = (*path, name)
            if isinstance(model, EngineChanges) and name not in model.model_fields_set:
                continue
            if isinstance(value, BaseModel):
                yield f"{indent}{name}:\n"
                yield from self.mapping(value, here)
            elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
                yield f"{indent}{name}:\n"
                for i, entry in enumerate(value):
                    first, *rest = self.mapping(entry, (*here, i))
                    yield f"{indent}  - {first.lstrip()}"
                    yield from rest
            else:
                is_default = value == field.get_default(call_default_factory=True, validated_data={})
                plain = model.model_dump(mode="json", include={name})[name]
                text = _inline(plain if field.repr or is_default else HIDDEN)
                yield f"{indent}{name}: {text}  # {self._origin(here)}\n"

    def _origin(self, path: tuple[Step, ...]) -> str:
        if path[:2] in self._overrides:
            return flag_of(str(path[1]))
        return self._said.place(path) if self._said is not None and self._said.has(path) else "default"


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _with_model(overrides: dict[tuple[str, str], Any], model: str | None) -> Overrides:
    return overrides if model is None else overrides | {("engine", "model"): model}
