"""Dialogues as data of the page, for its browser of dialogues: short keys, names as numbers of lists.

The page shows them as text (textContent), never as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ilr_fast.report.flips import flip
from ilr_fast.report.keep import cut
from ilr_fast.report.series import short
from ilr_fast.transcripts import Spoken, Transcript


def dialogue_data(run: int, transcripts: Sequence[Transcript], colours: dict[str, int]) -> list[dict[str, Any]]:
    """What the page shows of each dialogue. `run`: the run's number; `colours`: the palette's number by agent."""
    return [
        {
            "run": run,
            "step": t.step,
            "id": t.question_id,
            "n": t.sample + 1,
            "question": cut(t.question),
            "expected": cut(t.expected, 400),
            "error": t.error,
            "level": t.level,
            "agents": [
                {"name": agent, "colour": colours.get(agent, 0) % 8, "flip": flip(t, agent), "turns": _turns(turns)}
                for agent, turns in t.agents.items()
            ],
        }
        for t in transcripts
    ]


def _turns(turns: Sequence[Spoken]) -> list[dict[str, Any]]:
    """Turns in order; a stage that comes again is numbered."""
    seen: Counter[str] = Counter()
    found = []
    for turn in turns:
        seen[turn.stage] += 1
        stage = turn.stage if seen[turn.stage] == 1 else f"{turn.stage} {seen[turn.stage]}"
        found.append({"stage": stage, "mode": turn.interaction, "right": turn.correct, "text": cut(turn.text.strip()),
                      "told": cut(turn.message.strip()), "numbers": turn.numbers, "reward": short(turn.reward),
                      "advantage": short(turn.advantage)})  # fmt: skip
    return found
