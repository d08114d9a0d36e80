"""What the router is told of variants of a model: how much goes to which, and when to take one back.

It changes in place: an ingress is handed a new one while it serves (`Ingress.roll_out`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

STABLE = "stable"
"""The variant that `engine` describes; all others stand beside it."""

Weight = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(gt=0, le=1)]


class RollbackConfig(BaseModel):
    """When a variant gets no more requests: what it may do worse than this ends its share at once."""

    model_config = _STRICT

    max_error_rate: float | None = Field(0.05, ge=0, le=1, description="Share of its requests that fail on our side.")
    max_ttft_s: float | None = Field(None, gt=0, description="Time to the first token, of nine in ten.")
    min_requests: int = Field(20, ge=1, description="Judged by no fewer.")
    window_s: float = Field(60.0, gt=0, description="Judged by those of the last so many seconds.")


class RolloutConfig(BaseModel):
    """Which variant answers. Weights are relative: 95 and 5 are as 0.95 and 0.05."""

    model_config = _STRICT

    weights: dict[str, Weight] = Field(
        default_factory=dict, description="Variant to its share of the requests; without any, stable takes all."
    )
    sticky_by: Literal["none", "user", "session"] = Field(
        default="session",
        description="Requests of one session (the header X-Shoal-Session, else the body's `user`), or of one `user`, "
        "go to one variant while the weights stay.",
    )
    shadow: dict[str, Share] = Field(
        default_factory=dict,
        description="Variant to the share of requests that is copied to it; what it answers is compared and dropped.",
    )
    rollback: RollbackConfig | None = Field(
        default=None, description="Bounds that take a variant's share; without: never."
    )
