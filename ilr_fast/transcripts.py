"""A run's dialogues as read back from `dialogues/step_000001.jsonl`, for people: `ilr-fast show` and the report.

One row of a file is one dialogue; by agent, its turns with what was appended, what the agent said, and what it earned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Spoken:
    """One turn. `message` was appended (the instruction, the peers' texts); `text` is the agent's own."""

    stage: str
    interaction: str
    message: str
    text: str
    finish: str
    tokens: int | None
    answer: str | None
    correct: bool | None
    reward: float | None
    calibrated: float | None
    advantage: float | None

    @property
    def numbers(self) -> str:
        """The answer that was read, reward → calibrated reward → advantage, and how the turn ended."""
        texts = [] if self.answer is None else [f"answer {self.answer}"]
        for name, value in (("reward", self.reward), ("calibrated", self.calibrated), ("advantage", self.advantage)):
            texts.append(f"{name} {'–' if value is None else f'{value:.2f}'.replace('-', '−')}")
        if self.tokens is not None:
            texts.append(f"{self.tokens} tokens" + (", cut off" if self.finish == "length" else ""))
        return " · ".join(texts)


@dataclass(frozen=True, slots=True)
class Transcript:
    """One dialogue of one question; `agents` in the run's order."""

    step: int
    question_id: str
    question: str
    expected: str
    sample: int
    protocol: str
    agents: Mapping[str, Sequence[Spoken]]
    error: str | None = None

    def first(self, agent: str) -> Spoken | None:
        """The agent's first turn: its own answer."""
        return self.agents[agent][0] if self.agents.get(agent) else None

    def last(self, agent: str) -> Spoken | None:
        """The agent's last turn: its final answer."""
        return self.agents[agent][-1] if self.agents.get(agent) else None


def read_steps(run: Path) -> list[int]:
    """The steps whose dialogues are on disk, in order."""
    names = [re.fullmatch(r"step_(\d+)\.jsonl", p.name) for p in (run / "dialogues").glob("step_*.jsonl")]
    return sorted(int(m.group(1)) for m in names if m)


def read_transcripts(run: Path, step: int) -> list[Transcript]:
    """The dialogues of one step; rows that can't be read (cut off by a crash) are passed over."""
    rows = read_jsonl(run / "dialogues" / f"step_{step:06d}.jsonl")
    return [_transcript(row, step) for row in rows if isinstance(row.get("agents"), dict)]


def read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file; lines that can't be read (cut off by a crash) are passed over."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def _transcript(row: Mapping[str, Any], step: int) -> Transcript:
    return Transcript(
        step=step,
        question_id=str(row.get("question", "")),
        question=str(row.get("text", "")),
        expected=str(row.get("answer", "")),
        sample=int(row.get("sample") or 0),
        protocol=str(row.get("protocol", "")),
        agents={str(name): [_spoken(t) for t in turns] for name, turns in row["agents"].items()},
        error=row.get("error"),
    )


def _spoken(turn: Mapping[str, Any]) -> Spoken:
    return Spoken(
        stage=str(turn.get("stage", "")),
        interaction=str(turn.get("interaction", "neutral")),
        message=str(turn.get("message", "")),
        text=str(turn.get("text", "")),
        finish=str(turn.get("finish", "")),
        tokens=turn.get("tokens"),
        answer=turn.get("answer"),
        correct=turn.get("correct"),
        reward=turn.get("reward"),
        calibrated=turn.get("calibrated"),
        advantage=turn.get("advantage"),
    )
