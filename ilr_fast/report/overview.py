"""The experiments' tables over all results: methods × benchmarks, inference modes, cooperation ratios.

A difference whose interval holds 0 is called none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ilr_fast.report.compare import Group, Line, difference
from ilr_fast.report.texts import difference_class, difference_text, interval_text, number
from ilr_fast.statistics import PairedDifference


@dataclass(frozen=True, slots=True)
class Cell:
    """A number, what stands small below it, and what colours it (`better`, `worse`, `none`)."""

    text: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a title; the first cells of its rows are the rows' names."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def benchmark_tables(groups: Sequence[Group], *, with_arm: bool) -> list[Table]:
    """Methods × benchmarks of each agent alone, where there is more than one benchmark."""
    tables = []
    for agent, samples in dict.fromkeys((g.agent, g.samples) for g in groups if g.mode == "single"):
        mine = [g for g in groups if (g.agent, g.samples, g.mode) == (agent, samples, "single")]
        names = list(dict.fromkeys(line_name(line, with_arm) for group in mine for line in group.lines))
        rows = [[Cell(name), *(_accuracy(_named(group, name, with_arm)) for group in mine)] for name in names]
        title = f"{agent}, alone" + (f", {samples} answers each" if samples > 1 else "")
        if len(mine) > 1:
            tables.append(Table(title, ["method", *(group.benchmark for group in mine)], rows))
    return tables


def mode_tables(groups: Sequence[Group], *, with_arm: bool) -> list[Table]:
    """What talking at inference changes: each mode's accuracy against the same agent alone; who gains, who loses."""
    tables = []
    for benchmark, samples in dict.fromkeys((g.benchmark, g.samples) for g in groups):
        here = [g for g in groups if (g.benchmark, g.samples) == (benchmark, samples)]
        modes = list(dict.fromkeys(g.mode for g in sorted(here, key=lambda g: g.mode != "single")))
        rows = []
        for agent in dict.fromkeys(g.agent for g in here):
            mine = {g.mode: g for g in here if g.agent == agent}
            for name in dict.fromkeys(line_name(line, with_arm) for g in mine.values() for line in g.lines):
                lines = [_named(mine[mode], name, with_arm) if mode in mine else None for mode in modes]
                if sum(line is not None for line in lines) > 1:
                    rows.append([Cell(f"{agent}, {name}"), *_against_alone(modes, lines)])
        if rows:
            heads = [mode if mode != "single" else "alone" for mode in modes]
            tables.append(Table(f"{benchmark}" + (f", {samples} answers each" if samples > 1 else ""),
                                ["agent, method", *heads], rows))
    return tables


def cooperation_ratio(method: str) -> float | None:
    """The fixed share of cooperation that a method's name tells.

    >>> cooperation_ratio("ilr_ratio_0.25"), cooperation_ratio("ilr")
    (0.25, None)
    """
    found = re.fullmatch(r"\w+?_ratio_([0-9.]+)", method)
    return float(found.group(1)) if found else None


def line_name(line: Line, with_arm: bool) -> str:
    """The method; with several arms, which one of them, unless its name says the method already."""
    return line.label if line.is_base or not with_arm or line.arm == line.label else f"{line.label} · {line.arm}"


def _named(group: Group, name: str, with_arm: bool) -> Line | None:
    return next((line for line in group.lines if line_name(line, with_arm) == name), None)


def _accuracy(line: Line | None) -> Cell:
    if line is None:
        return Cell("–")
    to_base = line.to.get("base")
    note = f"{interval_text(line.ci95)}" + (f"; to base {difference_text(to_base)}" if to_base else "")
    return Cell(number(line.accuracy, "percent"), note, difference_class(to_base))


def _against_alone(modes: Sequence[str], lines: Sequence[Line | None]) -> list[Cell]:
    alone = next((line for mode, line in zip(modes, lines, strict=True) if mode == "single"), None)
    cells = []
    for line in lines:
        if line is None:
            cells.append(Cell("–"))
        elif line is alone or alone is None:
            cells.append(Cell(number(line.accuracy, "percent"), interval_text(line.ci95)))
        else:
            change = difference(line.measured, alone.measured)
            cells.append(Cell(number(line.accuracy, "percent"), _gain(change), difference_class(change)))
    return cells


def _gain(change: PairedDifference | None) -> str:
    if change is None:
        return "difference unknown"
    what = {"better": "gains ", "worse": "loses ", "none": ""}[change.verdict]
    return what + difference_text(change).replace("−", "", 1 if change.verdict == "worse" else 0)
