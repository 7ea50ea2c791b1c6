"""The report's tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.report.compare import Group, Line, group_title, method_label
from ilr_fast.report.content import Content
from ilr_fast.report.overview import Table as Overview
from ilr_fast.report.overview import benchmark_tables, line_name, mode_tables
from ilr_fast.report.runs import Row
from ilr_fast.report.status import status
from ilr_fast.report.texts import difference_class, difference_text, interval_text, number, questions_text
from ilr_fast.statistics import PairedDifference

COLOURS = {"better": "green", "worse": "red"}
AGAINST = {"base": "against base", "base_few_shot": "against best\nfew-shot base", "grpo": "against GRPO"}


def print_content(console: Console, content: Content) -> None:
    """How far each run is, then its results: by benchmark, by inference mode, and each group's own table."""
    for run in content.runs:
        console.print(f"[bold]{escape(run.name)}[/]  {escape(status(run))}", highlight=False)
        if run.failures:
            what = "failure was" if len(run.failures) == 1 else "failures were"
            console.print(f"[yellow]{len(run.failures)} {what} recorded[/]", highlight=False)
    if not content.groups:
        console.print("no evaluation yet", style="dim")
    with_arm = len(content.arms) > 1
    for overview in (benchmark_tables, mode_tables):
        for table in overview(content.groups, with_arm=with_arm):
            _print_overview(console, table)
    for group in content.groups:
        _print_group(console, group, with_arm)


def _print_group(console: Console, group: Group, with_arm: bool) -> None:
    """One agent on one benchmark in one mode; bold green where a paired interval lies above 0."""
    references = [name for name in AGAINST if any(line.to.get(name) for line in group.lines)]
    title = escape(f"{group_title(group)}, {_questions(group)}")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    for name in ("right", "95%", *(AGAINST[reference] for reference in references)):
        table.add_column(name, justify="right", no_wrap=True)
    for line in group.lines:
        table.add_row(*_cells(line, with_arm, references, console.width < 80 + 22 * len(references) - 14))
    console.print(table)


def _print_overview(console: Console, overview: Overview) -> None:
    table = Table(title=escape(overview.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number_, name in enumerate(overview.head):
        table.add_column(escape(name), justify="right" if number_ else "left", overflow="fold")
    for row in overview.rows:
        texts = ["\n".join(filter(None, (cell.text, cell.note))) for cell in row]
        table.add_row(*(_in_colour(escape(text), cell.verdict) for text, cell in zip(texts, row, strict=True)))
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


def _cells(line: Line, with_arm: bool, references: Sequence[str], narrow: bool) -> list[str]:
    cells = [escape(line_name(line, with_arm)), number(line.accuracy, "percent"), interval_text(line.ci95)]
    return cells + [_difference(line.to.get(reference), narrow) for reference in references]


def _questions(group: Group) -> str:
    """How many questions, how many answers to each, and seeds."""
    sizes = dict.fromkeys(questions_text(line.n, line.samples, line.seeds) for line in group.lines)
    return f"n = {' / '.join(sizes)}"


def _difference(difference: PairedDifference | None, narrow: bool) -> str:
    text = difference_text(difference)
    text = text.replace(" (", "\n(").replace(" to ", "…") if narrow else text
    return _in_colour(text, difference_class(difference))


def _in_colour(text: str, verdict: str) -> str:
    colour = COLOURS.get(verdict)
    return f"[bold {colour}]{text}[/]" if colour else text
