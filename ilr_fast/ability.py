"""Ability, and who cooperates: item response theory with two parameters (ILR.md, section 1; arXiv 2509.26306).

    γ = logit(a)/1.7                      a: the agent's accuracy alone, clipped to [1/(2n), 1 − 1/(2n)]
    P(q, i) = 1/(1 + exp(−1.7(γᵢ − D)))   D: how hard agent i finds question q
    P < 0.5 → cooperation, P ≥ 0.5 → competition

The scale is such that P = a where D = 0:

>>> round(success_probability(ability(300, 1000), 0.0), 9)
0.3
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ilr_fast.types import Interaction

SCALE = 1.7  # makes the logistic curve close to the normal one's
Mode = Literal["dynamic", "cooperation", "competition", "ratio", "none"]


def logit(p: float) -> float:
    """log(p/(1 − p)) for p in (0, 1)."""
    assert 0 < p < 1, f"a probability inside (0, 1), got {p}"
    return math.log(p / (1 - p))


def ability(correct: int, questions: int) -> float:
    """γ of an agent that answered `correct` of n = `questions` ≥ 1 validation questions."""
    assert 0 <= correct <= questions and questions >= 1, "some questions, and no more right answers than those"
    margin = 1 / (2 * questions)
    return logit(min(max(correct / questions, margin), 1 - margin)) / SCALE


def success_probability(ability: float, difficulty: float) -> float:
    """P(q, i): the probability that an agent of ability γ solves a question of difficulty D. Any finite arguments."""
    z = SCALE * (ability - difficulty)
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def interactions(
    mode: Mode,
    questions: Iterable[str],
    agents: Sequence[str],
    *,
    abilities: Mapping[str, float] | None = None,
    difficulties: Mapping[str, Mapping[str, float]] | None = None,
    ratio: float = 0.5,
    seed: int = 0,
) -> dict[str, dict[str, Interaction]]:
    """How each agent faces each question: {question id: {agent: interaction}}.

    `dynamic` takes `abilities` (γ by agent) and `difficulties` (D by agent and question id); `ratio` makes a share
    `ratio` of cooperation, drawn by seed for each question and agent on its own, whatever other questions there are;
    `none` is neutral.
    """

    def one(question: str, agent: str) -> Interaction:
        if mode == "dynamic":
            assert abilities is not None and difficulties is not None, "dynamic interaction needs γ and D"
            probability = success_probability(abilities[agent], difficulties[agent][question])
            return "cooperation" if probability < 0.5 else "competition"
        if mode == "ratio":
            return "cooperation" if _uniform(seed, question, agent) < ratio else "competition"
        return "neutral" if mode == "none" else mode

    return {question: {agent: one(question, agent) for agent in agents} for question in questions}


def cooperation_share(chosen: Mapping[str, Mapping[str, Interaction]], agent: str) -> float | None:
    """The share of questions that the agent faces in cooperation; None where all are neutral or there are none."""
    faced = [by_agent[agent] for by_agent in chosen.values() if by_agent[agent] != "neutral"]
    return sum(interaction == "cooperation" for interaction in faced) / len(faced) if faced else None


def _uniform(seed: int, question: str, agent: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}\0{question}\0{agent}\0cooperate".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
