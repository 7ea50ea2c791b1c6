"""Charts as inline SVG: curves over steps, and stacked bars. Readable without JavaScript; with it, the page's script
shows the values under the pointer from the JSON beside each chart.

All text goes through markupsafe, so that a run's or an agent's name can't become markup.

    svg = curves(Chart("Reward", "plain", [Series("gemma", 0, [(1, 0.4), (2, None), (3, 0.6)])]))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log10

from markupsafe import Markup

from ilr_fast.report.scales import Unit, domain, log_ticks, nice_ticks, tick_label, whole_ticks

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 26
COLOURS = 8  # in style.css: --s0 to --s7
DASHES = ("", "5 3", "1.5 3", "8 3 1.5 3")
SMOOTH_FROM = 40  # points from which a running mean is drawn over the raw curve

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `colour` numbers the palette; beyond it, and for `dash` > 0, the line is dashed."""

    label: str
    colour: int
    points: Sequence[Point]
    dash: int = 0
    sparse: bool = False  # measured every few steps: points are joined across the gaps and marked

    @property
    def stroke(self) -> str:
        return f"var(--s{self.colour % COLOURS})"

    @property
    def pattern(self) -> str:
        return DASHES[(self.dash + self.colour // COLOURS) % len(DASHES)]


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled chart. `low` and `high` fix the vertical axis, so that charts side by side can be compared."""

    title: str
    unit: Unit
    series: Sequence[Series]
    note: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False

    @property
    def values(self) -> list[float]:
        return [y for s in self.series for _, y in s.points if y is not None]


class Frame:
    """Maps steps and values to the drawing's coordinates."""

    def __init__(self, steps: tuple[float, float], values: tuple[float, float], log: bool = False):
        self.x0, self.x1 = steps if steps[1] > steps[0] else (steps[0] - 1, steps[0] + 1)
        self.y0, self.y1, self.log = *values, log

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = (log10(self.y0), log10(self.y1)) if self.log else (self.y0, self.y1)
        share = ((log10(value) if self.log else value) - low) / (high - low)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)


def curves(chart: Chart) -> Markup:
    """Lines over steps. Nothing where no series has a value."""
    values = chart.values
    if not values:
        return Markup("")
    steps = [x for s in chart.series for x, _ in s.points]
    log = chart.log and min(values) > 0 and max(values) > 10 * min(values)
    low, high = (min(values) / 1.5, max(values) * 1.5) if log else domain(values, chart.unit)
    low, high = (low if chart.low is None else chart.low), (high if chart.high is None else chart.high)
    frame = Frame((min(steps), max(steps)), (low, high), log)
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    body = [_axes(frame, ticks, chart.unit)] + [_line(s, frame) for s in chart.series]
    return _figure(chart, frame, Markup("").join(body))


def stacked(chart: Chart, bars: int = 60) -> Markup:
    """Bars over steps, the series on top of one another; many steps are drawn as means of neighbours."""
    steps = sorted({x for s in chart.series for x, _ in s.points})
    if not chart.values or not steps:
        return Markup("")
    size = ceil(len(steps) / bars)
    buckets = [steps[i : i + size] for i in range(0, len(steps), size)]
    lookup = [dict(s.points) for s in chart.series]
    heights = [[sum(d.get(x) or 0.0 for x in b) / len(b) for d in lookup] for b in buckets]
    high = max(sum(h) for h in heights) * 1.06 or 1.0
    frame = Frame((steps[0] - 0.5, steps[-1] + 0.5), (0.0, high))
    body = [_axes(frame, nice_ticks(0.0, high), chart.unit)]
    for bucket, parts in zip(buckets, heights, strict=True):
        left, right = frame.x(bucket[0] - 0.5), frame.x(bucket[-1] + 0.5)
        base = 0.0
        for series, part in zip(chart.series, parts, strict=True):
            top, bottom = frame.y(base + part), frame.y(base)
            base += part
            if bottom - top > 0.05:
                body.append(Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>').format(
                    left + 0.5, top, max(right - left - 1, 0.6), bottom - top, series.stroke))
    return _figure(chart, frame, Markup("").join(body), filled=True)


def interval_bar(center: float, ci95: Sequence[float] | None, low: float, high: float, colour: int) -> Markup:
    """A dot with its 95% interval on a scale from `low` to `high`, for a table's cell."""
    width, height = 120, 14
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 4 + (min(max(value, low), high) - low) / span * (width - 8)

    parts = [Markup('<line class="grid" x1="4" x2="{}" y1="7" y2="7"/>').format(width - 4)]
    if low < 0 < high:
        parts.append(Markup('<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="1" y2="13"/>').format(x(0)))
    stroke = f"var(--s{colour % COLOURS})"
    if ci95:
        parts.append(Markup('<line x1="{:.1f}" x2="{:.1f}" y1="7" y2="7" stroke="{}" stroke-width="3" opacity=".45" '
                            'stroke-linecap="round"/>').format(x(ci95[0]), x(ci95[1]), stroke))
    parts.append(Markup('<circle cx="{:.1f}" cy="7" r="3.5" fill="{}"/>').format(x(center), stroke))
    return Markup('<svg class="ci" viewBox="0 0 {0} {1}" width="{0}" height="{1}" aria-hidden="true">{2}</svg>').format(
        width, height, Markup("").join(parts))


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Each value as the mean of the `window` values that end there, gaps left out."""
    out: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        if y is not None:
            recent = [*recent, y][-window:]
        out.append((x, None if y is None else sum(recent) / len(recent)))
    return out


def _axes(frame: Frame, ticks: Sequence[float], unit: Unit) -> Markup:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, WIDTH - RIGHT, LEFT - 6, y + 3.5, tick_label(tick, unit), y=y))
    base = HEIGHT - BOTTOM
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, WIDTH - RIGHT, y=base))
    for tick in whole_ticks(frame.x0, frame.x1):
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
            frame.x(tick), base + 15, tick))
    return Markup("").join(parts)


def _line(series: Series, frame: Frame) -> Markup:
    points = [p for p in series.points if not series.sparse or p[1] is not None]
    style = Markup('fill="none" stroke="{}" stroke-linejoin="round" stroke-linecap="round"').format(series.stroke)
    smooth = not series.sparse and len(points) >= SMOOTH_FROM
    parts = []
    if smooth:
        parts.append(Markup('<path d="{}" {} stroke-width="1" opacity=".28"/>').format(_path(points, frame), style))
        points = running_mean(points, max(5, len(points) // 25))
    parts.append(Markup('<path d="{}" {} stroke-width="2" stroke-dasharray="{}"/>').format(
        _path(points, frame), style, series.pattern))
    for i, (x, y) in enumerate(points):
        alone = (i == 0 or points[i - 1][1] is None) and (i + 1 == len(points) or points[i + 1][1] is None)
        if y is not None and (series.sparse or alone):
            parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>').format(
                frame.x(x), frame.y(y), series.stroke))
    return Markup("").join(parts)


def _path(points: Sequence[Point], frame: Frame) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
        else:
            parts.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
            pen = "L"
    return "".join(parts)


def _figure(chart: Chart, frame: Frame, body: Markup, *, filled: bool = False) -> Markup:
    """Title, legend (where there is more than one series), drawing, and the data for the script."""
    legend = Markup("").join(
        Markup('<li><svg width="18" height="10" aria-hidden="true"><line x1="1" x2="17" y1="5" y2="5" stroke="{}" '
               'stroke-width="{}" stroke-dasharray="{}"/></svg>{}</li>').format(
            s.stroke, 8 if filled else 2.5, "" if filled else s.pattern, s.label)
        for s in chart.series if any(y is not None for _, y in s.points)
    )  # fmt: skip
    data = {
        "x": [frame.x0, frame.x1], "left": LEFT, "right": WIDTH - RIGHT, "unit": chart.unit,
        "series": [{"label": s.label, "stroke": s.stroke, "points": [[x, _short(y)] for x, y in s.points]}
                   for s in chart.series],
    }  # fmt: skip
    return Markup(
        '<figure class="chart"><figcaption><b>{title}</b>{note}</figcaption><ul class="legend">{legend}</ul>'
        '<div class="plot" data-chart="{data}"><svg viewBox="0 0 {w} {h}" role="img" tabindex="0" aria-label="{title}">'
        '{body}<line class="cursor" y1="{top}" y2="{bottom}" visibility="hidden"/></svg></div></figure>'
    ).format(
        title=chart.title, note=Markup(" <span>{}</span>").format(chart.note) if chart.note else "",
        legend=legend if len(chart.series) > 1 else "", data=json.dumps(data), body=body,
        w=WIDTH, h=HEIGHT, top=TOP, bottom=HEIGHT - BOTTOM,
    )  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
