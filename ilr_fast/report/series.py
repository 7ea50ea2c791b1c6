"""From a number's columns in one run or several to the points of a curve: fewer, smoothed, with a band.

Long runs are drawn as means of neighbouring steps, at most POINTS of them, fewer where many curves share a figure.
From SMOOTH_FROM points on, the curve is a running mean. Of one run the values themselves stay behind the curve; of
several, the band is the 95% interval of their mean (statistics.mean_interval: Student's t), and of up to FEW runs, for
which that is several times as wide as they lie apart, from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from ilr_fast.statistics import mean_interval

POINTS = 240
FEWEST = 80
SMOOTH_FROM = 40
FEW = 4

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `columns` holds the points of every run. `dashed` tells a second number of the same thing.

    `sparse`: measured every few steps; its points are marked, joined across the gaps and not smoothed.
    """

    label: str
    columns: Sequence[Sequence[Point]]
    dashed: bool = False
    sparse: bool = False

    @property
    def exists(self) -> bool:
        """Whether there is any number."""
        return any(y is not None for column in self.columns for _, y in column)

    def rows(self, places: Mapping[float, float]) -> list[dict[str, Any]]:
        """{x, y, low, high, raw}, `places` telling at which step a step is drawn (`placed`); gaps have y null."""
        columns = [self._curve(column, places) for column in self.columns]
        rows = []
        for x in sorted({x for column in columns for x in column}):
            values = [column[x][0] for column in columns if column.get(x, (None,))[0] is not None]
            low, high = _band(values)
            raw = columns[0][x][1] if len(columns) == 1 and not self.sparse else None
            mean = sum(values) / len(values) if values else None
            if mean is not None or not self.sparse:
                rows.append({"x": x, "y": short(mean), "low": short(low), "high": short(high), "raw": short(raw)})
        return rows

    def _curve(self, column: Sequence[Point], places: Mapping[float, float]) -> dict[float, tuple[Any, Any]]:
        """By place, the smoothed value and the value itself."""
        if self.sparse:
            return {x: (y, y) for x, y in column if y is not None}
        found: dict[float, list[float]] = {}
        for x, y in column:
            found.setdefault(places[x], []).extend([] if y is None else [y])
        points = [(x, sum(ys) / len(ys) if ys else None) for x, ys in sorted(found.items())]
        smooth = running_mean(points, max(5, len(points) // 25)) if len(points) >= SMOOTH_FROM else points
        return {x: (y, raw) for (x, y), (_, raw) in zip(smooth, points, strict=True)}


def _band(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Around the mean of a value of each run; none around a single one."""
    if len(values) < 2:
        return None, None
    return (min(values), max(values)) if len(values) <= FEW else mean_interval(values)


def points_of(curves: int) -> int:
    """How many points each of so many curves in one figure has at most.

    >>> points_of(2), points_of(8), points_of(36)
    (240, 120, 80)
    """
    return max(FEWEST, min(POINTS, 4 * POINTS // max(1, curves)))


def placed(steps: Sequence[float], most: int = POINTS) -> dict[float, float]:
    """Where each step is drawn: itself, or the middle of its group of neighbours where there are more than `most`.

    >>> placed([1, 2, 3, 4], most=2)
    {1: 1.5, 2: 1.5, 3: 3.5, 4: 3.5}
    """
    ordered = sorted(set(steps))
    size = ceil(len(ordered) / most) or 1
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return {step: (group[0] + group[-1]) / 2 if len(group) > 1 else step for group in groups for step in group}


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Each value as the mean of the `window` values that end there, gaps left out."""
    out: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        if y is not None:
            recent = [*recent, y][-window:]
        out.append((x, None if y is None else sum(recent) / len(recent)))
    return out


def short(value: float | None) -> float | None:
    """Five digits: more can't be seen, and the page is smaller."""
    return None if value is None else float(f"{value:.5g}")
