"""The report's tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.report.compare import Group, Line, method_label
from ilr_fast.report.page import difference_class, difference_text, group_title, interval_text, status
from ilr_fast.report.runs import Row, Run
from ilr_fast.report.scales import number
from ilr_fast.statistics import PairedDifference

COLOURS = {"beats": "green", "worse": "red", "": ""}


def print_runs(console: Console, runs: Sequence[Run], groups: Sequence[Group]) -> None:
    """How far each run is, then its results."""
    for run in runs:
        console.print(f"[bold]{escape(run.name)}[/]  {escape(status(run))}", highlight=False)
        if run.failures:
            console.print(f"[yellow]{len(run.failures)} failures were recorded[/]", highlight=False)
    if not groups:
        console.print("no evaluation yet", style="dim")
    print_groups(console, groups, with_run=len(runs) > 1)


def print_groups(console: Console, groups: Sequence[Group], *, with_run: bool = False) -> None:
    """One table for each agent, benchmark and mode; bold green where a paired interval lies above 0."""
    for group in groups:
        compared = any(line.to_base or line.to_few_shot for line in group.lines)
        title = escape(f"{group_title(group)}, {_questions(group)}")
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        if with_run:
            table.add_column("run", overflow="fold")
        table.add_column("method", overflow="fold")
        for name in ("right", "95%"):
            table.add_column(name, justify="right", no_wrap=True)
        if compared:
            table.add_column("against base", justify="right", no_wrap=True)
            table.add_column("against best\nfew-shot base", justify="right", no_wrap=True)
        for line in group.lines:
            table.add_row(*_cells(line, with_run, compared, console.width < 110))
        console.print(table)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Results rows as they are, one a line; columns that say the same of all rows stand in the title."""
    columns: dict[str, list[str]] = {
        "agent": [str(row["agent"]) for row in rows],
        "method": [method_label(row) for row in rows],
        "benchmark": [str(row["benchmark"]) for row in rows],
        "mode": [str(row["mode"]) for row in rows],
        "n": [f"{row['n']} × {row['samples']}" if row["samples"] > 1 else str(row["n"]) for row in rows],
        "right": [number(row["accuracy"], "percent") for row in rows],
        "95%": [interval_text(row["ci95"]) for row in rows],
        "tokens": [number(row["tokens_mean"], "count") for row in rows],
        "failed": [str(row["failed"]) if row.get("failed") else "" for row in rows],
    }
    shared = [name for name in ("method", "benchmark", "mode", "n") if len(set(columns[name])) == 1]
    title = ", ".join(f"n = {columns[name][0]}" if name == "n" else columns[name][0] for name in shared)
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    shown = [name for name in columns if name not in shared and any(columns[name])]
    for name in shown:
        text = name in ("agent", "method", "benchmark", "mode")
        table.add_column(name, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    for cells in zip(*(columns[name] for name in shown), strict=True):
        table.add_row(*map(escape, cells))
    console.print(table)


def _cells(line: Line, with_run: bool, compared: bool, narrow: bool) -> list[str]:
    cells = [escape(line.run)] if with_run else []
    cells += [escape(line.label), number(line.accuracy, "percent"), interval_text(line.ci95)]
    return cells + ([_colored(d, narrow) for d in (line.to_base, line.to_few_shot)] if compared else [])


def _questions(group: Group) -> str:
    """How many questions, and how many answers to each."""
    sizes = dict.fromkeys(f"{line.n} × {line.samples}" if line.samples > 1 else str(line.n) for line in group.lines)
    return f"n = {' / '.join(sizes)}"


def _colored(difference: PairedDifference | None, narrow: bool) -> str:
    colour = COLOURS[difference_class(difference)]
    text = difference_text(difference)
    text = text.replace(" (", "\n(").replace(" to ", "…") if narrow else text
    return f"[bold {colour}]{text}[/]" if colour else text
