"""A run's dialogues as read back from `dialogues/step_000001.jsonl`, for people: `ilr-fast show` and the report.

One row of a file is one dialogue; by agent, its turns with what was appended, what the agent said, and what it earned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKENS = b', "prompt_ids": ['


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
            texts.append(f"{name} {'–' if value is None else f'{value:z.2f}'.replace('-', '−')}")
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
    level: int | None = None

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
    return list(stream_transcripts(run, step))


def stream_transcripts(run: Path, step: int) -> Iterator[Transcript]:
    """The same, one after the other. The lists of tokens and log-probs, most of a line, are passed over unread."""
    for row in read_jsonl(run / "dialogues" / f"step_{step:06d}.jsonl", shorten=_without_tokens):
        if isinstance(row.get("agents"), dict):
            yield _transcript(row, step)


def read_jsonl(path: Path, *, shorten: Callable[[bytes], bytes] | None = None) -> Iterator[dict]:
    """The objects of a JSONL file; lines that can't be read (cut off by a crash) are passed over.

    `shorten` takes away what is not needed of a line before it is parsed; where nothing readable is left, the whole is.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            row = _parsed(shorten(line)) if shorten else None
            row = _parsed(line) if row is None else row
            if row is not None:
                yield row


def _parsed(line: bytes) -> dict | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _without_tokens(line: bytes) -> bytes:
    """The line without what follows `, "prompt_ids": [` up to the brace that ends the turn (see dialogue_rows.py).

    Inside a text these quotes are escaped, so that the marker is never part of one; numbers hold no brace.
    """
    first, *rest = line.split(_TOKENS)
    return first + b"".join(part[max(part.find(b"}"), 0) :] for part in rest)


def _transcript(row: Mapping[str, Any], step: int) -> Transcript:
    sample, level = row.get("sample"), row.get("level")
    return Transcript(
        step=step,
        question_id=str(row.get("question", "")),
        question=str(row.get("text", "")),
        expected=str(row.get("answer", "")),
        sample=sample if isinstance(sample, int) else 0,
        protocol=str(row.get("protocol", "")),
        agents={str(name): [_spoken(t) for t in turns if isinstance(t, dict)]
                for name, turns in row["agents"].items() if isinstance(turns, list)},
        error=None if row.get("error") is None else str(row["error"]),
        level=level if isinstance(level, int) else None,
    )  # fmt: skip


def _spoken(turn: Mapping[str, Any]) -> Spoken:
    correct, tokens, answer = turn.get("correct"), turn.get("tokens"), turn.get("answer")
    return Spoken(
        stage=str(turn.get("stage", "")),
        interaction=str(turn.get("interaction", "neutral")),
        message=str(turn.get("message", "")),
        text=str(turn.get("text", "")),
        finish=str(turn.get("finish", "")),
        tokens=tokens if isinstance(tokens, int) else None,
        answer=None if answer is None else str(answer),
        correct=correct if isinstance(correct, bool) else None,
        reward=_number(turn.get("reward")),
        calibrated=_number(turn.get("calibrated")),
        advantage=_number(turn.get("advantage")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
