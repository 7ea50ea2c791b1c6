"""The figures of the results: each method's accuracy with its interval, and accuracy by share of cooperation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ilr_fast.report.compare import Group, Line
from ilr_fast.report.overview import cooperation_ratio, line_name
from ilr_fast.report.vega import Axis, Figure, dots

AXIS = Axis("right answers", "percent")


def accuracy_figures(groups: Sequence[Group], agents: Sequence[str], *, with_arm: bool) -> list[Figure]:
    """A figure for each benchmark and mode: methods below one another, agents in colours."""
    figures = []
    for benchmark, mode, samples in dict.fromkeys((g.benchmark, g.mode, g.samples) for g in groups):
        here = [g for g in groups if (g.benchmark, g.mode, g.samples) == (benchmark, mode, samples)]
        names = list(dict.fromkeys(line_name(line, with_arm) for g in here for line in g.lines))
        rows = [_row(line_name(line, with_arm), g.agent, line) for g in here for line in g.lines]
        where = "alone" if mode == "single" else mode
        note = f"{where}, 95% intervals" + (f", {samples} answers each" if samples > 1 else "")
        figures.append(dots(f"Accuracy on {benchmark}", note, AXIS, rows, across="", names=names, upright=False,
                            labels=agents))  # fmt: skip
    return [figure for figure in figures if figure]


def ratio_figures(groups: Sequence[Group], agents: Sequence[str]) -> list[Figure]:
    """Accuracy by fixed share of cooperation, where two or more were trained; dynamic interaction beside them."""
    figures = []
    for benchmark, mode in dict.fromkeys((g.benchmark, g.mode) for g in groups):
        here = [g for g in groups if (g.benchmark, g.mode) == (benchmark, mode)]
        ratios = {r for g in here for line in g.lines if (r := cooperation_ratio(line.method)) is not None}
        if len(ratios) < 2:
            continue
        names = [*(f"{ratio:g}" for ratio in sorted(ratios)), "dynamic"]
        rows = []
        for group in here:
            for line in group.lines:
                ratio = cooperation_ratio(line.method)
                if ratio is not None or line.method == "ilr":
                    rows.append(_row("dynamic" if ratio is None else f"{ratio:g}", group.agent, line))
        figures.append(dots(f"Share of cooperation: {benchmark}", "alone" if mode == "single" else mode, AXIS, rows,
                            across="share of cooperation", names=names, labels=agents))  # fmt: skip
    return [figure for figure in figures if figure]


def _row(name: str, agent: str, line: Line) -> dict[str, Any]:
    low, high = line.ci95 or (line.accuracy, line.accuracy)
    return {"name": name, "series": agent, "y": line.accuracy, "low": low, "high": high, "n": line.n}
