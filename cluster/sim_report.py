"""What a simulation has shown: one value a balancer, and the table that sets them side by side."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import msgspec

from .sim_world import Outcome
from .table import table_lines


class Spread(msgspec.Struct, frozen=True):
    """Seconds that half, nine of ten and 99 of 100 do not exceed; 0 where there is nothing."""

    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One balancer's figures. Rates are by simulated time.

    hit_rate: tokens found in a prefix cache, of those looked up. imbalance: what the busiest replica computed a second,
    over the mean. interrupted, resumed: requests whose replica was killed, and those of them that had tokens already.
    """

    balancer: str
    answered: int
    refused: int
    hit_rate: float
    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread
    requests_per_s: float
    tokens_per_s: float
    imbalance: float
    preemptions: int
    steps: int
    simulated_s: float
    kills: int
    interrupted: int
    resumed: int


def report_of(balancer: str, outcome: Outcome) -> Report:
    """The figures of one run."""
    seconds = max(outcome.end_s, 1e-9)
    answered = len(outcome.e2e_s)
    mean_load = sum(outcome.loads) / max(1, len(outcome.loads))
    return Report(
        balancer=balancer,
        answered=answered,
        refused=outcome.refused,
        hit_rate=outcome.hit_tokens / max(1, outcome.query_tokens),
        ttft_s=_spread(outcome.ttft_s),
        itl_s=_spread(outcome.gaps.seconds, outcome.gaps.counts),
        e2e_s=_spread(outcome.e2e_s),
        requests_per_s=answered / seconds,
        tokens_per_s=outcome.output_tokens / seconds,
        imbalance=max(outcome.loads, default=0.0) / mean_load if mean_load else 0.0,
        preemptions=outcome.preemptions,
        steps=outcome.steps,
        simulated_s=outcome.end_s,
        kills=outcome.kills,
        interrupted=outcome.interrupted,
        resumed=outcome.resumed,
    )


def _spread(values: array[float], counts: array[int] | None = None) -> Spread:
    """Of values, each of which stands for so many."""
    import numpy as np

    if not values:
        return Spread(0.0, 0.0, 0.0)
    order = np.argsort(np.asarray(values), kind="stable")
    weights = np.ones(len(values), dtype=np.int64) if counts is None else np.asarray(counts)[order]
    below = np.cumsum(weights)
    places = np.searchsorted(below, [share * below[-1] for share in (0.5, 0.9, 0.99)])
    return Spread(*(float(value) for value in np.asarray(values)[order][places]))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


_LINES: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("prefix hit rate", lambda report: f"{report.hit_rate:.1%}"),
    ("time to first token, ms, p50", lambda report: _ms(report.ttft_s.p50)),
    ("  p90", lambda report: _ms(report.ttft_s.p90)),
    ("  p99", lambda report: _ms(report.ttft_s.p99)),
    ("between tokens, ms, p50", lambda report: _ms(report.itl_s.p50)),
    ("  p99", lambda report: _ms(report.itl_s.p99)),
    ("whole request, ms, p50", lambda report: _ms(report.e2e_s.p50)),
    ("  p99", lambda report: _ms(report.e2e_s.p99)),
    ("requests/s", lambda report: f"{report.requests_per_s:.1f}"),
    ("output tokens/s", lambda report: f"{report.tokens_per_s:.0f}"),
    ("busiest replica / mean", lambda report: f"{report.imbalance:.2f}"),
    ("preemptions", lambda report: str(report.preemptions)),
    ("refused", lambda report: str(report.refused)),
)
_FAULT_LINES: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("replicas killed", lambda report: str(report.kills)),
    ("requests interrupted", lambda report: str(report.interrupted)),
    ("  resumed with tokens", lambda report: str(report.resumed)),
)


def table(reports: Sequence[Report]) -> str:
    """A line a figure, a column a balancer."""
    lines = _LINES + (_FAULT_LINES if any(report.kills for report in reports) else ())
    rows = [(name, *(cell(report) for report in reports)) for name, cell in lines]
    return "\n".join(table_lines(("", *(report.balancer for report in reports)), rows))
