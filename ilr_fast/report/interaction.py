"""What Dynamic Interaction did: who cooperated how often, and whether the agents' view of difficulty is true.

Pass rates are those of first answers in the dialogues on disk; an agent's own, since D is its own view. Ability and
difficulty are those of the run's `interaction.json` (interaction.py), where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ilr_fast.difficulty import spearman
from ilr_fast.report.runs import Run, dig
from ilr_fast.report.scales import number
from ilr_fast.transcripts import Transcript, read_steps, read_transcripts

STEPS_READ = 60  # dialogue files read at most, spread evenly over the run
HEAD = ("agent", "ability γ", "cooperation", "right when cooperating", "right when competing", "D with failing (ρ)",
        "questions", "without a valid ranking")  # fmt: skip


def interaction_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A table for each run that has dialogues of more than one agent: {run, head, rows, notes}."""
    return [_table(run) for run in runs if run.metrics and len(run.agents) > 1]


def pass_rates(transcripts: Sequence[Transcript], agent: str) -> dict[str, float]:
    """Share of right first answers by question."""
    answers: dict[str, list[bool]] = {}
    for transcript in transcripts:
        first = transcript.first(agent)
        if first is not None and first.correct is not None:
            answers.setdefault(transcript.question_id, []).append(first.correct)
    return {question: sum(a) / len(a) for question, a in answers.items()}


def _table(run: Run) -> dict[str, Any]:
    steps = read_steps(run.path)
    chosen = steps[:: max(1, -(-len(steps) // STEPS_READ))]
    transcripts = [t for step in chosen for t in read_transcripts(run.path, step)]
    facts = read_interaction(run)
    shares = {a: _mean([y for _, y in run.column(a, "cooperation_share") if y is not None]) for a in run.agents}
    rows = [_row(run, agent, shares[agent], transcripts, facts) for agent in run.agents]
    return {"run": run.name, "head": HEAD, "rows": rows, "notes": _notes(run, shares, facts)}


def _row(
    run: Run, agent: str, share: float | None, transcripts: Sequence[Transcript], facts: Mapping[str, Any]
) -> list[str]:
    difficulties = (facts.get("difficulty") or {}).get(agent) or {}
    abilities = facts.get("abilities") or [{}]
    return [
        agent,
        _signed(dig(abilities[-1], "ability", agent)),
        number(share, "percent"),
        _right_under(transcripts, agent, "cooperation"),
        _right_under(transcripts, agent, "competition"),
        _signed(spearman(difficulties, pass_rates(transcripts, agent))),
        number(len(difficulties), "count") if difficulties else "–",
        number(dig(facts, "unknown_questions", agent)),
    ]


def _right_under(transcripts: Sequence[Transcript], agent: str, interaction: str) -> str:
    firsts = [t.first(agent) for t in transcripts]
    answers = [float(s.correct) for s in firsts if s and s.correct is not None and s.interaction == interaction]
    return f"{number(_mean(answers), 'percent')} of {len(answers)}" if answers else "–"


def _notes(run: Run, shares: Mapping[str, float | None], facts: Mapping[str, Any]) -> list[str]:
    notes = [
        "Share of cooperation: mean over the steps. ρ: Spearman's rank correlation of the difficulty D with the share "
        "of wrong first answers in the dialogues on disk; 1: what fails more is called harder, 0: D is noise."
    ]
    outside = [a for a, share in shares.items() if share is not None and not 0.2 <= share <= 0.8]
    if outside and run.config.get("interaction") == "dynamic":
        notes.append(f"The share of cooperation of {', '.join(outside)} lies outside 0.2 to 0.8: "
                     "this run can't support a claim about Dynamic Interaction.")
    for agent, windows in (facts.get("windows") or {}).items():
        invalid = dig(facts, "invalid_windows", agent)
        if windows and invalid:
            notes.append(f"{agent}: {invalid:.0f} of {windows} rankings could not be read, asked twice.")
    for agent in facts.get("template_rewrites") or []:
        notes.append(f"The chat template of {agent} rewrites earlier turns; its tokens stand as they were sampled.")
    return notes


def read_interaction(run: Run) -> dict[str, Any]:
    """interaction.json; {} where there is none."""
    path = run.path / "interaction.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
