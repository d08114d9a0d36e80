"""What the router is told of variants of a model: how much goes to which, and when to take one back.

It changes in place: an ingress is handed a new one while it serves (`Ingress.roll_out`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.misfit import Misfit

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

STABLE = "stable"
"""The variant that `engine` describes; all others stand beside it."""

Weight = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(gt=0, le=1)]


class RollbackConfig(BaseModel):
    """When a variant gets no more requests: what it may do worse than this ends its share at once."""

    model_config = _STRICT

    max_error_rate: float | None = Field(
        default=0.05, ge=0, le=1, description="Share of its requests that fail on our side."
    )
    max_ttft_s: float | None = Field(default=None, gt=0, description="Time to the first token, of nine in ten.")
    min_requests: int = Field(default=20, ge=1, le=10_000, description="Judged by no fewer.")
    window_s: float = Field(default=60.0, gt=0, description="Judged by those of the last so many seconds.")


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
    allow_variant_header: bool = Field(
        default=False, description="Clients may ask for a variant by its name (the header X-Shoal-Variant)."
    )
    shadow: dict[str, Share] = Field(
        default_factory=dict,
        description="Variant to the share of requests that is copied to it; what it answers is compared and dropped.",
    )
    max_shadows: int = Field(
        default=8, ge=1, le=1024, description="Copies in flight at one ingress; what is over is dropped."
    )
    shadow_timeout_s: float = Field(default=60.0, gt=0, le=3600, description="A copy that is slower is given up.")
    rollback: RollbackConfig | None = Field(
        default=None, description="Bounds that take a variant's share; without: never."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and not any(self.weights.values()):
            raise Misfit("all weights are 0: nobody would answer", "weights")
        return self

    def check_names(self, variants: Iterable[str]) -> None:
        """`variants`: all that stand beside stable, by name. Raises Misfit: weights or shadow name another."""
        known = {STABLE, *variants}
        for where, names in (("weights", self.weights), ("shadow", self.shadow)):
            for name in names:
                if name not in known:
                    sentence = f"{where} names the variant {name!r}; there is {', '.join(sorted(known))}"
                    raise Misfit(sentence, where, name)
