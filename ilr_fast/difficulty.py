"""Difficulty D: how hard an agent finds a question (ILR.md, section 1).

Every estimator gives a p in (0, 1), put through the same logit as ability: D = logit(p)/1.7. The median question has
D = 0, and an agent of accuracy a competes where a ≥ p.

    self-ranking   p = the mean of (rank − ½)/W over the valid windows that hold the question (asked for in ranking.py)
    pass rate      p = 1 − (passes + ½)/(rollouts + 1), over all agents' rollouts alone
    level          p = (level − ½)/levels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ilr_fast.ability import SCALE, logit
from ilr_fast.errors import UserError
from ilr_fast.types import Question


@dataclass(frozen=True, slots=True)
class Difficulty:
    """D by question id.

    `unknown`: the questions that had no valid window and so got D = 0. `invalid_windows` of `windows` gave no ranking.
    """

    values: Mapping[str, float]
    unknown: tuple[str, ...] = ()
    windows: int = 0
    invalid_windows: int = 0


def from_share(p: float) -> float:
    """D of a question whose share p in (0, 1) of harder standing is known: 0 at ½, growing with p."""
    return logit(p) / SCALE


def from_rankings(question_ids: Sequence[str], rankings: Sequence[Sequence[str] | None]) -> Difficulty:
    """D from rankings of question ids, each from the easiest to the hardest; None for one that could not be read."""
    shares: dict[str, list[float]] = {question: [] for question in question_ids}
    valid = [ranking for ranking in rankings if ranking is not None]
    for ranking in valid:
        for rank, question in enumerate(ranking, 1):
            shares[question].append((rank - 0.5) / len(ranking))
    values = {q: from_share(sum(p) / len(p)) if p else 0.0 for q, p in shares.items()}
    unknown = tuple(q for q, p in shares.items() if not p)
    return Difficulty(values, unknown, len(rankings), len(rankings) - len(valid))


def from_pass_rates(passes: Mapping[str, int], rollouts: Mapping[str, int]) -> Difficulty:
    """D from how many of all agents' `rollouts` of a question passed, smoothed by half a success and half a failure."""
    return Difficulty({q: from_share(1 - (passes[q] + 0.5) / (rollouts[q] + 1)) for q in passes})


def from_levels(questions: Sequence[Question], levels: int) -> Difficulty:
    """D from the data set's own levels, 1 to `levels`. UserError for a question without one or outside that range."""
    for question in questions:
        if question.level is None or not 1 <= question.level <= levels:
            has = "no level" if question.level is None else f"level {question.level}, outside 1 to {levels}"
            raise UserError(f"question {question.id!r} has {has}", "difficulty.estimator = level",
                            "set difficulty.levels, or use `pass_rate` or `self_ranking`")
    return Difficulty({q.id: from_share(((q.level or 0) - 0.5) / levels) for q in questions})


def spearman(difficulties: Mapping[str, float], pass_rates: Mapping[str, float]) -> float | None:
    """Rank correlation of difficulty with failing (1 − pass rate) over the questions that both know, in [−1, 1].

    1: exactly the questions that fail more are called harder. Ties share their mean rank. None where it does not exist:
    fewer than two questions, or one side has a single value.
    """
    common = [q for q in difficulties if q in pass_rates]
    x_Q = _ranks([difficulties[q] for q in common])
    y_Q = _ranks([-pass_rates[q] for q in common])
    if len(set(x_Q)) < 2 or len(set(y_Q)) < 2:
        return None
    middle = (len(common) + 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(x_Q, y_Q, strict=True))
    spread = sum((x - middle) ** 2 for x in x_Q) * sum((y - middle) ** 2 for y in y_Q)
    return covariance / spread**0.5


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks
