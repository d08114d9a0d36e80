"""What a simulation is told: the machines, the load and the faults, as frozen values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..router.balance import BalancerName
from ..runtime.errors import ConfigError
from .config import flag_of

SPREAD = 4  # messages and answers are at most so many times as long as the mean


class StepCosts(BaseModel):
    """How long a step takes: a line through what it computes. And what one replica holds.

    A step takes `base_s`, `prefill_token_s` for each token of a prompt's chunk, `decode_row_s` for each sequence that
    gets its next token and `context_token_s` for each cached token that is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_s: float = Field(gt=0, description="Any step: weights read once, launches, the host's share.")
    prefill_token_s: float = Field(ge=0, description="A token of a prompt.")
    decode_row_s: float = Field(ge=0, description="A sequence's next token.")
    context_token_s: float = Field(ge=0, description="A cached token that attention reads.")
    kv_tokens: int = Field(ge=16, description="Tokens that the KV cache holds.")
    max_num_seqs: int = Field(default=256, ge=1, description="Sequences that run at once.")
    max_num_batched_tokens: int = Field(default=2048, ge=16, description="Token budget of one step.")
    block_size: int = Field(default=32, ge=16, le=256, description="Tokens in a KV block.")

    def step_s(self, prefill_tokens: int, rows: int, context: int) -> float:
        """Seconds that a step takes. context: cached tokens read, of all its sequences together."""
        return (
            self.base_s
            + prefill_tokens * self.prefill_token_s
            + rows * self.decode_row_s
            + context * self.context_token_s
        )


MACHINES = {
    # 8B parameters in bfloat16: 16 GB of weights at 80 % of 3.35 TB/s, 16 GFLOP a token at 600 TFLOP/s, 128 KiB of KV a
    # token. An estimate from the data sheet: no step of ours was measured there.
    "h100-8b": StepCosts(
        base_s=6e-3, prefill_token_s=27e-6, decode_row_s=10e-6, context_token_s=50e-9, kv_tokens=400_000
    ),
    # The demo model on two cores: a line through the batches of 1, 8 and 32 in benchmarks/RESULTS.md.
    "cpu-demo": StepCosts(
        base_s=9.5e-3, prefill_token_s=0.93e-3, decode_row_s=1.05e-3, context_token_s=36e-9, kv_tokens=40_000
    ),
}


class SimConfig(BaseModel):
    """One comparison. Every field is a flag of `shoal simulate`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    replicas: int = Field(64, ge=1, le=4096, description="Replicas, each with the real scheduler and block pool.")
    requests: int = Field(100_000, ge=1, le=10_000_000, description="Requests in all.")
    balancers: tuple[BalancerName, ...] = Field(
        ("prefix", "p2c", "round-robin"),
        min_length=1,
        description="Compare these, of prefix, p2c, round-robin and least-loaded.",
    )
    machine: Literal["h100-8b", "cpu-demo"] = Field(
        "h100-8b", description="Step times: an 8B model on an H100 (estimated), or the demo model on two cores."
    )
    calibrate: Path | None = Field(
        None, description="A JSON file with step times and sizes (the keys of StepCosts), instead of --machine."
    )
    workload: Literal["shared", "unique"] = Field(
        "shared", description="shared: conversations under tenants' system prompts; unique: no two prompts are alike."
    )
    load: float = Field(
        0.5, gt=0, le=100, description="Arrivals as a share of what the replicas could serve without a prefix cache."
    )
    burstiness: float = Field(
        1.0, gt=0, le=50, description="Of arrivals: deviation over mean of their gaps; 1 is Poisson, above: gamma."
    )
    tenants: int = Field(1024, ge=1, description="System prompts; the k-th is asked for 1/k as often as the first.")
    turns: int = Field(4, ge=1, le=64, description="Turns of a conversation, in the mean.")
    system_tokens: int = Field(1024, ge=1, description="Length of a system prompt, in the mean.")
    message_tokens: int = Field(64, ge=1, description="Length of a user's message, in the mean.")
    answer_tokens: int = Field(
        24, ge=1, description="Length of an answer, in the mean. Time to simulate grows with it."
    )
    think_s: float = Field(5.0, ge=0, description="Seconds between two turns of a conversation, in the mean.")
    ingresses: int = Field(2, ge=1, le=64, description="Routers, each of which knows only what it sent and was told.")
    beat_s: float = Field(0.5, gt=0, description="Seconds between two reports of a replica.")
    network_s: float = Field(0.5e-3, ge=0, description="Seconds from a router to a replica.")
    kill_every: float | None = Field(None, gt=0, description="Kill a replica each so many simulated seconds.")
    restart_s: float = Field(8.0, ge=0, description="Seconds until a killed replica is back, with an empty cache.")
    max_queued: int = Field(1024, ge=0, description="Generations that may wait at a replica.")
    seed: int = Field(0, ge=0, description="The same seed gives the same figures.")
    jobs: int | None = Field(None, ge=1, description="Processes; default: one for each balancer.")

    @field_validator("balancers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`prefix,p2c`, as a flag gives it, or several flags."""
        return [name for given in ([value] if isinstance(value, str) else value) for name in given.split(",")]

    @model_validator(mode="after")
    def _check_kills(self) -> Self:
        if self.kill_every is not None and self.restart_s >= self.kill_every * self.replicas:
            raise ValueError(
                f"--restart-s {self.restart_s:g} leaves no replica alive: with --kill-every {self.kill_every:g} and "
                f"--replicas {self.replicas} it must be below {self.kill_every * self.replicas:g}"
            )
        return self

    @property
    def max_turns(self) -> int:
        """Turns are drawn evenly from 1 to this, so that their mean is `turns`."""
        return 2 * self.turns - 1 if self.workload == "shared" else 1

    @property
    def max_model_len(self) -> int:
        """The longest that a conversation can get, in tokens."""
        return SPREAD * (self.system_tokens + self.max_turns * (self.message_tokens + self.answer_tokens))


def step_costs(config: SimConfig) -> StepCosts:
    """Of the file that --calibrate names, else of --machine.

    Raises:
        ConfigError: the file is not what it should be, or the longest conversation does not fit a replica.
    """
    costs = MACHINES[config.machine] if config.calibrate is None else _read_costs(config.calibrate)
    if config.max_model_len > costs.kv_tokens:
        raise ConfigError(
            f"--system-tokens {config.system_tokens}, --turns {config.turns}, --message-tokens {config.message_tokens} "
            f"and --answer-tokens {config.answer_tokens} make conversations of up to {config.max_model_len} tokens; "
            f"a replica holds {costs.kv_tokens}"
        )
    return costs


def sim_config(values: Mapping[str, object]) -> SimConfig:
    """Raises ConfigError: one line a problem, each naming flag, limit and value."""
    try:
        return SimConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_of(error)) from None


def problems_of(error: ValidationError) -> str:
    """One line a problem, each naming flag, limit and value."""
    return "\n".join(_flag(problem) + _words(problem) for problem in error.errors(include_url=False))


def _read_costs(file: Path) -> StepCosts:
    try:
        return StepCosts.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--calibrate {file}: {error.strerror or error}") from None
    except ValidationError as error:
        problems = error.errors(include_url=False)
    except ValueError as error:
        raise ConfigError(f"--calibrate {file} is not JSON: {error}") from None
    raise ConfigError("\n".join(f"--calibrate {file}: {_path(problem)}: {_words(problem)}" for problem in problems))


def _flag(problem: Mapping[str, Any]) -> str:
    """Nothing where the message names flags itself."""
    return f"{flag_of(str(problem['loc'][0]))}: " if problem["loc"] else ""


def _path(problem: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in problem["loc"]) or "the root"


def _words(problem: Mapping[str, Any]) -> str:
    given = "" if isinstance(problem["input"], Mapping | BaseModel) else f" (got {problem['input']!r:.80})"
    return f"{problem['msg'].removeprefix('Value error, ')}{given}"
