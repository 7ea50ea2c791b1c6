"""What went wrong during a run without stopping it: counted, logged with the question's id, and skipped.

Rows of `failures.jsonl`: {"step", "kind", "question", "sample", "agent", "error"}; kind is `dialogue` (an engine
request failed, a prompt did not fit), `grade` (the verifier crashed) or `update` (a NaN gradient; `question` lists
those of the step).

A run stops past a share of failed dialogues in one step, or of an agent's failed updates since the start. The latter is
taken of `FEWEST_UPDATES` at least: one NaN at the start, or the first overflows of float16, are no reason to stop.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ilr_fast.errors import RunError
from ilr_fast.types import Dialogue, Scored, StepResult

FEWEST_UPDATES = 10


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
    asked = list(dict.fromkeys(d.question.id for d in dialogues))
    rows += [
        {"kind": "update", "question": asked, "sample": None, "agent": name, "error": result.skipped}
        for name, result in results.items() if result.skipped and "gradient is not finite" in result.skipped
    ]
    return [{"step": step, **row} for row in rows]


class Failures:
    """Appends failures to a file and says when there are too many; what stands in the file counts (a run goes on)."""

    def __init__(self, path: Path, max_share: float):
        self.path, self.max_share = path, max_share
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._updates = Counter(row["agent"] for row in map(json.loads, lines) if row["kind"] == "update")

    def add(self, rows: Sequence[dict]) -> None:
        """Appends the rows."""
        self._updates.update(row["agent"] for row in rows if row["kind"] == "update")
        if rows:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def check(self, rows: Sequence[dict], dialogues: int, step: int) -> None:
        """RunError where more than `max_share` of a step's dialogues failed in any way, or of an agent's updates up to
        `step`; `rows` are the step's failures, which have been added."""
        if not rows:
            return
        talks = [row for row in rows if row["kind"] != "update"]
        bad = len({(row["question"], row["sample"]) for row in talks})
        if bad > self.max_share * dialogues:
            self._stop(f"{bad} of {dialogues} dialogues failed in step {step}", talks[0])
        for name, count in self._updates.items():
            if count > self.max_share * max(FEWEST_UPDATES, step):
                mine = [row for row in rows if row["agent"] == name and row["kind"] == "update"]
                self._stop(f"{count} of {step} updates of {name} failed", (mine or rows)[0])

    def _stop(self, what: str, first: dict) -> NoReturn:
        raise RunError(
            f"{what}, more than max_failed_share = {self.max_share:g}; everything up to here is saved\n"
            f"  → question {first['question']}: {first['error']} (all of them are in {self.path})"
        )
