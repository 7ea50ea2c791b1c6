"""Results rows beside each other: each method's accuracy, its paired difference to base and to the best few-shot base.

The best few-shot base is the one with the highest accuracy on the very questions it is compared on. Taking the maximum
on held-out questions flatters the base, never us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilr_fast.report.runs import Row, Run
from ilr_fast.statistics import Interval, PairedDifference, paired_difference

METHODS = ("base", "base_few_shot", "grpo", "grpo_peer", "ilr_neither", "ilr_pc", "ilr_di", "ilr_ratio_0",
           "ilr_ratio_0.25", "ilr_ratio_0.5", "ilr_ratio_0.75", "ilr_ratio_1", "ilr")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table of results."""

    run: str
    agent: str
    method: str
    label: str
    benchmark: str
    mode: str
    n: int
    accuracy: float
    ci95: Interval | None
    samples: int
    tokens: float | None
    failed: int
    checkpoint: str
    to_base: PairedDifference | None
    to_few_shot: PairedDifference | None
    best_few_shot: bool

    @property
    def is_base(self) -> bool:
        return self.method.startswith("base")


@dataclass(frozen=True, slots=True)
class Group:
    """The methods that one agent was measured with on one benchmark in one mode, by `samples` answers a question."""

    agent: str
    benchmark: str
    mode: str
    samples: int
    lines: Sequence[Line]


def method_label(row: Row) -> str:
    """The method's name; for a few-shot base its number of worked examples."""
    if row["method"] != "base_few_shot":
        return str(row["method"])
    return f"base, {row['examples']} examples" if row.get("examples") else "base, few-shot"


def groups(runs: Sequence[Run]) -> list[Group]:
    """All results, one group for each benchmark, mode, number of answers and agent."""
    members: dict[tuple[str, str, int, str], list[tuple[Run, Row]]] = {}
    for run in runs:
        for row in latest(run.results):
            key = str(row["benchmark"]), str(row["mode"]), int(row.get("samples") or 1), str(row["agent"])
            members.setdefault(key, []).append((run, row))
    return [
        Group(agent, benchmark, mode, samples, _lines(rows))
        for (benchmark, mode, samples, agent), rows in members.items()
    ]


def latest(rows: Sequence[Row]) -> list[Row]:
    """Rows that measure the same thing again replace the earlier ones."""
    keys = ("agent", "method", "benchmark", "mode", "examples", "samples")
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def headline(groups: Sequence[Group]) -> list[tuple[Line, Line | None]]:
    """For each agent alone (mode single): every trained line with its base line, where there is one."""
    pairs: list[tuple[Line, Line | None]] = []
    for group in groups:
        if group.mode != "single":
            continue
        bases = [line for line in group.lines if line.method == "base"]
        for line in group.lines:
            if not line.is_base:
                own = [b for b in bases if b.run == line.run] or bases
                pairs.append((line, own[0] if own else None))
    return pairs


def _lines(members: Sequence[tuple[Run, Row]]) -> list[Line]:
    """The lines in the order of METHODS; a base that several runs measured alike stands there once."""
    ordered = sorted(members, key=lambda m: (_rank(str(m[1]["method"])), m[1].get("examples") or 0))
    seen: set[tuple] = set()
    lines = []
    for run, row in ordered:
        identity = (method_label(row), row.get("correct"), row["n"], row.get("samples"), row.get("tokens_mean"))
        if str(row["method"]).startswith("base"):
            if identity in seen:
                continue
            seen.add(identity)
        lines.append(_line(run, row, members))
    return lines


def _line(run: Run, row: Row, members: Sequence[tuple[Run, Row]]) -> Line:
    method = str(row["method"])
    few_shot = _of_method(run, members, "base_few_shot")
    return Line(
        run=run.name, agent=str(row["agent"]), method=method, label=method_label(row), benchmark=str(row["benchmark"]),
        mode=str(row["mode"]), n=int(row["n"]), accuracy=float(row["accuracy"]), ci95=_interval(row.get("ci95")),
        samples=int(row.get("samples") or 1), tokens=row.get("tokens_mean"), failed=int(row.get("failed") or 0),
        checkpoint=str(row.get("checkpoint") or ""),
        to_base=None if method == "base" else _difference(run, row, _of_method(run, members, "base")),
        to_few_shot=None if method.startswith("base") else _difference(run, row, few_shot),
        best_few_shot=any(other is row for _, other in few_shot),
    )  # fmt: skip


def _of_method(run: Run, members: Sequence[tuple[Run, Row]], method: str) -> list[tuple[Run, Row]]:
    """The row of `method` to compare with (the most accurate), the run's own before another run's; [] without any."""
    found = [(other, row) for other, row in members if row["method"] == method]
    own = [(other, row) for other, row in found if other is run]
    return sorted(own or found, key=lambda m: -m[1]["accuracy"])[:1]


def _difference(run: Run, row: Row, reference: Sequence[tuple[Run, Row]]) -> PairedDifference | None:
    for other, base in reference:
        return paired_difference(run.outcomes(row), other.outcomes(base))
    return None


def _interval(value: object) -> Interval | None:
    return (float(value[0]), float(value[1])) if isinstance(value, (list, tuple)) and len(value) == 2 else None


def _rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)
