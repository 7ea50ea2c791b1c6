"""What a report says, read from the run folders once: arms, results, and each run's dialogues and interaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ilr_fast.report.arms import Arm, arms_of
from ilr_fast.report.compare import Group, groups
from ilr_fast.report.interaction import read_interaction
from ilr_fast.report.runs import Run
from ilr_fast.report.survey import READ_BYTES, Survey, difficulty_of, survey

KEPT = 5  # dialogues of each kind and tenth of a run; fewer of each run where there are several


@dataclass(frozen=True, slots=True)
class Content:
    """Runs and what they hold; `facts` (interaction.json) and `surveys` by the run's name."""

    runs: Sequence[Run]
    arms: Sequence[Arm]
    groups: Sequence[Group]
    facts: Mapping[str, Mapping[str, Any]]
    surveys: Mapping[str, Survey]

    @property
    def quota(self) -> int:
        return quota(len(self.runs))

    @property
    def agents(self) -> list[str]:
        """All agents, in the order in which those of the largest run take part; the order of their colours."""
        runs = sorted(self.runs, key=lambda run: -len(run.agents))
        return list(dict.fromkeys(agent for run in runs for agent in run.agents))


def read_content(runs: Sequence[Run]) -> Content:
    """Everything that the page needs of the runs."""
    arms = arms_of(runs)
    facts = {run.name: read_interaction(run) for run in runs}
    share = {"quota": quota(len(runs)), "most": READ_BYTES // max(1, len(runs))}
    surveys = {run.name: survey(run, difficulty_of(facts[run.name]), **share) for run in runs}
    return Content(runs, arms, groups(arms), facts, surveys)


def quota(runs: int) -> int:
    """Dialogues that are kept of each kind and tenth of a run, where so many runs stand in one page.

    >>> quota(1), quota(3), quota(20)
    (5, 2, 1)
    """
    return max(1, -(-KEPT // runs))
