"""What a protocol is: stages, whom each waits for, what is said before each turn, and whose answer rewards it.

A protocol is one small file of pure code over the types. For every stage, every agent is sent one message and answers
it; an agent goes on to its next stage as soon as the peers' turns that this stage needs are there. A user's own:

    class Tutor:                                    # config: `protocol: mypackage.tutor:Tutor`
        name = "tutor"
        stages = ("draft", "advice", "answer")
        def __init__(self, config): self.prompts = load_prompts(config.prompts.file, config.reward.name)
        def needs(self, stage): return {"advice": ("draft",), "answer": ("advice",)}.get(stage, ())
        def message(self, stage, view): return self.prompts.message(stage, view)
        def reward_stage(self, stage, stage_reward): return "answer"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ilr_fast.types import Interaction, Question


@dataclass(frozen=True, slots=True)
class View:
    """What one agent knows before a turn. All texts are quotations already (quoting.quote), safe to put into a message.

    `own`: its own earlier turns by stage. `peers`: for each peer, in the agents' order, the turns by stage that this
    agent's stages up to now had to wait for, and no others, so that what is shown does not depend on the clock.
    """

    question: Question
    interaction: Interaction = "neutral"
    own: Mapping[str, str] = field(default_factory=dict)
    peers: Sequence[Mapping[str, str]] = ()


@runtime_checkable
class DialogueProtocol(Protocol):
    """Who speaks when, what each sees, and which answer a turn is rewarded for."""

    name: str
    stages: tuple[str, ...]  # in order; the last one's answer is the dialogue's

    def needs(self, stage: str) -> tuple[str, ...]:
        """The stages of all peers that must be over before `stage` starts."""
        ...

    def message(self, stage: str, view: View) -> str:
        """What the agent is told before its turn."""
        ...

    def reward_stage(self, stage: str, stage_reward: str) -> str:
        """The stage whose answer's reward the turn of `stage` gets; `stage_reward`: the config's."""
        ...
