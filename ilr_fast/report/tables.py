"""The tables of the page: results by group, first answers against last ones, failures, setup."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ilr_fast.report.arms import Arm, differing_keys
from ilr_fast.report.compare import Group, Line, group_title
from ilr_fast.report.flips import FlipTally
from ilr_fast.report.overview import Cell, Table, line_name
from ilr_fast.report.runs import Run
from ilr_fast.report.texts import difference_class, difference_text, interval_text, number, points, questions_text

AGAINST = {"base": "against base", "base_few_shot": "against best few-shot base", "grpo": "against GRPO"}
FLIPS = ("first → last answer", "right → right", "wrong → right", "of these by a peer", "right → wrong",
         "of these by a peer", "wrong → wrong", "gain, points", "dialogues")  # fmt: skip


def result_table(group: Group, *, with_arm: bool) -> Table:
    """One agent on one benchmark: each method with its interval and its differences to those there are."""
    references = [method for method in AGAINST if any(line.to.get(method) for line in group.lines)]
    head = ["method", "right", "95% interval", "questions", *(AGAINST[r] for r in references), "tokens"]
    return Table(group_title(group), head, [_result(line, references, with_arm) for line in group.lines])


def flip_table(tallies: Sequence[tuple[str, FlipTally]]) -> Table | None:
    """What became of each agent's first answers in each arm (its title, its tally); None where nobody spoke twice."""
    rows = []
    for title, agent, c in ((title, agent, c) for title, tally in tallies for agent, c in tally.counts.items()):
        n, by_peer, lost = c.total(), c["mended by a peer"], c["spoiled by a peer"]
        mended, spoiled = by_peer + c["mended alone"], lost + c["spoiled alone"]
        shares = (c["kept right"], mended, by_peer, spoiled, lost, c["kept wrong"])
        cells = [*(number(part / n, "percent") for part in shares), points((mended - spoiled) / n), f"{n:,}"]
        rows.append([Cell(f"{agent}, {title}" if title else agent), *map(Cell, cells)])
    return Table("", FLIPS, rows) if rows else None


def differing_table(arms: Sequence[Arm]) -> Table | None:
    """The config keys in which the arms differ."""
    rows = [[Cell(key), *map(Cell, values)] for key, values in differing_keys(arms)]
    return Table("", ["key", *(arm.label for arm in arms)], rows) if rows and len(arms) > 1 else None


def failures(run: Run) -> list[dict[str, Any]]:
    """Kinds of failures with their number and an example."""
    kinds = Counter(str(row.get("kind")) for row in run.failures)
    rows = []
    for kind, count in kinds.most_common():
        mine = [row for row in run.failures if str(row.get("kind")) == kind]
        last = mine[-1]
        where = f"question {last['question']}: " if last.get("question") else ""
        rows.append({"run": run.name, "kind": kind, "count": count, "steps": len({str(r.get("step")) for r in mine}),
                     "example": f"step {last.get('step')}, {where}{last.get('error')}"[:400]})  # fmt: skip
    return rows


def setup(run: Run) -> dict[str, Any]:
    """A run's environment and config as texts."""
    environment = [(str(key), _plain(value)) for key, value in run.environment.items()]
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "no config.yaml"
    return {"name": run.name, "environment": environment or [("–", "no environment.json")], "config": config}


def _result(line: Line, references: Sequence[str], with_arm: bool) -> list[Cell]:
    to = [line.to.get(reference) for reference in references]
    return [
        Cell(line_name(line, with_arm) + (" · best" if line.best_few_shot else "")),
        Cell(number(line.accuracy, "percent")),
        Cell(interval_text(line.ci95)),
        Cell(questions_text(line.n, line.samples, line.seeds)),
        *(Cell(difference_text(difference), "", difference_class(difference)) for difference in to),
        Cell("–" if line.tokens is None else f"{line.tokens:,.1f}"),
    ]


def _plain(value: object) -> str:
    if isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if value is None or isinstance(value, str):
        return value or "–"
    return json.dumps(value, ensure_ascii=False)
