"""The plots of `shoal bench serve`: an SVG written by hand, a few panels of lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from .bench_ask import Record
from .bench_report import Summary

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
COLUMNS = 2
FONTS = "system-ui, Helvetica, Arial, DejaVu Sans, sans-serif"
CDF_POINTS = 200
BIN_S, MAX_BINS = 0.5, 100
TICKS = 7  # at most, on an even axis
NARROW = 4.0  # a logarithmic axis from some value to less than so many times it has even ticks
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Points


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. Logarithmic axes show what is above 0 only."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    legend: Literal["top left", "bottom right"] = "top left"


def run_panels(records: Sequence[Record]) -> list[Panel]:
    """Of one run: how latencies are spread, and how the run went over time."""
    ok = [record for record in records if record.is_ok]
    return [
        *_spread_panels([("", ok)]),
        Panel("Output", "seconds", "tokens/s", [Line("", _tokens_over_time(ok))]),
        Panel("Requests in flight", "seconds", "requests", [Line("", _in_flight(records))]),
    ]


def sweep_panels(summaries: Sequence[Summary], records: Sequence[Sequence[Record]]) -> list[Panel]:
    """Of many runs: what throughput costs in latency, and how latencies are spread in each."""
    named = [
        (summary.pace, [record for record in run if record.is_ok])
        for summary, run in zip(summaries, records, strict=True)
    ]
    x = "output tokens/s"
    return [
        Panel("First token against throughput", x, "TTFT, ms", _latencies(summaries, lambda s: s.ttft), log_y=True),
        Panel("Each token against throughput", x, "TPOT, ms", _latencies(summaries, lambda s: s.tpot), log_y=True),
        *_spread_panels(named),
    ]


def _latencies(summaries: Sequence[Summary], spread: Callable[[Summary], object]) -> list[Line]:
    from .bench_report import Spread

    lines = []
    for name in ("p50", "p90", "p99"):
        points = []
        for summary in summaries:
            found = spread(summary)
            assert isinstance(found, Spread)
            if found.count:
                points.append((summary.output_per_s, found.value(name)))
        lines.append(Line(name, points))
    return lines


def _spread_panels(named: Sequence[tuple[str, Sequence[Record]]]) -> list[Panel]:
    first = [Line(name, _cdf(record.ttft_s for record in run)) for name, run in named]
    gaps = [
        Line(name, _cdf(late - early for record in run for early, late in pairwise(record.moments)))
        for name, run in named
    ]
    return [
        Panel("Time to first token", "ms", "share of requests", first, log_x=True, legend="bottom right"),
        Panel("Between pieces of text", "ms", "share of gaps", gaps, log_x=True, legend="bottom right"),
    ]


def _cdf(seconds: Iterable[float]) -> Points:
    ordered = sorted(1e3 * value for value in seconds)
    count = len(ordered)
    places = sorted({round(i * (count - 1) / CDF_POINTS) for i in range(CDF_POINTS + 1)}) if count else []
    return [(ordered[place], (place + 1) / count) for place in places]


def _tokens_over_time(ok: Sequence[Record]) -> Points:
    """A piece of text stands for its share of the answer's tokens."""
    end = max((record.end_s for record in ok), default=0.0)
    count = max(1, min(MAX_BINS, int(end / BIN_S)))
    width = max(end / count, 1e-9)
    bins = [0.0] * count
    for record in ok:
        weight = record.num_output / max(1, len(record.moments))
        for moment in record.moments:
            bins[min(count - 1, int(moment / width))] += weight
    return [((place + 0.5) * width, tokens / width) for place, tokens in enumerate(bins)]


def _in_flight(records: Sequence[Record]) -> Points:
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    points, level = [(0.0, 0.0)], 0
    for moment, change in changes:
        points.append((moment, float(level)))
        level += change
        points.append((moment, float(level)))
    return points


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to a share of the axis, 0 to 1."""

    low: float
    high: float
    log: bool

    @staticmethod
    def over(values: Sequence[float], *, log: bool) -> _Axis:
        if log:
            low, high = min(values, default=1.0), max(values, default=10.0)
            return _Axis(low / 1.1, max(high * 1.1, low * 1.3), True)
        high = max(values, default=1.0)
        return _Axis(0.0, high * 1.05 if high > 0 else 1.0, False)

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        span = self.high - self.low
        if self.log and self.high > NARROW * self.low:
            marks = (1, 2, 5) if self.high < 1000 * self.low else (1,)
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [mark * 10.0**exponent for exponent in exponents for mark in marks]
        else:
            step = _nice(span / TICKS)
            found = [step * place for place in range(math.floor(self.high / step) + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... above."""
    scale = 10.0 ** math.floor(math.log10(step))
    return next(mark * scale for mark in (1, 2, 5, 10) if mark * scale >= step * 0.999)


def svg(title: str, panels: Sequence[Panel]) -> str:
    """A picture of the panels, side by side in two columns."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONTS}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(width / 2, 26, title, size=14),
    ]
    for number, panel in enumerate(panels):
        x, y = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT + 40
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> str:
    lines = [
        Line(line.name, [(x, y) for x, y in line.points if (x > 0 or not panel.log_x) and (y > 0 or not panel.log_y)])
        for line in panel.lines
    ]
    points = [point for line in lines for point in line.points]
    across = _Axis.over([x for x, _ in points], log=panel.log_x)
    up = _Axis.over([y for _, y in points], log=panel.log_y)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + inner_width * across.place(x), TOP + inner_height * (1 - up.place(y))

    parts = [_text(WIDTH / 2, 20, panel.title, size=12)]
    for tick in across.ticks():
        x, _ = place(tick, up.high)
        parts.append(_rule(x, TOP, x, TOP + inner_height) + _text(x, TOP + inner_height + 15, f"{tick:g}"))
    for tick in up.ticks():
        _, y = place(across.high, tick)
        parts.append(_rule(LEFT, y, LEFT + inner_width, y) + _text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    parts.append(_text(LEFT + inner_width / 2, HEIGHT - 12, panel.x_label))
    middle = TOP + inner_height / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:.0f})">{_text(14, middle, panel.y_label)}</g>')
    for number, line in enumerate(lines):
        parts.append(_line([place(x, y) for x, y in line.points], COLOURS[number % len(COLOURS)]))
    return "".join([*parts, *_legend(panel)])


def _legend(panel: Panel) -> list[str]:
    """The lines' names in their colours, in a corner that they leave free."""
    x, y, anchor = LEFT + 8.0, TOP + 14.0, "start"
    if panel.legend == "bottom right":
        x, y, anchor = WIDTH - RIGHT - 8.0, HEIGHT - BOTTOM - 14.0 * len(panel.lines) + 4, "end"
    return [
        _text(x, y + 14 * number, line.name, anchor=anchor, fill=COLOURS[number % len(COLOURS)])
        for number, line in enumerate(panel.lines)
        if line.name
    ]


def _line(points: Points, colour: str) -> str:
    """With dots where there are few points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points if len(points) <= 16]
    return f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>' + "".join(dots)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e2e5ea"/>'


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle", fill: str = "#374151") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
