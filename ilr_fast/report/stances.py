"""Cooperation against competition by difficulty: right answers of each stance, in fifths of the questions.

The difficulty is the agent's own D (`interaction.json`), its fifths taken over the questions that the run asks, or the
data set's levels where there is no D.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ilr_fast.transcripts import Transcript

FIFTHS = ("easiest", "easier", "middle", "harder", "hardest")
Key = tuple[str, str, str, str]  # agent, stance, difficulty, "first" or "last" answer


@dataclass(slots=True)
class StanceTally:
    """Answers and right answers by agent, stance and difficulty. `difficulty` holds D by agent and question."""

    difficulty: Mapping[str, Mapping[str, float]]
    n: Counter[Key] = field(default_factory=Counter)
    right: Counter[Key] = field(default_factory=Counter)
    _ordered: dict[str, list[float]] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        """Counts the first and the last answer of every agent of one dialogue."""
        for agent, turns in transcript.agents.items():
            for which, said in zip(("first", "last"), (turns[:1], turns[1:][-1:]), strict=True):
                if said and said[0].correct is not None:
                    key = agent, said[0].interaction, self._bin(transcript, agent), which
                    self.n[key] += 1
                    self.right[key] += said[0].correct

    def __add__(self, other: StanceTally) -> StanceTally:
        return StanceTally({}, self.n + other.n, self.right + other.right)

    @property
    def bins(self) -> list[str]:
        """The difficulties that were met: fifths, then levels, easiest first; unknown ones last."""
        found = {key[2] for key in self.n}
        levels = sorted(found - {*FIFTHS, "unknown"}, key=lambda level: (len(level), level))
        return [name for name in (*FIFTHS, *levels, "unknown") if name in found]

    def _bin(self, transcript: Transcript, agent: str) -> str:
        known = self.difficulty.get(agent) or {}
        value = known.get(transcript.question_id)
        if value is not None:
            if agent not in self._ordered:
                self._ordered[agent] = sorted(known.values())
            return fifth(self._ordered[agent], value)
        return "unknown" if transcript.level is None else f"level {transcript.level}"


def fifth(ordered: Sequence[float], value: float) -> str:
    """The fifth of the ascending numbers that a value of theirs is in; equal numbers stay together, at their middle.

    >>> fifth([1, 2, 3, 4, 5], 2), fifth([0, 0, 0, 1, 1, 1], 0), fifth([0, 0, 0, 1, 1, 1], 1)
    ('easier', 'easier', 'harder')
    """
    middle = (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2
    return FIFTHS[min(4, int(5 * middle / len(ordered)))]
