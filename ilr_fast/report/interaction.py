"""What Dynamic Interaction did: who cooperated how often, and whether the agents' view of difficulty is true.

Pass rates are those of first answers in the dialogues; an agent's own, since D is its own view. Ability and
difficulty are those of the run's `interaction.json` (interaction.py), where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ilr_fast.difficulty import spearman
from ilr_fast.report.runs import Run, dig, mapping
from ilr_fast.report.survey import Survey, difficulty_of
from ilr_fast.report.texts import number, signed
from ilr_fast.statistics import Z95

HEAD = ("agent", "ability γ", "cooperation", "right when cooperating", "right when competing", "D with failing (ρ)",
        "D with level (ρ)", "questions", "without a valid ranking")  # fmt: skip

RHO = ("Share of cooperation: mean over the steps. ρ: Spearman's rank correlation of the difficulty D with the share "
       "of wrong first answers in the dialogues, and with the data's levels; 1: what fails more is called harder, 0: D "
       "is noise. Random: 95 of 100 random rankings of as many questions lie within (normal approximation).")


def interaction_table(
    runs: Sequence[Run], surveys: Mapping[str, Survey], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """{head, rows, notes} of one arm's runs, those of several agents that have done a step; None without any number.

    `surveys` and `facts` (interaction.json) are by the run's name.
    """
    rows, notes = [], {RHO: None}
    talking = [run for run in runs if run.metrics and len(run.agents) > 1]
    for run in talking:
        shares = {a: _mean([y for _, y in run.column(a, "cooperation_share") if y is not None]) for a in run.agents}
        suffix, prefix = (f" · {run.name}", f"{run.name}: ") if len(runs) > 1 else ("", "")
        rows += [_row(agent, suffix, shares[agent], surveys[run.name], facts[run.name]) for agent in run.agents]
        notes |= dict.fromkeys(prefix + note for note in _notes(run, shares, facts[run.name]))
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]  # where nobody is told to cooperate or compete
    return {"head": HEAD, "rows": rows, "notes": list(notes)} if rows else None


def _row(agent: str, suffix: str, share: float | None, survey: Survey, facts: Mapping[str, Any]) -> list[str]:
    difficulties = difficulty_of(facts).get(agent, {})
    abilities = facts.get("abilities")
    newest = abilities[-1] if isinstance(abilities, list) and abilities else {}
    return [
        agent + suffix,
        signed(dig(newest, "ability", agent)),
        number(share, "percent"),
        _right_under(survey, agent, "cooperation"),
        _right_under(survey, agent, "competition"),
        _correlation(difficulties, survey.pass_rates(agent)),
        _correlation(difficulties, {question: -float(level) for question, level in survey.levels.items()}),
        number(len(difficulties), "count") if difficulties else "–",
        number(dig(facts, "unknown_questions", agent)),
    ]


def _correlation(difficulties: Mapping[str, float], ease: Mapping[str, float]) -> str:
    """Spearman's ρ of D with the reverse of `ease`, and how far from 0 a random ranking comes in 95 of 100 cases."""
    rho, shared = spearman(difficulties, ease), len(difficulties.keys() & ease.keys())
    return "–" if rho is None else f"{signed(rho)} (random ±{min(1.0, Z95 / (shared - 1) ** 0.5):.2f})"


def _right_under(survey: Survey, agent: str, stance: str) -> str:
    keys = [key for key in survey.stances.n if (key[0], key[1], key[3]) == (agent, stance, "first")]
    n, right = (sum(counts[key] for key in keys) for counts in (survey.stances.n, survey.stances.right))
    return f"{number(right / n, 'percent')} of {n}" if n else "–"


def _notes(run: Run, shares: Mapping[str, float | None], facts: Mapping[str, Any]) -> list[str]:
    notes = []
    outside = [a for a, share in shares.items() if share is not None and not 0.2 <= share <= 0.8]
    if outside and run.config.get("interaction") == "dynamic":
        notes.append(f"The share of cooperation of {', '.join(outside)} lies outside 0.2 to 0.8: "
                     "this run can't support a claim about Dynamic Interaction.")
    for agent, windows in mapping(facts.get("windows")).items():
        invalid = dig(facts, "invalid_windows", agent)
        if windows and invalid:
            notes.append(f"{invalid:.0f} of {windows} rankings by {agent} could not be read, asked twice.")
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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
