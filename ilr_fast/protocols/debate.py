"""Debate: everyone answers, sees the others' last answers, and answers again, for `rollout.rounds` rounds."""

from __future__ import annotations

from ilr_fast.config import Config
from ilr_fast.protocols.base import View
from ilr_fast.protocols.templates import load_prompts


class Debate:
    """Stages `round_1`, `round_2`, …; a round waits for all peers' previous one."""

    name = "debate"

    def __init__(self, config: Config):
        self.prompts = load_prompts(config.prompts.file, config.reward.name)
        self.stages = tuple(f"round_{number}" for number in range(1, config.rollout.rounds + 1))

    def needs(self, stage: str) -> tuple[str, ...]:
        """The peers' last answers."""
        number = self.stages.index(stage)
        return self.stages[number - 1 : number] if number else ()

    def message(self, stage: str, view: View) -> str:
        """The question; later the peers' last answers."""
        if stage == self.stages[0]:
            return self.prompts.message("sharing", view)
        last = self.needs(stage)[0]
        return self.prompts.message("debate", view, own=view.own[last], peers=[peer[last] for peer in view.peers])

    def reward_stage(self, stage: str, stage_reward: str) -> str:
        """own, each: the round's answer; final: the last round's."""
        return self.stages[-1] if stage_reward == "final" else stage
