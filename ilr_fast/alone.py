"""Agents answering alone: the `single` protocol over many questions, graded; for γ, pass rates and validation.

    outcomes = answer_alone(seat, questions, grader, settings, protocol, temperature=0.0, seed=0)
    accuracy = sum(grade.correct for grades in outcomes for grade in grades) / len(questions)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ilr_fast.config import RolloutConfig
from ilr_fast.protocols import DialogueProtocol
from ilr_fast.rewards import Grader
from ilr_fast.rollout import DialogueJob, Seat, run_dialogues
from ilr_fast.types import Grade, Message, Question

FAILED = Grade(None, False, False, error="the request failed")


def answer_alone(
    name: str,
    seat: Seat,
    questions: Sequence[Question],
    grader: Grader,
    settings: RolloutConfig,
    protocol: DialogueProtocol,
    *,
    examples: Sequence[Message] = (),
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[..., object] | None = None,
) -> list[list[Grade]]:
    """For each question the grades of `samples` answers of one agent, by the one-stage `protocol`, no peers.

    A request that failed gives a grade whose reward is None and which is not correct.
    """
    jobs = [DialogueJob(question, k, {name: "neutral"}, seed) for question in questions for k in range(samples)]
    asked = run_dialogues(
        jobs, protocol, {name: seat}, settings, examples=examples, temperature=temperature, on_done=on_done
    )
    dialogues = asyncio.run(asked)
    answered = [d for d in dialogues if d.error is None]
    grades = iter(grader.grade_many([(d.question, d.turns[name][-1].generation.text) for d in answered]))
    flat = [FAILED if d.error is not None else next(grades) for d in dialogues]
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]
