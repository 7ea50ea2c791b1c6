"""Runs → report.html: the numbers of every section as plain texts, and one Jinja template that escapes all of them.

Only what charts.py drew and our own style sheet are markup; a model's text never is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

import jinja2
import yaml
from markupsafe import Markup

from ilr_fast import __version__
from ilr_fast.report.charts import interval_bar
from ilr_fast.report.compare import Group, Line, headline
from ilr_fast.report.curves import colours, learning_charts, series_label, time_charts, training_charts
from ilr_fast.report.examples import Example, changes, examples
from ilr_fast.report.interaction import interaction_tables
from ilr_fast.report.runs import Run, dig
from ilr_fast.report.scales import duration, number
from ilr_fast.statistics import Interval, PairedDifference
from ilr_fast.transcripts import Spoken

MOST_TILES = 6  # with more, the table tells it better
SECTIONS = ("results", "learning", "training", "interaction", "dialogues", "failures", "setup")


def render_page(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """The whole page as text."""
    here = files("ilr_fast.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    parts: dict[str, object] = {
        "results": True,
        "learning": Markup("").join(learning_charts(runs)),
        "training": Markup("").join([*training_charts(runs), *time_charts(runs)]),
        "interaction": interaction_tables(runs),
        "changes": [table for run in runs if (table := _changes(run))],
        "dialogues": [_dialogue(run, e, runs) for run in runs for e in examples(run.transcripts)],
        "failures": [table for run in runs if (table := _failures(run))],
        "setup": [_setup(run) for run in runs],
    }
    return environment.from_string((here / "page.html").read_text(encoding="utf-8")).render(
        title=" · ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs",
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        sections=[(s, s) for s in SECTIONS if parts[s]],
        runs=[{"name": r.name, "finished": is_finished(r), "status": status(r)} for r in runs],
        tiles=_tiles(runs, groups),
        groups=[_group(group, runs) for group in groups],
        version=__version__,
        **{name: part for name, part in parts.items() if name != "results"},
    )


def is_finished(run: Run) -> bool:
    """Whether all planned steps are done."""
    return run.steps_planned is not None and run.steps_done >= run.steps_planned


def status(run: Run) -> str:
    """How far the run is, how long its steps took, who takes part."""
    seconds = [s for row in run.metrics if (s := dig(row, "seconds", "total")) is not None]
    tokens = [t for row in run.metrics if (t := dig(row, "tokens", "generated")) is not None]
    planned = f" of {run.steps_planned}" if run.steps_planned else ""
    texts = [
        f"{run.steps_done}{planned} steps" if run.metrics else "no step yet",
        duration(sum(seconds)) if seconds else "",
        f"{number(sum(tokens), 'count')} tokens generated" if tokens else "",
        ", ".join(run.agents),
        str(run.environment.get("device") or ""),
    ]
    return " · ".join(t for t in texts if t)


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval_text(interval: Interval | None) -> str:
    """A 95% interval in percent."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def difference_text(difference: PairedDifference | None) -> str:
    """A paired difference with its interval, in percentage points."""
    if difference is None:
        return "–"
    low, high = difference.ci95
    return f"{points(difference.difference)} ({points(low)} to {points(high)})"


def difference_class(difference: PairedDifference | None) -> str:
    """`beats` or `worse` where the interval leaves out 0."""
    if difference is None:
        return ""
    return "beats" if difference.beats else ("worse" if difference.ci95[1] < 0 else "")


def group_title(group: Group) -> str:
    """Who was measured on what, how."""
    samples = f", {group.samples} answers each" if group.samples > 1 else ""
    return f"{group.agent} on {group.benchmark}, {'alone' if group.mode == 'single' else group.mode}{samples}"


def _tiles(runs: Sequence[Run], groups: Sequence[Group]) -> list[dict]:
    palette = colours(runs)
    run_of = {run.name: run for run in runs}
    lines = headline(groups)
    tiles = []
    for line, base in lines if len(lines) <= MOST_TILES else ():
        text = f"95% interval {interval_text(line.ci95)}, n = {line.n}"
        if line.to_base is not None:
            text = f"{difference_text(line.to_base)} points against base, n = {line.to_base.n}"
        who = f"{series_label(runs, run_of[line.run], line.agent)}: {line.benchmark}"
        tiles.append({
            "who": who, "colour": palette.get((line.run, line.agent), 0) % 8, "after": number(line.accuracy, "percent"),
            "before": number(base.accuracy, "percent") if base else "", "text": text,
        })  # fmt: skip
    return tiles


def _group(group: Group, runs: Sequence[Run]) -> dict:
    palette = colours(runs)
    ends = [v for line in group.lines for v in (line.ci95 or (line.accuracy,))]
    low, high = max(0.0, min(ends) - 0.05), min(1.0, max(ends) + 0.05)
    return {"title": group_title(group), "lines": [_line(line, low, high, palette) for line in group.lines]}


def _line(line: Line, low: float, high: float, palette: dict[tuple[str, str], int]) -> dict:
    return {
        "run": line.run,
        "method": line.label + (" · best" if line.best_few_shot else ""),
        "own": not line.is_base,
        "accuracy": number(line.accuracy, "percent"),
        "bar": interval_bar(line.accuracy, line.ci95, low, high, palette.get((line.run, line.agent), 0)),
        "interval": interval_text(line.ci95),
        "n": f"{line.n} × {line.samples}" if line.samples > 1 else str(line.n),
        "to_base": difference_text(line.to_base),
        "base_class": difference_class(line.to_base),
        "to_few_shot": difference_text(line.to_few_shot),
        "few_class": difference_class(line.to_few_shot),
        "tokens": number(line.tokens, "count"),
    }


def _changes(run: Run) -> dict | None:
    rows = [
        [c.agent, *(f"{number(part / c.n, 'percent')}" for part in (c.both_right, c.mended, c.spoiled, c.both_wrong)),
         f"{points((c.mended - c.spoiled) / c.n)}", str(c.n)]
        for c in changes(run.transcripts)
    ]  # fmt: skip
    steps = sorted({t.step for t in run.transcripts})
    return {"run": run.name, "rows": rows, "first": steps[0], "last": steps[-1]} if rows else None


def _dialogue(run: Run, example: Example, runs: Sequence[Run]) -> dict:
    transcript, palette = example.transcript, colours(runs)
    stages: dict[str, list[dict]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for agent, turns in transcript.agents.items():
        for turn in turns:
            seen[agent, turn.stage] += 1
            count = seen[agent, turn.stage]
            name = turn.stage if count == 1 else f"{turn.stage}, round {count}"
            stages.setdefault(name, []).append(_turn(agent, turn, palette.get((run.name, agent), 0)))
    prefix = f"{run.name} · " if len(runs) > 1 else ""
    return {
        "title": example.title,
        "where": f"{prefix}step {transcript.step}, question {transcript.question_id}, dialogue {transcript.sample + 1}",
        "question": transcript.question,
        "expected": transcript.expected,
        "stages": [{"name": name, "turns": turns} for name, turns in stages.items()],
    }


def _turn(agent: str, turn: Spoken, colour: int) -> dict:
    verdict = "" if turn.correct is None else ("right" if turn.correct else "wrong")
    return {
        "agent": agent, "interaction": turn.interaction, "verdict": verdict, "colour": colour % 8,
        "text": turn.text.strip() or "(nothing)", "message": turn.message, "numbers": turn.numbers,
    }  # fmt: skip


def _failures(run: Run) -> dict | None:
    kinds = Counter(str(row.get("kind")) for row in run.failures)
    rows = []
    for kind, count in kinds.most_common():
        mine = [row for row in run.failures if str(row.get("kind")) == kind]
        last = mine[-1]
        where = f"question {last['question']}: " if last.get("question") else ""
        rows.append({"kind": kind, "count": count, "steps": len({row.get("step") for row in mine}),
                     "example": f"step {last.get('step')}, {where}{last.get('error')}"[:400]})
    return {"run": run.name, "rows": rows} if rows else None


def _plain(value: object) -> str:
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if value is None or isinstance(value, str):
        return value or "–"
    return json.dumps(value, ensure_ascii=False)


def _setup(run: Run) -> dict:
    environment = [(str(key), _plain(value)) for key, value in run.environment.items()]
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "no config.yaml"
    return {"name": run.name, "environment": environment or [("–", "no environment.json")], "config": config}
