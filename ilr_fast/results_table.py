"""The final table in the terminal: each agent alone, before and after, with 95% intervals.

    print_results(read_results(run), console)

One line an agent, benchmark and mode; one column a method, in the order in which the rows first name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def results_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Results rows (CONTRACT's keys) as a table; a method that was not measured somewhere shows –."""
    methods = list(dict.fromkeys(method_name(row) for row in rows))
    several_modes = len({row["mode"] for row in rows}) > 1
    several_benchmarks = len({row["benchmark"] for row in rows}) > 1
    keys = ["agent"] + ["benchmark"] * several_benchmarks + ["mode"] * several_modes
    table = Table(title=title or _title(rows, several_benchmarks, several_modes))
    for column in (*keys, *methods, "questions"):
        table.add_column(column, justify="left" if column in keys else "right")
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[key]) for key in keys), {})[method_name(row)] = row
    for line, found in lines.items():
        questions = sorted({row["n"] for row in found.values()})
        cells = (cell(found[method]) if method in found else "–" for method in methods)
        table.add_row(*line, *cells, " / ".join(map(str, questions)))
    return table


def print_results(rows: Sequence[Row], console: Console | None = None, title: str | None = None) -> None:
    """Prints the table; nothing where there are no rows."""
    if rows:
        (console or Console()).print(results_table(rows, title))


def cell(row: Row) -> str:
    """`61.0%` and below it `54.1 to 67.5`, its 95% interval, where there is one."""
    if row["accuracy"] is None:
        return "–"
    text, interval = f"{100 * row['accuracy']:.1f}%", row.get("ci95")
    return text if interval is None else f"{text}\n{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def method_name(row: Row) -> str:
    """`base`, `base, 4 examples`, `after` (ilr)."""
    if row["method"] == "base_few_shot":
        return f"base, {row['examples']} examples" if row.get("examples") else "base, few-shot"
    return row["method"] if row["method"] == "base" else f"after ({row['method']})"


def _title(rows: Sequence[Row], several_benchmarks: bool, several_modes: bool) -> str:
    benchmark = "" if several_benchmarks or not rows else f" on {rows[0]['benchmark']}"
    alone = not several_modes and rows and rows[0]["mode"] == "single"
    return f"Accuracy of {'each agent alone' if alone else 'the agents'}{benchmark}, 95% intervals"
