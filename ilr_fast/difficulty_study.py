"""`ilr-fast difficulty CONFIG`: is what the agents find hard what is hard, and who would cooperate how often?

    ilr-fast difficulty configs/small/largest.yaml --questions 60

Each agent orders the same training questions by self-ranking and answers each of them alone several times. Its
ranking is compared (Spearman) with the data set's levels and with the measured pass rates, its own and all agents';
so are random rankings of the same windows, whose middle 95% is what says nothing. For every estimator, and for random
rankings, follows the share of questions on which the agent would cooperate at its measured ability.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.ability import ability, cooperation_share, interactions
from ilr_fast.alone import answer_alone
from ilr_fast.config import Config
from ilr_fast.difficulty import Difficulty, from_levels, from_pass_rates, from_rankings, spearman
from ilr_fast.durable import write_text
from ilr_fast.environment import environment
from ilr_fast.errors import UserError
from ilr_fast.evaluate import open_grader
from ilr_fast.protocols import load_protocol
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.ranking import self_ranking, windows
from ilr_fast.rewards import Grader
from ilr_fast.rollout import Seat
from ilr_fast.session import Ready, prepare
from ilr_fast.team import open_team
from ilr_fast.types import Question

RANDOM_RANKINGS = 400


def difficulty_study(
    config: Config, *, questions: int, samples: int, command: str, out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures, prints a table, writes `out` (JSON), and returns what it holds. UserError for what can't be asked."""
    ready = prepare(config)
    asked = list(ready.splits["train"])[:questions]
    if len(asked) < 2:
        raise UserError("fewer than two questions", "--questions", "ask for more: a ranking compares them")
    found = {"command": command, **environment(command), "agents": _measure(ready, asked, samples)}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    _print(found["agents"], console or Console())
    return found


def compare(
    rankings: Mapping[str, Difficulty],
    passes: Mapping[str, Mapping[str, int]],
    questions: Sequence[Question],
    config: Config,
    *,
    samples: int,
    abilities: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row for each agent, from its self-ranking and how many of its `samples` answers to each question were right.

    Correlations are with being hard: 1 where exactly the questions of higher levels, or lower pass rates, are called
    harder; None where a side has one value only, or there are no levels.
    """
    ids = [question.id for question in questions]
    everybody = {q: sum(right[q] for right in passes.values()) for q in ids}
    by_pass_rate = from_pass_rates(everybody, dict.fromkeys(ids, samples * len(passes))).values
    levels = {q.id: -float(q.level) for q in questions if q.level is not None}  # spearman takes what grows with ease
    rows = []
    for name, ranking in rankings.items():
        targets = {
            "level": levels,
            "own pass rate": {q: count / samples for q, count in passes[name].items()},
            "pass rate of all": {q: everybody[q] / samples / len(passes) for q in ids},
        }
        estimates = {"self_ranking": ranking.values, "pass_rate": by_pass_rate}
        if len(levels) == len(ids):
            estimates["level"] = from_levels(questions, config.difficulty.levels).values
        guesses = _random_rankings(ids, config)
        rows.append({
            "agent": name, "questions": len(ids), "samples": samples, "ability": abilities[name],
            "windows": ranking.windows, "invalid_windows": ranking.invalid_windows,
            "unknown_questions": len(ranking.unknown),
            "correlation": {target: spearman(ranking.values, values) for target, values in targets.items()},
            "random_95": {target: _middle([spearman(g, known) for g in guesses]) for target, known in targets.items()},
            "pass_rate_with_level": spearman(by_pass_rate, levels),
            "cooperation_share": {e: _share(name, values, abilities[name]) for e, values in estimates.items()},
            "random_cooperation_share": float(np.mean([_share(name, g, abilities[name]) for g in guesses])),
        })  # fmt: skip
    return rows


def _measure(ready: Ready, questions: Sequence[Question], samples: int) -> list[dict[str, Any]]:
    config, validation = ready.config, list(ready.splits["validation"])[: ready.config.ability.questions]
    prompts = load_prompts(config.prompts.file, config.reward.name)
    rankings, passes, abilities = {}, {}, {}
    with open_grader(config) as grader, open_team(config, ready.chats) as team:
        for name, seat in team.seats.items():
            right = sum(_right(name, seat, validation, 1, 0.0, ready, grader))
            abilities[name] = ability(right, len(validation))
            counts = _right(name, seat, questions, samples, config.rollout.temperature, ready, grader)
            passes[name] = dict(zip((q.id for q in questions), counts, strict=True))
            rankings[name] = asyncio.run(self_ranking(questions, seat, prompts, config.difficulty, seed=config.seed))
    return compare(rankings, passes, questions, config, samples=samples, abilities=abilities)


def _right(
    name: str, seat: Seat, questions: Sequence[Question], samples: int, heat: float, ready: Ready, grader: Grader
) -> list[int]:
    """How many of an agent's answers to each question are right."""
    config = ready.config
    grades = answer_alone(
        name, seat, questions, grader, config.rollout, load_protocol("single", config), examples=ready.examples,
        samples=samples, temperature=heat, seed=config.seed,
    )  # fmt: skip
    return [sum(grade.correct for grade in one) for one in grades]


def _random_rankings(ids: Sequence[str], config: Config) -> list[Mapping[str, float]]:
    """Difficulties from the same windows, each in a random order."""
    asked = windows(ids, config.difficulty.window, config.difficulty.repeats, config.seed)
    draw = random.Random(config.seed)
    return [from_rankings(ids, [draw.sample(w, len(w)) for w in asked]).values for _ in range(RANDOM_RANKINGS)]


def _middle(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _share(name: str, difficulties: Mapping[str, float], own: float) -> float:
    chosen = interactions("dynamic", list(difficulties), [name], abilities={name: own},
                          difficulties={name: difficulties}, seed=0)  # fmt: skip
    share = cooperation_share(chosen, name)
    assert share is not None
    return share


def _print(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Agents as columns."""
    title = f"self-ranked difficulty, {rows[0]['questions']} questions; ρ: Spearman, in brackets 95% of random rankings"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in ("", *(row["agent"] for row in rows)):
        table.add_column(escape(head), justify="right" if head else "left")
    for target in rows[0]["correlation"]:
        cells = [_with_chance(row["correlation"][target], row["random_95"][target]) for row in rows]
        table.add_row(f"ρ with {target}", *cells)
    table.add_row("unreadable rankings", *(f"{row['invalid_windows']} of {row['windows']}" for row in rows))
    for estimator in rows[0]["cooperation_share"]:
        shares = [f"{row['cooperation_share'][estimator]:.0%}" for row in rows]
        table.add_row(f"cooperation by {estimator}", *shares)
    table.add_row("cooperation by chance", *(f"{row['random_cooperation_share']:.0%}" for row in rows))
    console.print(table)


def _with_chance(value: float | None, chance: tuple[float, float] | None) -> str:
    if value is None or chance is None:
        return "–"
    return f"{value:+.2f} ({chance[0]:+.2f} to {chance[1]:+.2f})".replace("-", "−")
