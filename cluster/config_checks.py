"""What the parts of a deployment make of each other: names, and stages. A problem has the key most to blame for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..router.config import Rung
from ..runtime.misfit import Misfit
from .config_errors import Problem
from .parts import SMALLER, Part, parts
from .yaml_lines import Step

if TYPE_CHECKING:
    from .config import ShoalConfig

Placed = tuple[tuple[Step, ...], Part]
"""A part, and where it is said: the root for the main one."""


def placed_parts(config: ShoalConfig) -> list[Placed]:
    """All of a deployment, the main one first."""
    sections = (("variants", config.variants), ("models", config.models))
    beside = [(name, i) for name, entries in sections for i in range(len(entries))]
    return list(zip([(), *beside, ("server", "smaller_model")], parts(config), strict=False))


def part_problems(config: ShoalConfig) -> Iterator[Problem]:
    """Names that are there twice, names of what is not there, and stages that do not go with their layers."""
    placed = placed_parts(config)
    yield from _names(placed)
    served = _owners(placed)
    yield from _served(placed, served)
    yield from _rungs(config.router.ladder, [name for name, owner in served.items() if owner is not placed[0][1]])
    try:
        config.rollout.check_names(part.name for _, part in placed if part.is_variant)
    except Misfit as error:
        yield Problem(("rollout", *error.path), f"rollout.{error}")
    for path, part in placed:
        yield from _stages(path, part)


def _names(placed: Sequence[Placed]) -> Iterator[Problem]:
    names: set[str] = set()
    for path, part in placed:
        if part.name in names:
            yield Problem(
                path if part.name == SMALLER else (*path, "name"),
                f"two variants or models have the name {part.name!r}; stable and {SMALLER!r} have theirs already",
            )
        names.add(part.name)


def _owners(placed: Sequence[Placed]) -> dict[str, Part]:
    """What clients may ask for -> who answers: the first that says so."""
    served: dict[str, Part] = {}
    for _, part in placed:
        if not part.is_variant:
            served = dict.fromkeys(part.names, part) | served
    return served


def _served(placed: Sequence[Placed], served: dict[str, Part]) -> Iterator[Problem]:
    for path, part in placed:
        here = (*(path or ("router",)), "served_model_name") if part.served_model_name else path
        if "" in part.served_model_name or len(set(part.served_model_name)) < len(part.served_model_name):
            yield Problem(
                here, f"served_model_name is {list(part.served_model_name)}: each name is one, and there once"
            )
        for name in () if part.is_variant else part.names:
            if (other := served[name]) is not part:
                source = f"--smaller-model {part.engine.model}" if part.name == SMALLER else f"the model {part.name!r}"
                whose = "the main one is" if other is placed[0][1] else f"the model {other.name!r} is"
                yield Problem(here, f"{source} would be served as {name!r}, as {whose}")


def _rungs(ladder: Sequence[Rung], known: Sequence[str]) -> Iterator[Problem]:
    for i, rung in enumerate(ladder):
        if rung.model is not None and rung.model not in known:
            there = "only " + ", ".join(map(repr, known)) if known else "no other model"
            yield Problem(
                ("router", "ladder", i, "model"),
                f"router.ladder names the model {rung.model!r}, and there is {there} to fall to: set --smaller-model, "
                "or add it under models",
            )


def _stages(path: tuple[Step, ...], part: Part) -> Iterator[Problem]:
    layers, stages = part.engine.pp_layers, part.engine.pipeline_parallel_size
    here = (*path, "engine", "pp_layers")
    if layers is not None and len(layers) != stages:
        yield Problem(
            here,
            f"pp_layers names {len(layers)} stages, {','.join(map(str, layers))}, and pipeline_parallel_size is "
            f"{stages}: they must agree",
        )
    elif layers is not None and min(layers) < 1:
        yield Problem(here, f"pp_layers is {','.join(map(str, layers))}: a stage has at least one layer")
