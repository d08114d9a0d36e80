"""What autoscaling of one part is told."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.misfit import Misfit


class AutoscalingConfig(BaseModel):
    """How many replicas there are, by what they owe their clients."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_replicas: int = Field(1, ge=0, description="Never fewer; 0: the last one goes when nobody has asked for long.")
    max_replicas: int = Field(ge=1, description="Never more.")
    ttft_s: float = Field(2.0, gt=0, description="The objective: nine of ten first tokens come in this time.")
    kv_usage: float = Field(0.8, gt=0, le=1, description="Share of the KV cache that may be in use, in the mean.")
    scale_up_after_s: float = Field(0.0, ge=0, description="More are started when they were wanted for so long.")
    scale_down_after_s: float = Field(300.0, ge=0, description="Fewer are kept when they sufficed for so long.")
    idle_s: float = Field(600.0, ge=0, description="With min_replicas 0: the last one goes after so long without work.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            sentence = f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}"
            raise Misfit(sentence, "min_replicas")
        return self
