"""`ilr-fast eval RUN or MODEL … --benchmarks a,b`: accuracy of runs and models, with 95% intervals.

    ilr-fast eval runs/quickstart --benchmarks test --samples 4
    ilr-fast eval runs/a Qwen/Qwen3-0.6B --benchmarks gsm8k,data/mine.jsonl --mode single,debate --limit 200

A run is measured by the agents of its best checkpoint, under its own config. Alone, every target is loaded after the
other; in debate and Idea3 all agents of all targets talk, under the first target's config. Rows go to results.json of
the run that an agent is of, or, with `--out`, all to that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ilr_fast.config import Config
from ilr_fast.errors import UserError, nearest
from ilr_fast.evaluate import MODES, Evaluation, evaluate_agents, open_grader, record
from ilr_fast.evaluate_gains import print_gains, with_gains
from ilr_fast.evaluate_papers import Paper, paper
from ilr_fast.evaluate_targets import Target, read_targets, together
from ilr_fast.report.terminal import print_rows
from ilr_fast.team import Team, open_team, prepare_chats


@dataclass(frozen=True, slots=True)
class Seating:
    """Agents that are loaded together: the config that holds them, the modes, and by their name there whose they are.

    A member is (target, the agent's name in its run, its name in the table).
    """

    config: Config
    modes: Sequence[str]
    members: Mapping[str, tuple[Target, str, str]]


def evaluate_command(
    targets: Sequence[str],
    *,
    benchmarks: Sequence[str],
    modes: Sequence[str] = ("single",),
    samples: int = 1,
    limit: int | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> list[Mapping[str, Any]]:
    """Measures, records, prints tables, and returns the rows (agents under the names that the tables show).

    `benchmarks`: names, JSONL paths, Hub names, or `test` for a run's held-out questions. `limit`: the first so many
    questions of each. Raises UserError, for bad input before any model is loaded.
    """
    console = console or Console()
    _check(targets, benchmarks, modes, samples, limit)
    found = read_targets(targets, overrides)
    seatings = list(_seatings(found, modes))
    papers = [[paper(name, seating.config, limit) for name in benchmarks] for seating in seatings]
    chats = [prepare_chats(seating.config) for seating in seatings]
    measured = Evaluation([], {})
    with _bars(console) as progress:
        for seating, exam, formats in zip(seatings, papers, chats, strict=True):
            with open_team(seating.config, formats) as team:
                for one in exam:
                    result = _measure(team, one, seating, samples, progress)
                    _record(result, seating, out)
                    measured += _renamed(result, {name: shown for name, (_, _, shown) in seating.members.items()})
    rows: list[Mapping[str, Any]] = list(with_gains(measured))
    for seating in seatings:
        _record(_known_there(rows, seating), seating, out)
    print_rows(console, rows)
    print_gains(console, rows)
    _say_where(console, found, out)
    return rows


def _check(
    targets: Sequence[str], benchmarks: Sequence[str], modes: Sequence[str], samples: int, limit: int | None
) -> None:
    for values, option in ((targets, "RUN or MODEL"), (benchmarks, "--benchmarks"), (modes, "--mode")):
        if not values:
            raise UserError("nothing is named", option, "name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"one stands twice in {', '.join(values)}", option, "name each once")
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}", "--mode", nearest(mode, MODES))
    if samples < 1:
        raise UserError(f"{samples} answers for each question", "--samples", "use 1 (greedy) or more")
    if limit is not None and limit < 1:
        raise UserError(f"{limit} questions", "--limit", "use 1 or more, or leave it out")


def _seatings(targets: Sequence[Target], modes: Sequence[str]) -> Iterator[Seating]:
    """As few agents loaded at a time as the modes allow: alone, target by target; then all of them together."""
    everybody, members = together(targets)
    if len(members) < 2 and set(modes) != {"single"}:
        raise UserError("debate and idea3 need peers, and there is one agent", "--mode", "name another run or model")
    for target in targets:
        own = modes if len(targets) == 1 else [mode for mode in modes if mode == "single"]
        shown = {agent: (target, agent, name) for name, (owner, agent) in members.items() if owner is target}
        if own:
            yield Seating(target.config, own, shown)
    shared = [mode for mode in modes if mode != "single"]
    if len(targets) > 1 and shared:
        yield Seating(everybody, shared, {name: (owner, agent, name) for name, (owner, agent) in members.items()})


def _measure(team: Team, paper: Paper, seating: Seating, samples: int, progress: Any) -> Evaluation:
    with open_grader(paper.config) as grader:
        return evaluate_agents(
            team.seats, paper.questions, grader, config=paper.config, benchmark=paper.benchmark, modes=seating.modes,
            method={name: target.method for name, (target, _, _) in seating.members.items()},
            checkpoint={name: target.checkpoint for name, (target, _, _) in seating.members.items()},
            samples=samples, examples=paper.examples, seed=paper.config.seed, progress=progress,
        )  # fmt: skip


def _record(result: Evaluation, seating: Seating, out: Path | None) -> None:
    """All rows to `out`; without it each run's own to its folder, under the run's names."""
    if out is not None:
        record(out, _renamed(result, {name: shown for name, (_, _, shown) in seating.members.items()}))
        return
    folders: dict[Path, dict[str, str]] = {}
    for name, (target, agent, _) in seating.members.items():
        if target.folder is not None:
            folders.setdefault(target.folder, {})[name] = agent
    for folder, names in folders.items():
        record(folder, _renamed(result, names))


def _known_there(rows: Sequence[Mapping[str, Any]], seating: Seating) -> Evaluation:
    """The rows of a seating with what all seatings together have shown, under the names that it has for its agents."""
    names = {shown: name for name, (_, _, shown) in seating.members.items()}
    mine = [row for row in rows if row["agent"] in names and row.get("against_single") and row["mode"] in seating.modes]
    return Evaluation([{**row, "agent": names[row["agent"]]} for row in mine], {})


def _renamed(result: Evaluation, names: Mapping[str, str]) -> Evaluation:
    """The part of the result that is about the agents in `names`, under their names there."""

    def change(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "agent": names[row["agent"]]} for row in rows if row["agent"] in names]

    outcomes = {file: change(rows) for file, rows in result.per_question.items()}
    return Evaluation(change(result.rows), {file: rows for file, rows in outcomes.items() if rows})


def _say_where(console: Console, targets: Sequence[Target], out: Path | None) -> None:
    places = [str(out)] if out is not None else [str(t.folder) for t in targets if t.folder is not None]
    if places:
        console.print(f"recorded in {', '.join(places)}", highlight=False, markup=False, soft_wrap=True)
    if out is None and any(t.folder is None for t in targets):
        console.print("the models' rows are not recorded; --out FOLDER keeps them", highlight=False)


class _Bars:
    """Progress of an evaluation: one bar for each (method, benchmark, agent)."""

    def __init__(self, bars: Progress):
        self.bars = bars

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A bar that goes when the phase is done."""
        task = self.bars.add_task(name, total=total)
        try:
            yield lambda *_: self.bars.advance(task)
        finally:
            self.bars.remove_task(task)


@contextmanager
def _bars(console: Console) -> Iterator[_Bars]:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        yield _Bars(bars)
