"""What a simulation of autoscaling is told: the traces, the policies and the machine, as a frozen value."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..runtime.errors import ConfigError
from .autoscale_config import AutoscalingConfig
from .sim_config import MACHINES, SimConfig, StepCosts, problems_of
from .sim_load import cold_request_s

TraceName = Literal["steady", "burst", "diurnal"]
PolicyName = Literal["shoal", "ray-default", "ray-tuned"]

STEADY = 3.0
QUIET, BUSY = 1.0, 4.0  # of bursts
STEP_SHARE, SPIKES, SPIKE_S = 0.25, 4, 60.0  # a long one, and some short ones
DIURNAL = (0.5, 5.0)  # at night, at noon


def rates(trace: TraceName, seconds: int, seed: int) -> list[float]:
    """What comes in each second, in what one full replica answers in it. seed: of when bursts begin."""
    if trace == "steady":
        return [STEADY] * seconds
    if trace == "diurnal":
        low, high = DIURNAL
        turn = 2 * math.pi / seconds
        return [(low + high) / 2 - (high - low) / 2 * math.cos(turn * (second + 0.5)) for second in range(seconds)]
    rng = random.Random(f"{seed}/bursts")
    found = [QUIET] * seconds
    lengths = [round(STEP_SHARE * seconds)] + [round(min(SPIKE_S, seconds / 10))] * SPIKES
    for length in lengths:
        begin = rng.randrange(seconds // 10, max(seconds // 10 + 1, seconds - length))
        found[begin : begin + length] = [BUSY] * length
    return found


class AutoscaleSimConfig(BaseModel):
    """One comparison. Every field is a flag of `shoal simulate-autoscaling`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    traces: tuple[TraceName, ...] = Field(
        ("steady", "burst", "diurnal"), min_length=1, description="Of steady, burst and diurnal."
    )
    policies: tuple[PolicyName, ...] = Field(
        ("shoal", "ray-tuned", "ray-default"),
        min_length=1,
        description="Of shoal, ray-default (Serve's policy as it comes) and ray-tuned (set for this very load).",
    )
    machine: Literal["h100-8b", "cpu-demo"] = Field(
        "h100-8b", description="Step times: an 8B model on an H100 (estimated), or the demo model on two cores."
    )
    hours: float = Field(1.0, gt=0, le=48, description="Length of a trace.")
    prompt_tokens: int = Field(4000, ge=1, description="Length of a prompt, in the mean.")
    answer_tokens: int = Field(250, ge=1, description="Length of an answer, in the mean.")
    start_s: float = Field(60.0, ge=0, description="Seconds until a new replica takes work.")
    min_replicas: int = Field(1, ge=1, description="As in autoscaling.")
    max_replicas: int = Field(12, ge=1, description="As in autoscaling.")
    ttft_s: float = Field(2.0, gt=0, description="The objective for first tokens; later ones are misses.")
    scale_down_after_s: float = Field(300.0, ge=0, description="As in autoscaling, for all policies but ray-default.")
    seed: int = Field(0, ge=0, description="The same seed gives the same figures.")
    jobs: int | None = Field(None, ge=1, description="Processes; default: one for each core.")

    @field_validator("traces", "policies", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`steady,burst`, as a flag gives it, or several flags."""
        return [name for given in ([value] if isinstance(value, str) else value) for name in given.split(",")]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"--min-replicas {self.min_replicas} is more than --max-replicas {self.max_replicas}")
        return self

    @property
    def costs(self) -> StepCosts:
        return MACHINES[self.machine]

    @property
    def autoscaling(self) -> AutoscalingConfig:
        """What our policy is told."""
        own = ("min_replicas", "max_replicas", "ttft_s", "scale_down_after_s")
        return AutoscalingConfig.model_validate(self.model_dump(include=set(own)))


class Trace:
    """When requests come: a rate over time, and moments under it."""

    def __init__(self, name: TraceName, config: AutoscaleSimConfig) -> None:
        self.seconds = round(3600 * config.hours)
        loads = rates(name, self.seconds, config.seed)
        a_second = 1 / cold_request_s(_sim(config, requests=1, replicas=1), config.costs)
        self._sums = [0.0, *accumulate(load * a_second for load in loads)]
        self.first = loads[0]
        self.config = _sim(config, requests=int(self._sums[-1]), replicas=self._at_first(config))

    def _at_first(self, config: AutoscaleSimConfig) -> int:
        """Replicas at the beginning: enough for it, as somebody would have seen to."""
        return min(config.max_replicas, max(config.min_replicas, math.ceil(self.first / 0.7)))

    def moment(self, count: float) -> float:
        """When so many requests have come, in seconds."""
        second = min(bisect_right(self._sums, count), len(self._sums) - 1) - 1
        return second + (count - self._sums[second]) / (self._sums[second + 1] - self._sums[second])


def autoscale_sim_config(values: Mapping[str, object]) -> AutoscaleSimConfig:
    """Raises ConfigError: one line a problem, each naming flag, limit and value."""
    try:
        return AutoscaleSimConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_of(error)) from None


def _sim(config: AutoscaleSimConfig, *, requests: int, replicas: int) -> SimConfig:
    return SimConfig.model_validate(
        {
            "replicas": replicas,
            "requests": max(1, requests),
            "workload": "unique",
            "load": 1.0,
            "system_tokens": max(1, config.prompt_tokens - config.prompt_tokens // 10),
            "message_tokens": max(1, config.prompt_tokens // 10),
            "answer_tokens": config.answer_tokens,
            "max_queued": 10**6,
            "seed": config.seed,
            "machine": config.machine,
        }
    )
