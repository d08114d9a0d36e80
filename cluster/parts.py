"""The parts of a deployment: each is some replicas of one model, and a Serve application of its own.

`stable` is what `engine` and `server` describe. A variant is another version of that model, beside it; a model is one
that clients ask for by its own name. Both say only what differs from `engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .autoscale_config import AutoscalingConfig

NAME = r"^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$"  # it is part of names in Kubernetes


class PartConfig(BaseModel):
    """What variants and models have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME, description="In metrics, weights and names of Serve applications.")
    engine: Mapping[str, Any] = Field(default_factory=dict, description="What differs from the root's `engine`.")
    replicas: int = Field(1, ge=1, description="Engines, where autoscaling does not say.")
    autoscaling: AutoscalingConfig | None = Field(None, description="How many replicas; without it: `replicas`.")


class VariantConfig(PartConfig):
    """Another version of the main model; `rollout` says what it gets to do."""


class ModelConfig(PartConfig):
    """A further model."""

    served_model_name: tuple[str, ...] = Field((), description="Names clients may ask for; default: the model's own.")
