"""Idea3: idea sharing → idea analysis → idea fusion (arXiv 2509.26306; ILR.md, section 2).

1. sharing: the question → a solution of one's own.
2. analysis: the peers' solutions → a critical check of each.
3. fusion: one's own analysis stands in the conversation (the peers' are shown by `rollout.show_peer_analyses`) → the
   final answer.
"""

from __future__ import annotations

from ilr_fast.config import Config
from ilr_fast.protocols.base import View
from ilr_fast.protocols.templates import load_prompts


class Idea3:
    """Three stages; the interaction (cooperate or compete) sets the words of each."""

    name = "idea3"
    stages = ("sharing", "analysis", "fusion")

    def __init__(self, config: Config):
        self.prompts = load_prompts(config.prompts.file, config.reward.name)
        self.show_peer_analyses = config.rollout.show_peer_analyses

    def needs(self, stage: str) -> tuple[str, ...]:
        """Analysis waits for the peers' solutions; fusion for their analyses only where it shows them."""
        if stage == "analysis":
            return ("sharing",)
        return ("analysis",) if stage == "fusion" and self.show_peer_analyses else ()

    def message(self, stage: str, view: View) -> str:
        """The stage's prompt with what the agent may see."""
        previous = {"analysis": "sharing", "fusion": "analysis"}.get(stage)
        own = view.own[previous] if previous else ""
        peers = [peer[needed] for peer in view.peers for needed in self.needs(stage)]
        return self.prompts.message(stage, view, own=own, peers=peers)

    def reward_stage(self, stage: str, stage_reward: str) -> str:
        """own: sharing gets its own answer's reward, later stages the fused one's; each: its own; final: the fused."""
        if stage_reward == "each":
            return stage
        return "sharing" if stage == "sharing" and stage_reward == "own" else "fusion"
