"""The parts of a deployment: each is some replicas of one model, and a Serve application of its own.

`stable` is what `engine`, `server` and `autoscaling` describe. A variant is another version of that model, beside it; a
model is one that clients ask for by its own name. Both say only what differs from `engine`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..router.rollout_config import STABLE
from ..runtime.config import EngineConfig
from .autoscale_config import AutoscalingConfig

if TYPE_CHECKING:
    from .config import ShoalConfig

NAME = r"^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$"  # it is part of names in Kubernetes
MOST_REPLICAS = 10_000  # a slip of the finger, not a cluster
_LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LabelKey = Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=f"^{_LABEL}?$")]
"""As Ray and Kubernetes have them."""
SMALLER = "smaller"
"""The part of `server.smaller_model`."""


class EngineChanges(EngineConfig):
    """What differs from the root's `engine`: what is not said is as there."""

    model: str = Field("", description="A folder, a hub id already in the local cache, or a .gguf file.")


class PartConfig(BaseModel):
    """What variants and models have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=NAME,
        description="In metrics, weights and names of Serve applications: a lower-case letter, then lower-case "
        "letters, digits and hyphens, at most 20 in all.",
    )
    engine: EngineChanges = Field(
        default=EngineChanges.model_validate({}), description="What differs from the root's `engine`."
    )
    replicas: int = Field(1, ge=1, le=MOST_REPLICAS, description="Engines, where autoscaling does not say.")
    autoscaling: AutoscalingConfig | None = Field(None, description="How many replicas; without it: `replicas`.")
    node_labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, description="Labels of the Ray nodes that its replicas may lie on."
    )


class VariantConfig(PartConfig):
    """Another version of the main model; `rollout` says what it gets to do."""


class ModelConfig(PartConfig):
    """A further model."""

    served_model_name: tuple[str, ...] = Field((), description="Names clients may ask for; default: the model's own.")


@dataclass(frozen=True, slots=True)
class Part:
    """One of them, with nothing left to be looked up elsewhere.

    engine: what the root or the part has set counts as set. replicas: where `autoscaling` does not say.
    served_model_name: as given, so it may be empty; of a variant it is. node_labels: of nodes that may hold a replica.
    """

    name: str
    engine: EngineConfig
    replicas: int
    autoscaling: AutoscalingConfig | None
    served_model_name: tuple[str, ...]
    is_variant: bool
    node_labels: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """That clients may ask for, the first one is listed first; a variant answers to the main model's instead."""
        return self.served_model_name or (default_name(self.engine.model),)

    @property
    def most_replicas(self) -> int:
        """That there may ever be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


def parts(config: ShoalConfig) -> list[Part]:
    """All of a deployment: stable first, then the variants, then the other models."""
    server = config.server
    stable = Part(
        name=STABLE,
        engine=config.engine,
        replicas=server.replicas,
        autoscaling=config.autoscaling,
        served_model_name=config.router.served_model_name,
        is_variant=False,
        node_labels=server.node_labels,
    )
    models = list(config.models)
    if server.smaller_model is not None:
        models.append(ModelConfig.model_validate({"name": SMALLER, "engine": {"model": server.smaller_model}}))
    return [
        stable,
        *(_part(variant, config, served_model_name=(), is_variant=True) for variant in config.variants),
        *(_part(model, config, served_model_name=model.served_model_name, is_variant=False) for model in models),
    ]


def default_name(model: str) -> str:
    """What clients call the model where no name was given: a hub id as it is, a path's last part without `.gguf`."""
    path = Path(model).expanduser()
    return Path(os.path.abspath(path)).name.removesuffix(".gguf") if path.exists() else model


def _part(part: PartConfig, config: ShoalConfig, *, served_model_name: tuple[str, ...], is_variant: bool) -> Part:
    changes = part.engine.model_dump(exclude_unset=True)
    return Part(
        name=part.name,
        engine=config.engine.model_copy(update=changes),
        replicas=part.replicas,
        autoscaling=part.autoscaling,
        served_model_name=served_model_name,
        is_variant=is_variant,
        node_labels=part.node_labels,
    )
