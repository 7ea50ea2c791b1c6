"""The paper's inference table: who gains and who loses by talking, against the same agent alone on the same questions.

    ilr-fast eval meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen2.5-14B-Instruct --benchmarks math500 \\
        --mode single,debate,idea3

A row of a mode with peers gets `against_single`: the paired difference, its 95% interval, the verdict (better, worse,
or none where the interval holds 0), and the numbers of questions that were won and lost by talking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.evaluate import Evaluation
from ilr_fast.statistics import paired_difference

Row = Mapping[str, Any]
COLOURS = {"better": "green", "worse": "red", "none": ""}


def with_gains(found: Evaluation) -> list[dict[str, Any]]:
    """The rows, those of modes with peers with `against_single` where the agent was measured alone too."""
    return [_with_gain(row, found) for row in found.rows]


def print_gains(console: Console, rows: Sequence[Row]) -> None:
    """One table for each benchmark, agents as rows and modes as columns; nothing where no row has a comparison."""
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows if row.get("against_single")):
        chosen = [row for row in rows if row["benchmark"] == benchmark]
        modes = list(dict.fromkeys(row["mode"] for row in chosen))
        table = Table(title=escape(f"{benchmark}: against the same agent alone, percent and points"),
                      title_justify="left", title_style="bold", box=SIMPLE_HEAD)  # fmt: skip
        table.add_column("agent", overflow="fold")
        for mode in modes:
            table.add_column(mode, justify="right")
        for agent in dict.fromkeys(row["agent"] for row in chosen):
            by_mode = {row["mode"]: row for row in chosen if row["agent"] == agent}
            table.add_row(escape(agent), *(_cell(by_mode.get(mode)) for mode in modes))
        console.print(table)


def gain_text(found: Mapping[str, Any]) -> str:
    """Points with their interval, `none` where it holds 0, and how many questions were won and lost."""
    low, high = (_points(value) for value in found["ci95"])
    change = "none" if found["verdict"] == "none" else _points(found["difference"])
    return f"{change} ({low} to {high}), {found['only_together']} won, {found['only_alone']} lost"


def _with_gain(row: Row, found: Evaluation) -> dict[str, Any]:
    alone = next((r for r in found.rows if r["mode"] == "single" and _same(r, row)), None)
    if row["mode"] == "single" or alone is None:
        return dict(row)
    together, single = _outcomes(row, found), _outcomes(alone, found)
    difference = paired_difference(together, single, seed=row["seed"])
    if difference is None:
        return dict(row)
    shares = [(_share(together[q]), _share(single[q])) for q in together.keys() & single.keys()]
    gain = {
        "difference": difference.difference, "ci95": difference.ci95, "verdict": difference.verdict, "n": difference.n,
        "only_together": sum(t > s for t, s in shares), "only_alone": sum(t < s for t, s in shares),
    }  # fmt: skip
    return {**row, "against_single": gain}


def _same(one: Row, other: Row) -> bool:
    return all(one.get(key) == other.get(key) for key in ("agent", "method", "benchmark", "samples", "examples"))


def _outcomes(row: Row, found: Evaluation) -> dict[str, list[bool]]:
    return {o["question"]: o["correct"] for o in found.per_question[row["outcomes"]] if o["agent"] == row["agent"]}


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    text = f"{100 * row['accuracy']:.1f}"
    if found := row.get("against_single"):
        text += f"\n{gain_text(found)}"
        colour = COLOURS[found["verdict"]]
        return f"[{colour}]{text}[/]" if colour else text
    return text


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")
