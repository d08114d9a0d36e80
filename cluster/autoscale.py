"""The policy of `scaling.py` as Ray Serve calls it: in its controller, ten times a second, once for each part.

Serve imports this module where an application is built and carries `ServePolicy` to its controller by value; all that
it uses is imported there from the installed package, and none of it is heavy. Serve's own delays and factors are set so
that they change nothing: what the policy says is done at once. One thing stays Serve's: a part that has no replica and
is asked for one (router/wake.py) gets it without a question.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..router.load_report import Decided, report_of
from .autoscale_board import AGAIN_S, Board, GcsBoard
from .autoscale_config import AutoscalingConfig
from .scaling import Decision, Scaling, View

POLICY = "shoal.cluster.autoscale:ServePolicy"
REPORT_S = 1.0  # between two words of a replica
LOOK_S = 1.0  # between two decisions
STALE_S = 15.0  # a word that is older is none
LOOK_BACK_S = 10.0  # Serve's mean of what waits at handles
PREFIX = "autoscaling_"  # of what a replica has been told
BOUNDS = ("min_replicas", "max_replicas")  # Serve tells the policy itself

logger = logging.getLogger("ray.serve")  # the controller's log


def serve_autoscaling(config: AutoscalingConfig) -> dict[str, Any]:
    """A deployment's `autoscaling_config` in Serve's declarative config, of JSON's types; the chart renders the same.

    For Serve a policy is code: were the objectives its arguments, replicas would be replaced when they change. So the
    replicas are told, by their deployment's `user_config`, and report them (`objective_of`).
    """
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "metrics_interval_s": REPORT_S,
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "downscale_to_zero_delay_s": 0.0,
        "policy": {"policy_function": POLICY},
    }


def objective_of(user_config: Mapping[str, Any] | None) -> dict[str, float]:
    """What replicas report of their `user_config`, `{autoscaling: ...}`, for the policy. Raises ValidationError."""
    told = (user_config or {}).get("autoscaling")
    if told is None:
        return {}
    config = AutoscalingConfig.model_validate(told)
    return {PREFIX + name: value for name, value in config.model_dump().items() if name not in BOUNDS}


def sleeps(user_config: Mapping[str, Any] | None) -> bool:
    """Whether a part that is told this may have no replica on purpose."""
    told = (user_config or {}).get("autoscaling")
    return told is not None and AutoscalingConfig.model_validate(told).min_replicas == 0


class ServePolicy:
    """A custom policy of Serve's: called with an `AutoscalingContext`, gives (replicas, state to keep: none)."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        board: Callable[[str], Board] = GcsBoard,
    ) -> None:
        """Serve gives no arguments. now: unix seconds. board: of an application."""
        self._clock = clock
        self._now = now
        self._board_of = board
        self._scaling: Scaling | None = None
        self._objective: dict[str, float] = {}
        self._looked_at = float("-inf")
        self._said: tuple[object, ...] | None = None
        self._since = self._told_at = 0.0
        self._board: Board | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: see `ray.serve.config.AutoscalingContext`."""
        now = self._clock()
        target = int(ctx.target_num_replicas)
        if now - self._looked_at < LOOK_S:
            return target, {}
        self._looked_at = now
        numbers = _numbers(ctx)
        scaling = self._told(ctx, numbers)
        decision = scaling.decide(
            View(
                target=target,
                replicas={name: report_of(said) if said else None for name, said in numbers.items()},
                queued=float(ctx.total_queued_requests or 0.0),
            ),
            now,
        )
        self._tell(ctx, decision, target, scaling.config)
        return decision.replicas, {}

    def _told(self, ctx: Any, numbers: Mapping[str, Mapping[str, float]]) -> Scaling:
        """The policy, told what it is to hold to: bounds by Serve, the rest by any replica."""
        for said in numbers.values():
            self._objective.update(
                {name.removeprefix(PREFIX): value for name, value in said.items() if name.startswith(PREFIX)}
            )
        least, most = int(ctx.capacity_adjusted_min_replicas), int(ctx.capacity_adjusted_max_replicas)
        config = AutoscalingConfig.model_validate(
            {"min_replicas": least, "max_replicas": max(1, most), **self._objective}
        )
        if self._scaling is None:
            self._scaling = Scaling(config)
        self._scaling.config = config
        return self._scaling

    def _tell(self, ctx: Any, decision: Decision, target: int, config: AutoscalingConfig) -> None:
        """One line a change in the controller's log, and a word to the ingresses."""
        now = self._now()
        said = decision.replicas, decision.reason, config.max_replicas, config.ttft_s
        if said != self._said:
            self._said, self._since = said, now
            if decision.replicas != target:
                logger.info("%s: %d -> %d replicas: %s", ctx.app_name, target, decision.replicas, decision.words)
        elif now - self._told_at < AGAIN_S:
            return
        self._told_at = now
        self._board = self._board or self._board_of(str(ctx.app_name))
        self._board.show(
            Decided(
                replicas=decision.replicas,
                reason=decision.reason,
                words=decision.words,
                most=config.max_replicas,
                ttft_s=config.ttft_s,
                since=self._since,
                said_at=now,
            )
        )


def _numbers(ctx: Any) -> dict[str, dict[str, float]]:
    """Every running replica's last word; nothing of one that has said none, or not for long."""
    numbers: dict[str, dict[str, float]] = {replica.unique_id: {} for replica in ctx.running_replicas}
    series: Mapping[str, Mapping[Any, Any]] = ctx.raw_metrics or {}
    for name, of_replicas in series.items():
        for replica, points in of_replicas.items():
            if points and points[-1].timestamp > ctx.current_time - STALE_S and replica.unique_id in numbers:
                numbers[replica.unique_id][name] = points[-1].value
    return {name: said if "arrived" in said else {} for name, said in numbers.items()}
