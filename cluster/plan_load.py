"""What a grid would give its clients: how much it can do within the objectives, and how a rate of requests fares.

Within the objectives: the most sequences in a steady state, in which new prompts come as answers end. Under a rate: one
replica with the real scheduler on a virtual clock (`sim_*.py`), Poisson arrivals, lengths lognormal around the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf
from typing import NamedTuple

from .plan_costs import RooflineCosts, Typical
from .sim_config import sim_config
from .sim_load import cold_request_s
from .sim_report import Report, report_of
from .sim_world import World

REQUESTS = 300
"""Of a simulation: enough for nine in ten."""
FULL = 0.95
"""A rate above this share of what a replica can do is one that it cannot keep up with."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a deployment. Times in seconds, the rate in requests a second of all replicas together."""

    typical: Typical
    context: int
    rate: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a replica does within the objectives.

    rows: sequences at once. requests_s, tokens_s: answers and their tokens a second. binds: what stops it from more.
    """

    rows: int
    ttft_s: float
    itl_s: float
    requests_s: float
    tokens_s: float
    binds: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """A deployment's figures. ttft_s, itl_s: of nine in ten under the rate, else of a replica at its capacity.

    alone_ttft_s: of a request that meets nobody. goodput: tokens a second within the objectives, of all replicas.
    """

    capacity: Capacity
    alone_ttft_s: float
    alone_itl_s: float
    ttft_s: float
    itl_s: float
    goodput: float
    meets: bool


class Miss(NamedTuple):
    """An objective that is not kept. value, limit: seconds, or of the rate requests a second."""

    flag: str
    value: float
    limit: float

    @property
    def times(self) -> float:
        """By how much; more than 1."""
        return self.limit / self.value if self.flag == "--rate" else self.value / self.limit


def missed(found: Forecast, demand: Demand, *, replicas: int) -> list[Miss]:
    """What is not kept, the worst first: at the rate; alone, where one request is too slow or too many come."""
    if found.meets:
        return []
    one = found.capacity
    queues = demand.rate is None or isinf(found.ttft_s)
    ttft, itl = (one.ttft_s, one.itl_s) if queues else (found.ttft_s, found.itl_s)
    values = (("--ttft", ttft, demand.ttft_s), ("--itl", itl, demand.itl_s))
    misses = [Miss(flag, value, limit) for flag, value, limit in values if limit is not None and value > limit]
    most = FULL * one.requests_s * replicas
    if demand.rate is not None and 0 < most < demand.rate:
        misses.append(Miss("--rate", most, demand.rate))
    return sorted(misses, key=lambda miss: -miss.times)


def capacity(costs: RooflineCosts, demand: Demand) -> Capacity:
    """By bisection over the number of sequences: a step's time grows with it."""
    typical = demand.typical
    fits = int(costs.kv_tokens // (typical.prompt + typical.answer))
    most = max(1, min(fits, costs.max_num_seqs))
    binds = "KV cache" if fits < costs.max_num_seqs else "--max-num-seqs"
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if _misses(costs, demand, middle) is None:
            low = middle
        else:
            high = middle - 1
    rows = low
    if rows < most:
        binds = _misses(costs, demand, rows + 1) or binds
    step = _step_s(costs, typical, max(rows, 1))
    return Capacity(
        rows=rows,
        ttft_s=_ttft_s(costs, typical, max(rows, 1)),
        itl_s=step,
        requests_s=rows / (typical.answer * step),
        tokens_s=rows / step,
        binds=binds,
    )


def forecast(costs: RooflineCosts, demand: Demand, *, replicas: int) -> Forecast:
    """Of so many replicas between which requests are spread evenly."""
    found, typical = capacity(costs, demand), demand.typical
    alone_ttft, alone_itl = costs.prompt_s(typical.prompt), _step_s(costs, typical, 1, prefill=0.0)
    if demand.rate is None:
        goodput = found.tokens_s * replicas
        return Forecast(found, alone_ttft, alone_itl, found.ttft_s, found.itl_s, goodput, meets=found.rows > 0)
    goodput = min(demand.rate, FULL * found.requests_s * replicas) * typical.answer
    rate = demand.rate / replicas
    if rate > FULL * found.requests_s:
        return Forecast(found, alone_ttft, alone_itl, float("inf"), found.itl_s, goodput, meets=False)
    report = simulated(costs, demand, rate)
    if report is None:
        ttft, itl = found.ttft_s, found.itl_s
    else:
        fill = costs.prompt_s(typical.prompt) * (1 - 1 / len(costs.stages))  # the simulator's steps have no stages
        ttft, itl = report.ttft_s.p90 + fill, report.itl_s.p90
    meets = _within(ttft, demand.ttft_s) and _within(itl, demand.itl_s)
    return Forecast(found, alone_ttft, alone_itl, ttft, itl, goodput if meets else 0.0, meets)


def simulated(costs: RooflineCosts, demand: Demand, rate: float) -> Report | None:
    """One replica under so many requests a second. None: its cache is too small for the longest of them."""
    typical = demand.typical
    system = max(1, typical.prompt - 1)
    config = sim_config(
        {
            "replicas": 1,
            "ingresses": 1,
            "requests": REQUESTS,
            "balancers": "round-robin",
            "workload": "unique",
            "system_tokens": system,
            "message_tokens": max(1, typical.prompt - system),
            "answer_tokens": typical.answer,
            "max_queued": REQUESTS,
            "network_s": 0.0,
        }
    )
    if config.max_model_len > costs.kv_tokens:
        return None
    config = config.model_copy(update={"load": rate * cold_request_s(config, costs)})
    world = World("round-robin", config, costs)
    for _ in world.run():
        pass
    return report_of("round-robin", world.outcome)


def _misses(costs: RooflineCosts, demand: Demand, rows: int) -> str | None:
    """The objective that so many sequences would miss."""
    if not _within(_step_s(costs, demand.typical, rows), demand.itl_s):
        return "--itl"
    return None if _within(_ttft_s(costs, demand.typical, rows), demand.ttft_s) else "--ttft"


def _within(value: float, limit: float | None) -> bool:
    return limit is None or value <= limit


def _step_s(costs: RooflineCosts, typical: Typical, rows: int, *, prefill: float | None = None) -> float:
    """A step's mean time with so many sequences. prefill: tokens of prompts; None: what the steady state brings."""
    tokens = rows * typical.prompt / typical.answer if prefill is None else prefill
    return costs.step_s(tokens, rows, rows * typical.context)


def _ttft_s(costs: RooflineCosts, typical: Typical, rows: int) -> float:
    """The step under way is waited for, then the prompt is read beside the others."""
    waited = _step_s(costs, typical, rows) / 2
    return waited + costs.prompt_s(typical.prompt, beside=rows, context=rows * typical.context)
