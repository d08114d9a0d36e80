"""The policies that a simulation of autoscaling sets side by side: ours, and Ray Serve's own, from its package."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from ..router.load_report import LoadReport
from .autoscale_config import AutoscalingConfig
from .scaling import Scaling, View
from .sim_autoscale_config import AutoscaleSimConfig, PolicyName
from .sim_config import SimConfig
from .sim_load import cold_request_s

TUNED_LOAD = 0.7  # what Serve's policy is tuned for, as ours begins with


class Policy(Protocol):
    """Settles how many replicas there are to be. Asked once a simulated second."""

    def decide(self, now: float, *, target: int, reports: Mapping[str, LoadReport | None], ongoing: int) -> int:
        """target: what it has said last. reports: of replicas that take work, a second old. ongoing: requests that are
        there, or on no replica yet."""
        ...


class Ours:
    """`Scaling`, as `ServePolicy` asks it."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self.scaling = Scaling(config)

    def decide(self, now: float, *, target: int, reports: Mapping[str, LoadReport | None], ongoing: int) -> int:
        return self.scaling.decide(View(target=target, replicas=reports), now).replicas


class Rays:
    """Serve's default policy with its factors and delays: its own functions, on the simulation's clock.

    It goes by requests under way a replica: the mean over what was sampled in `look_back_period_s` before the last
    push, one each `metrics_interval_s`, the last sample held until now.
    """

    def __init__(self, **settings: Any) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve._private import metrics_utils
        from ray.serve.config import AutoscalingConfig as ServeConfig

        self._ray: Any = autoscaling_policy
        self._metrics: Any = metrics_utils
        self._config = ServeConfig(**settings)
        self._state: dict[str, Any] = {}
        self._samples: deque[Any] = deque()
        self._pushed: list[Any] = []
        self._pushed_at = float("-inf")

    def decide(self, now: float, *, target: int, reports: Mapping[str, LoadReport | None], ongoing: int) -> int:
        config, ray = self._config, self._ray
        self._samples.append(self._metrics.TimeStampedValue(now, ongoing))
        while self._samples[0].timestamp < now - config.look_back_period_s:
            self._samples.popleft()
        if now - self._pushed_at >= config.metrics_interval_s:
            self._pushed_at, self._pushed = now, list(self._samples)
        held_s = max(1e-3, now - self._pushed[-1].timestamp)  # as Serve's controller has it
        mean = self._metrics.aggregate_timeseries(self._pushed, config.aggregation_function, last_window_s=held_s)
        context = SimpleNamespace(
            current_num_replicas=len(reports), target_num_replicas=target, total_num_requests=mean, config=config
        )
        desired, _ = ray._core_replica_queue_length_policy(context)
        scaled = ray._apply_scaling_factors(desired, len(reports), config)
        decided, self._state = ray._apply_delay_logic(max(0, scaled), target, config, self._state, _now=now)
        bounded: int = min(config.max_replicas, max(config.min_replicas, decided))
        return bounded


def select_policy(name: PolicyName, config: AutoscaleSimConfig, *, sim: SimConfig) -> Policy:
    """The policy of that name. sim: the trace's."""
    if name == "shoal":
        return Ours(config.autoscaling)
    bounds: dict[str, Any] = {"min_replicas": config.min_replicas, "max_replicas": config.max_replicas}
    if name == "ray-default":
        return Rays(**bounds)
    return Rays(
        **bounds,
        target_ongoing_requests=ongoing_at(TUNED_LOAD, config, sim=sim),
        upscale_delay_s=5.0,
        downscale_delay_s=config.scale_down_after_s,
        look_back_period_s=10.0,
        metrics_interval_s=1.0,
    )


def ongoing_at(load: float, config: AutoscaleSimConfig, *, sim: SimConfig) -> float:
    """Requests under way on a replica at this load, by Little's law over the cost model's step.

    Steps of n rows take base + n x row + their share of prompts, and each row moves on by one token a step.
    """
    costs, prompt, answer = config.costs, config.prompt_tokens, config.answer_tokens
    rate = load / cold_request_s(sim, costs)
    row_s = costs.decode_row_s + (prompt + answer / 2) * costs.context_token_s
    free = 1 - rate * prompt * costs.prefill_token_s - rate * answer * row_s
    return max(1.0, rate * answer * costs.base_s / max(free, 0.02))
