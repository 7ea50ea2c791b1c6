"""What went wrong during a run without stopping it: counted, logged with the question's id, and skipped.

Rows of `failures.jsonl`: {"step", "kind", "question", "sample", "agent", "error"}; kind is `dialogue` (an engine
request failed, a prompt did not fit), `grade` (the verifier crashed) or `update` (a NaN gradient).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ilr_fast.errors import RunError
from ilr_fast.types import Dialogue, Scored, StepResult


def step_failures(
    step: int, dialogues: Sequence[Dialogue], scored: Sequence[Scored], results: Mapping[str, StepResult]
) -> list[dict]:
    """The failures of one step as rows."""
    rows: list[dict] = [
        {"kind": "dialogue", "question": d.question.id, "sample": d.sample, "agent": None, "error": d.error}
        for d in dialogues if d.error is not None
    ]
    for item in scored:
        for name, grades in item.grades.items():
            rows += [
                {"kind": "grade", "question": item.dialogue.question.id, "sample": item.dialogue.sample, "agent": name,
                 "error": grade.error}
                for grade in grades if grade.reward is None
            ]
    rows += [
        {"kind": "update", "question": None, "sample": None, "agent": name, "error": result.skipped}
        for name, result in results.items() if result.skipped and "gradient is not finite" in result.skipped
    ]
    return [{"step": step, **row} for row in rows]


class Failures:
    """Appends failures to a file and says when there are too many."""

    def __init__(self, path: Path, max_share: float):
        self.path, self.max_share = path, max_share

    def add(self, rows: Sequence[dict]) -> None:
        """Appends the rows."""
        if rows:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def check(self, rows: Sequence[dict], dialogues: int) -> None:
        """RunError where more than `max_share` of a step's dialogues failed in any way, or an agent's update did."""
        bad = {(row["question"], row["sample"]) for row in rows if row["kind"] != "update"}
        if dialogues and len(bad) > self.max_share * dialogues:
            first = next(row for row in rows if row["kind"] != "update")
            raise RunError(
                f"{len(bad)} of {dialogues} dialogues failed in step {first['step']}, more than max_failed_share = "
                f"{self.max_share:g}; everything up to here is saved. First: question {first['question']}: "
                f"{first['error']} (all in {self.path})"
            )
