"""Results rows beside each other: each method's accuracy, its difference to base, to the best few-shot base, to GRPO.

The runs of one arm (arms.py) are one line, over all their seeds; the base models of all runs that start from the same
model are one line too. Differences are paired on the same questions, seed by seed; where the two have no seed in
common, with the reference's first. The interval over several seeds is that of statistics_runs.py.

The best few-shot base is the one with the highest accuracy on the very questions it is compared on. Taking the maximum
on held-out questions flatters the base, never us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ilr_fast.report.arms import Arm
from ilr_fast.report.runs import Row, Run, asks_anew, dig, mapping
from ilr_fast.statistics import Interval, PairedDifference
from ilr_fast.statistics_runs import Outcomes, accuracy_over_runs, difference_over_runs

METHODS = ("base", "base_few_shot", "grpo", "grpo_third", "grpo_peer", "ilr_neither", "ilr_pc", "ilr_di", "ilr_ratio_0",
           "ilr_ratio_0.25", "ilr_ratio_0.5", "ilr_ratio_0.75", "ilr_ratio_1", "ilr")
REFERENCES = ("base", "base_few_shot", "grpo")


class Measured(NamedTuple):
    """A results row, the run and the arm that it is of."""

    arm: str
    run: Run
    row: Row

    @property
    def method(self) -> str:
        return str(self.row["method"])

    @property
    def seed(self) -> int | None:
        seed = dig(self.row, "seed")
        return self.run.seed if seed is None else int(seed)

    def outcomes(self) -> dict[str, list[bool]]:
        """Right or wrong by question; {} where the run does not hold it."""
        return self.run.outcomes(self.row)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table of results: an arm's method, over its seeds. `to` holds the differences by reference."""

    measured: Sequence[Measured]
    label: str
    accuracy: float
    ci95: Interval | None
    to: Mapping[str, PairedDifference | None] = field(default_factory=dict)
    best_few_shot: bool = False

    @property
    def arm(self) -> str:
        return self.measured[0].arm

    @property
    def agent(self) -> str:
        return str(self.measured[0].row["agent"])

    @property
    def method(self) -> str:
        return self.measured[0].method

    @property
    def is_base(self) -> bool:
        return self.method.startswith("base")

    @property
    def n(self) -> int:
        """Questions of one seed."""
        return int(self.measured[0].row["n"])

    @property
    def samples(self) -> int:
        return samples_of(self.measured[0].row)

    @property
    def seeds(self) -> int:
        return len(self.measured)

    @property
    def tokens(self) -> float | None:
        """Mean tokens of an answer."""
        found = [t for m in self.measured if (t := dig(m.row, "tokens_mean")) is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class Group:
    """The methods that one agent was measured with on one benchmark in one mode, by `samples` answers a question."""

    agent: str
    benchmark: str
    mode: str
    samples: int
    lines: Sequence[Line]


def samples_of(row: Row) -> int:
    """Answers to a question."""
    return int(dig(row, "samples") or 1)


def method_label(row: Row) -> str:
    """The method's name; for a few-shot base its number of worked examples."""
    if row["method"] != "base_few_shot":
        return str(row["method"])
    return f"base, {row['examples']} examples" if row.get("examples") else "base, few-shot"


def groups(arms: Sequence[Arm]) -> list[Group]:
    """All results, one group for each benchmark, mode, number of answers and agent."""
    members: dict[tuple[str, str, int, str], list[Measured]] = {}
    for arm in arms:
        for run in arm.runs:
            for row in latest(run.results):
                if row["agent"] not in run.learners and not str(row["method"]).startswith("base"):
                    continue  # a frozen peer was measured too: the method did nothing to it
                key = str(row["benchmark"]), str(row["mode"]), samples_of(row), str(row["agent"])
                members.setdefault(key, []).append(Measured(arm.label, run, row))
    return [
        Group(agent, benchmark, mode, samples, _compared(_lines(rows)))
        for (benchmark, mode, samples, agent), rows in members.items()
    ]


def latest(rows: Sequence[Row]) -> list[Row]:
    """Rows that measure the same thing again replace the earlier ones."""
    keys = ("agent", "method", "benchmark", "mode", "examples", "samples", "seed")
    return list({tuple(str(row.get(key)) for key in keys): row for row in rows}.values())


def group_title(group: Group) -> str:
    """Who was measured on what, how."""
    samples = f", {group.samples} answers each" if group.samples > 1 else ""
    return f"{group.agent} on {group.benchmark}, {'alone' if group.mode == 'single' else group.mode}{samples}"


def difference(first: Sequence[Measured], second: Sequence[Measured]) -> PairedDifference | None:
    """The first's accuracy minus the second's on the questions of both, over the first's seeds; None without any."""
    mine, theirs = by_seed(first), by_seed(second)
    if not mine.keys() & theirs.keys():
        theirs = dict.fromkeys(mine, next(iter(theirs.values())))
    return difference_over_runs(mine, theirs, crossed=_crossed(first))


def by_seed(measured: Sequence[Measured]) -> dict[int, Outcomes]:
    """Right or wrong by question, for each seed; a row without a seed has the number of its place."""
    return {place if one.seed is None else one.seed: one.outcomes() for place, one in enumerate(measured)}


def _lines(members: Sequence[Measured]) -> list[Line]:
    """The lines in the order of METHODS; what a base's runs measured alike, or with the same seed, counts once."""
    ordered = sorted(members, key=lambda m: (_rank(m.method), dig(m.row, "examples") or 0))
    by_line: dict[tuple, dict[int | None, Measured]] = {}
    for one in ordered:
        is_base = one.method.startswith("base")
        seeds = by_line.setdefault((method_label(one.row), _model(one) if is_base else one.arm), {})
        if not is_base or not any(_same(one.row, other.row) for other in seeds.values()):
            seeds.setdefault(one.seed, one)
    return [_line(list(seeds.values())) for seeds in by_line.values()]


def _line(measured: Sequence[Measured]) -> Line:
    rows = [m.row for m in measured]
    accuracy = sum(float(row["accuracy"]) for row in rows) / len(rows)
    ci95 = _interval(rows[0].get("ci95"))
    if len(rows) > 1:
        outcomes = by_seed(measured)
        ci95 = accuracy_over_runs(outcomes, crossed=_crossed(measured))[1] if all(outcomes.values()) else None
    return Line(measured, method_label(rows[0]), accuracy, ci95)


def _crossed(measured: Sequence[Measured]) -> bool:
    """Whether all seeds were asked the same questions."""
    benchmark = str(measured[0].row["benchmark"])
    return not any(asks_anew(one.run, benchmark) for one in measured)


def _compared(lines: Sequence[Line]) -> list[Line]:
    """The lines with their differences to the references that there are."""
    best = {}
    for method in REFERENCES:
        candidates = [line for line in lines if line.method == method]
        if candidates:
            best[method] = max(candidates, key=lambda line: line.accuracy)
    return [
        Line(line.measured, line.label, line.accuracy, line.ci95,
             {method: difference(line.measured, reference.measured)
              for method, reference in best.items() if _is_compared(line, method)},
             line is best.get("base_few_shot"))
        for line in lines
    ]  # fmt: skip


def _is_compared(line: Line, method: str) -> bool:
    """Bases are compared with the plain base only, trained ones with all references but their own kind."""
    return line.method != method and (method == "base" or not line.is_base)


def _model(one: Measured) -> str:
    agent = mapping(mapping(one.run.config.get("agents")).get(str(one.row["agent"])))
    return str(agent.get("model", ""))


def _same(row: Row, other: Row) -> bool:
    return all(row.get(key) == other.get(key) for key in ("correct", "n", "tokens_mean"))


def _interval(value: object) -> Interval | None:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return float(value[0]), float(value[1])
    return None


def _rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else METHODS.index("ilr") - 1, method)
