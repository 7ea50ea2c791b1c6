"""Single: the agent alone, one turn. The prompt of γ, of the base model, of GRPO and of evaluation."""

from __future__ import annotations

from ilr_fast.config import Config
from ilr_fast.protocols.base import View
from ilr_fast.protocols.templates import load_prompts


class Single:
    """One stage, `single`; no agent sees another."""

    name = "single"
    stages = ("single",)

    def __init__(self, config: Config):
        self.prompts = load_prompts(config.prompts.file, config.reward.name)

    def needs(self, stage: str) -> tuple[str, ...]:
        """Nobody."""
        return ()

    def message(self, stage: str, view: View) -> str:
        """The question and the form of the answer."""
        return self.prompts.message("single", view)

    def reward_stage(self, stage: str, stage_reward: str) -> str:
        """Its own answer."""
        return stage
