"""An ablation's runs → `ablation.json`: one row for each agent, method and benchmark, over all seeds.

    summarise(Path("runs/learn-ablation"), command="ilr-fast ablate configs/cpu/learn.yaml --seeds 1,2,3")

Rows hold the mean accuracy with its 95% interval over questions and seeds, the difference to base, GRPO and ILR with
its paired interval and verdict (`none` where the interval holds 0), the tokens that the agent generated in training,
and the share of cooperation. Runs that are not finished are listed and enter no row. `table` writes rows as Markdown.

    python -m ilr_fast.ablate_summary runs/steps-ablation elsewhere/steps-ablation --out runs/steps

Runs of one ablation made in several places (seeds on another machine, methods added later) as one table: `--out` gets
their `ablation.json` and figure, and the Markdown of each benchmark is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.ablate_figure import can_draw, draw
from ilr_fast.data import TASK
from ilr_fast.durable import disk_errors, write_text
from ilr_fast.report.compare import METHODS
from ilr_fast.report.runs import Row, Run, dig, read_run
from ilr_fast.statistics_runs import accuracy_over_runs, difference_over_runs

AGAINST = ("base", "grpo", "ilr")
MEASURES = (("validation_accuracy",), ("reward",), ("cooperation_share",))
Cell = tuple[str, str, str, str]  # agent, method, benchmark, mode


def summarise(folder: Path, *, command: str, console: Console | None = None) -> dict[str, Any]:
    """Writes `ablation.json` into an ablation's folder from the runs in it, prints the tables, and returns it.

    Where matplotlib is installed the figure, `ablation.png`, too.
    """
    found = _write([folder], folder, command)
    if console is not None:
        _print(found["rows"], console)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """One table of the runs of several folders."""
    parser = argparse.ArgumentParser(description="One table of the runs in several ablations' folders.")
    parser.add_argument("folders", nargs="+", type=Path, help="of two runs of one name the last counts")
    parser.add_argument("--out", type=Path, required=True, help="where ablation.json and ablation.png go")
    parser.add_argument("--command", default="ilr-fast ablate", help="what made the runs, for ablation.json")
    options = parser.parse_args(arguments)
    found = _write(options.folders, options.out, options.command)
    for benchmark in dict.fromkeys(row["benchmark"] for row in found["rows"]):
        print(f"{benchmark}\n\n{table(found['rows'], benchmark)}")
    return 0


def _write(folders: Sequence[Path], out: Path, command: str) -> dict[str, Any]:
    files = {file.parent.name: file for folder in folders for file in sorted(folder.glob("*/config.yaml"))}
    found = summary([read_run(file.parent) for file in files.values()], command=command)
    with disk_errors(out, "free some space and give the command again"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "ablation.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if can_draw() and found["rows"]:
        draw(found, out / "ablation.png")
    return found


def summary(runs: Sequence[Run], *, command: str) -> dict[str, Any]:
    """What `ablation.json` holds: command, environment of the first run, runs, rows, curves."""
    first = runs[0].environment if runs else {}
    return {
        "command": command,
        "environment": {key: value for key, value in first.items() if key not in ("earlier", "command")},
        "runs": [_run(run) for run in runs],
        "rows": _rows(runs),
        "curves": list(_curves(runs)),
    }


def table(rows: Sequence[Row], benchmark: str = "test") -> str:
    """The rows of one benchmark as a Markdown table, percentages, differences in points."""
    lines = [f"| {' | '.join(_HEADS)} |", f"| {' | '.join(['---', '---', *['---:'] * (len(_HEADS) - 2)])} |"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row["benchmark"] == benchmark]
    return "\n".join(lines) + "\n"


def _run(run: Run) -> dict[str, Any]:
    seconds = [dig(row, "seconds", "total") for row in run.metrics]
    return {
        "run": run.name,
        "method": _method(run),
        "agents": run.agents,
        "trained": _trained(run),
        "seed": run.config.get("seed"),
        "steps": run.steps_planned,
        "steps_done": run.steps_done,
        "finished": _finished(run),
        "seconds_of_steps": sum(s for s in seconds if s is not None),
        "tokens_generated": {agent: _tokens(run, agent) for agent in run.agents},
        "cooperation_share": {agent: _cooperation(run, agent) for agent in _trained(run)},
    }


def _method(run: Run) -> str | None:
    """What the run's trained agents are called in its results; None before there are any."""
    names = {str(row["method"]) for row in run.results} - {"base", "base_few_shot"}
    return names.pop() if len(names) == 1 else None


def _trained(run: Run) -> list[str]:
    agents = run.config.get("agents") or {}
    return [name for name, agent in agents.items() if (agent or {}).get("train") != "none"]


def _finished(run: Run) -> bool:
    measured = {row["agent"] for row in run.results if not str(row["method"]).startswith("base")}
    return run.steps_done >= (run.steps_planned or 0) and set(_trained(run)) <= measured


def _tokens(run: Run, agent: str) -> int | None:
    counts = [dig(row, "agents", agent, "tokens_generated") for row in run.metrics]
    return int(sum(c for c in counts if c is not None)) if any(c is not None for c in counts) else None


def _cooperation(run: Run, agent: str) -> list[float | None]:
    return [value for _, value in run.column(agent, "cooperation_share")]


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    measured: dict[Cell, dict[int, tuple[Run, Row]]] = {}
    for run in runs:
        for row in run.results:
            trained = row["method"] in ("base", "base_few_shot") or (_finished(run) and row["agent"] in _trained(run))
            if trained and not row.get("examples"):
                cell = str(row["agent"]), str(row["method"]), str(row["benchmark"]), str(row["mode"])
                measured.setdefault(cell, {}).setdefault(int(run.config.get("seed") or 0), (run, row))
    outcomes = {cell: {s: run.outcomes(row) for s, (run, row) in found.items()} for cell, found in measured.items()}
    return [_row(cell, measured[cell], outcomes) for cell in sorted(measured, key=_order)]


def _row(
    cell: Cell, found: Mapping[int, tuple[Run, Row]], outcomes: Mapping[Cell, Mapping[int, Any]]
) -> dict[str, Any]:
    agent, method, benchmark, mode = cell
    crossed = not any(_is_generated(run, benchmark) for run, _ in found.values())
    mean, interval = accuracy_over_runs(outcomes[cell], crossed=crossed)
    trained = not method.startswith("base")
    tokens = [_tokens(run, agent) for run, _ in found.values()]
    shares = [s for run, _ in found.values() for s in _cooperation(run, agent) if s is not None]
    return {
        "agent": agent, "method": method, "benchmark": benchmark, "mode": mode, "seeds": sorted(found),
        "n": int(next(iter(found.values()))[1]["n"]),
        "accuracy": mean, "ci95": interval,
        "accuracy_by_seed": {s: float(found[s][1]["accuracy"]) for s in sorted(found)},
        "tokens_generated": sum(t or 0 for t in tokens) / len(tokens) if trained and None not in tokens else None,
        "cooperation_share": sum(shares) / len(shares) if trained and shares else None,
        "against": {
            other: _difference(outcomes[cell], outcomes.get((agent, other, benchmark, mode), {}), crossed)
            for other in AGAINST if other != method and trained
        },
    }  # fmt: skip


def _difference(first: Mapping[int, Any], second: Mapping[int, Any], crossed: bool) -> dict[str, Any] | None:
    found = difference_over_runs(first, second, crossed=crossed)
    if found is None:
        return None
    seeds = sorted(first.keys() & second.keys())
    return {"difference": found.difference, "ci95": found.ci95, "verdict": found.verdict, "n": found.n, "seeds": seeds}


def _is_generated(run: Run, benchmark: str) -> bool:
    """Whether the questions are drawn anew for each seed."""
    return str((run.config.get("data") or {}).get("test") if benchmark == "test" else benchmark).startswith(TASK)


def _order(cell: Cell) -> tuple:
    agent, method, benchmark, mode = cell
    rank = METHODS.index(method) if method in METHODS else len(METHODS)
    return benchmark != "test", benchmark, mode, agent, rank, method


def _curves(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """By run and trained agent, each measure over the steps; None where it was not measured."""
    for run in runs:
        for agent in _trained(run):
            stages = [("accuracy", stage) for stage in run.stages]
            yield {
                "run": run.name, "method": _method(run), "agent": agent, "seed": run.config.get("seed"),
                "steps": [row["step"] for row in run.metrics],
                **{".".join(keys): [value for _, value in run.column(agent, *keys)] for keys in (*MEASURES, *stages)},
            }  # fmt: skip


_HEADS = ("agent", "method", "right", "95%", "by seed", "against base", "against GRPO", "tokens", "cooperation")


def difference_text(found: Mapping[str, Any] | None) -> str:
    """Points with their interval; a difference within it is called none.

    >>> difference_text({"difference": 0.02, "ci95": (-0.01, 0.05), "verdict": "none"})
    'none (−1.0 to +5.0)'
    """
    if found is None:
        return "–"
    low, high = (_points(100 * value) for value in found["ci95"])
    return f"{'none' if found['verdict'] == 'none' else _points(100 * found['difference'])} ({low} to {high})"


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _cells(row: Row) -> list[str]:
    interval = row["ci95"]
    against = row["against"]
    return [
        row["agent"],
        row["method"],
        f"{100 * row['accuracy']:.1f}",
        f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "–",
        ", ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"].values()),
        difference_text(against.get("base")),
        difference_text(against.get("grpo")),
        "–" if row["tokens_generated"] is None else f"{row['tokens_generated']:,.0f}",
        "–" if row["cooperation_share"] is None else f"{row['cooperation_share']:.2f}",
    ]


def _print(rows: Sequence[Row], console: Console) -> None:
    for benchmark, mode in dict.fromkeys((row["benchmark"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["benchmark"], row["mode"]) == (benchmark, mode)]
        seeds = sorted({seed for row in chosen for seed in row["seeds"]})
        title = f"{benchmark}, {mode}, n = {chosen[0]['n']}, seeds {', '.join(map(str, seeds))}; percent, points"
        shown = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for head in _HEADS:
            shown.add_column(head, justify="left" if head in ("agent", "method") else "right", overflow="fold")
        for row in chosen:
            shown.add_row(*map(escape, _cells(row)))
        console.print(shown)


if __name__ == "__main__":
    raise SystemExit(main())
