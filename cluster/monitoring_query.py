"""PromQL for our metrics, in the few forms that dashboard and alerts need.

Whichever ingress is asked answers for all of them (router/chorus.py). So a Prometheus that scrapes three has every
series three times, and whatever is summed is first made one: `once`.
"""

from __future__ import annotations

from collections.abc import Sequence

SCRAPED = ("instance", "pod")
"""Labels that say which ingress was asked, and nothing else."""


REQUESTS = 'route!~"/health|/ready|/metrics"'
"""Answers to clients, not to the machines that ask every few seconds how we are."""


def once(series: str) -> str:
    """`series` as if one ingress alone had been scraped; of counters give the rate: they are not asked at once."""
    return f"max without ({', '.join(SCRAPED)}) ({series})"


def selected(name: str, matchers: str = "") -> str:
    """`name{matchers}`."""
    return f"{name}{{{matchers}}}" if matchers else name


def rate(counter: str, matchers: str = "", *, over: str, by: Sequence[str] = ()) -> str:
    """Its growth a second, as a sum over all but `by`."""
    return f"{_sum(by)} ({once(f'rate({selected(counter, matchers)}[{over}])')})"


def increase(counter: str, matchers: str = "", *, over: str, by: Sequence[str] = ()) -> str:
    """How much it grew."""
    return f"{_sum(by)} ({once(f'increase({selected(counter, matchers)}[{over}])')})"


def happened(counter: str, matchers: str = "", *, over: str, by: Sequence[str] = ()) -> str:
    """How often, where it is rare: a series that is born with its first event has not grown, and yet it happened."""
    series = selected(counter, matchers)
    now, then = (f"{_sum(by)} ({once(when)})" for when in (series, f"{series} offset {over}"))
    return f"({increase(counter, matchers, over=over, by=by)} > 0 or ({now} unless {then}) > 0)"


def quantile(share: float, histogram: str, matchers: str = "", *, over: str, by: Sequence[str] = ()) -> str:
    """The value that `share` of what was observed did not exceed."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', matchers, over=over, by=('le', *by))})"


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)})" if by else "sum"
