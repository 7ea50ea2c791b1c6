"""Credited dialogues ↔ the lines of `dialogues/step_000001.jsonl`, one dialogue a line.

    {"question": "t-17", "text": "Which is the largest …", "answer": "760", …, "sample": 0, "protocol": "idea3",
     "agents": {"gemma": [{"stage": "sharing", "interaction": "cooperation", "message": …, "text": …, "finish": "stop",
                           "tokens": 5, "answer": "760", "correct": true, "reward": 1.1, "calibrated": 1.6,
                           "advantage": 0.7, …, "prompt_ids": […], "token_ids": […], "logps": […]}]}}

What was not graded or not calibrated is null. Log-probs are rounded to 1e-6, about what float32 holds of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ilr_fast.types import Credited, Dialogue, Generation, Grade, Question, Scored, Turn

Row = Mapping[str, Any]
_WRITER = json.JSONEncoder(ensure_ascii=False, default=str)
_QUESTION = ("solution", "level", "subject", "canonical", "metadata")


def to_line(credited: Credited) -> str:
    """One dialogue as a line of JSON, without the newline. Metadata that JSON doesn't know becomes text."""
    dialogue = credited.scored.dialogue
    question = dialogue.question
    row = {
        "question": question.id,
        "text": question.text,
        "answer": question.answer,
        **{key: dict(question.metadata) if key == "metadata" else getattr(question, key) for key in _QUESTION},
        "sample": dialogue.sample,
        "protocol": dialogue.protocol,
        "error": dialogue.error,
        "agents": {name: _turn_rows(credited, name) for name in dialogue.turns},
    }
    return _WRITER.encode(row)


def from_line(line: str) -> Credited:
    """The record that `to_line` wrote, its log-probs as rounded there; ValueError or KeyError for anything else."""
    row = json.loads(line)
    question = Question(row["question"], row["text"], row["answer"], **{key: row[key] for key in _QUESTION})
    agents = row["agents"].items()
    dialogue = Dialogue(
        question,
        row["sample"],
        row["protocol"],
        {name: tuple(_turn(turn) for turn in turns) for name, turns in agents},
        row["error"],
    )
    grades = {name: tuple(_grade(turn) for turn in turns) for name, turns in agents}
    return Credited(
        Scored(dialogue, grades, _column(row, "reward")), _column(row, "calibrated"), _column(row, "advantage")
    )


def _turn_rows(credited: Credited, name: str) -> list[dict[str, Any]]:
    scored = credited.scored
    columns = (scored.grades[name], scored.rewards[name], credited.calibrated[name], credited.advantages[name])
    return [_turn_row(*turn) for turn in zip(scored.dialogue.turns[name], *columns, strict=True)]


def _turn_row(
    turn: Turn, grade: Grade, reward: float | None, calibrated: float | None, advantage: float | None
) -> dict[str, Any]:
    said = turn.generation
    return {
        "stage": turn.stage,
        "interaction": turn.interaction,
        "message": turn.message,
        "text": said.text,
        "finish": said.finish,
        "tokens": len(said.tokens),
        "answer": grade.answer,
        "correct": grade.correct,
        "formatted": grade.formatted,
        "grade": grade.reward,
        "grade_error": grade.error,
        "reward": reward,
        "calibrated": calibrated,
        "advantage": advantage,
        "error": said.error,
        "prompt_ids": list(turn.prompt_tokens),
        "token_ids": list(said.tokens),
        "logps": np.round(said.logps, 6).tolist(),  # hundreds of thousands in a step
    }


def _turn(row: Row) -> Turn:
    said = Generation(tuple(row["token_ids"]), tuple(row["logps"]), row["finish"], row["text"], row["error"])
    return Turn(row["stage"], row["interaction"], row["message"], tuple(row["prompt_ids"]), said)


def _grade(row: Row) -> Grade:
    return Grade(row["grade"], row["correct"], row["formatted"], row["answer"], row["grade_error"])


def _column(row: Row, key: str) -> dict[str, tuple[float | None, ...]]:
    return {name: tuple(turn[key] for turn in turns) for name, turns in row["agents"].items()}
