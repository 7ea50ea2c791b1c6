"""What calibration did to rewards: the calibrated reward by the raw one, and where it could change nothing.

With two reward values in a group, standardized advantages are the same with and without calibration
(docs/calibration.md), so the share of such groups says how far a run can tell anything about it. A group is what one
agent said to one question in one stage, over the samples of a step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ilr_fast.transcripts import Transcript

Group = tuple[str, str, int]  # question, agent, place of the turn


@dataclass(slots=True)
class CalibrationTally:
    """Turns by agent, raw and calibrated reward, both to 0.05; groups by their number of different raw rewards.

    `end_step` closes the groups of a step; memory stays bounded, however long the run is.
    """

    turns: Counter[tuple[str, float, float]] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)  # "one", "two", "more" values
    _open: dict[Group, set[float]] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        """Counts the turns of one dialogue."""
        for agent, turns in transcript.agents.items():
            for place, said in enumerate(turns):
                if said.reward is not None and said.calibrated is not None:
                    self.turns[agent, _rounded(said.reward), _rounded(said.calibrated)] += 1
                    values = self._open.setdefault((transcript.question_id, agent, place), set())
                    values.add(round(said.reward, 6))

    def end_step(self) -> None:
        """Counts the groups of the step that is over."""
        for values in self._open.values():
            self.groups["one" if len(values) == 1 else "two" if len(values) == 2 else "more"] += 1
        self._open.clear()

    def __add__(self, other: CalibrationTally) -> CalibrationTally:
        return CalibrationTally(self.turns + other.turns, self.groups + other.groups)

    def is_off(self) -> bool:
        """Whether no calibrated reward differs from its raw one: calibration was switched off."""
        return all(raw == calibrated for _, raw, calibrated in self.turns)

    def by_reward(self, agent: str) -> list[tuple[float, int, float, float, float]]:
        """(raw reward, turns, mean calibrated reward, its 10% and 90% quantile) of an agent, by rising reward."""
        values: dict[float, Counter[float]] = {}
        for (name, raw, calibrated), count in self.turns.items():
            if name == agent:
                values.setdefault(raw, Counter())[calibrated] += count
        return [
            (raw, c.total(), sum(v * n for v, n in c.items()) / c.total(), _quantile(c, 0.1), _quantile(c, 0.9))
            for raw, c in sorted(values.items())
        ]


def _rounded(value: float) -> float:
    return round(value * 20) / 20


def _quantile(counts: Counter[float], share: float) -> float:
    """The smallest value that at least `share` of the counted ones do not exceed."""
    seen = 0
    for value, count in sorted(counts.items()):
        seen += count
        if seen >= share * counts.total():
            return value
    raise AssertionError("no values")
