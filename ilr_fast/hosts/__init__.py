"""A host keeps one agent, wherever it lives: in this process (local.py) or, with its engine, in one of its own
(process.py). docs/hosts.md says which is for what.

Only text, token ids, rewards and numbers cross this interface, so a host can move without the loop noticing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ilr_fast.errors import RunError
from ilr_fast.types import Generation, Residence, Sampling, StepResult, TrainingSequence


class HostLost(RunError):
    """An agent's process has ended, and its weights with it: nothing after the last checkpoint can be saved."""


class Host(Protocol):
    """One agent: it generates, learns from sequences, saves and loads itself."""

    name: str
    max_context: int
    trains: bool  # False for a peer that only talks

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples a continuation with the agent's current weights (types.Engine)."""
        ...

    def update(self, sequences: Sequence[TrainingSequence], step: int) -> StepResult:
        """One rollout's optimizer step(s) on this agent's sequences; its engine then uses the new weights.

        `step` counts from 1 and sets the learning rate. A NaN gradient skips the update and says so in the result.
        """
        ...

    def start_update(
        self, sequences: Sequence[TrainingSequence], step: int, beside: bool = False
    ) -> Callable[[], StepResult]:
        """An update that runs beside those of other hosts where it can: call what this returns for its result.

        With `beside` it begins at once and runs beside this agent's own engine too, which samples with weights of its
        own and gets the new ones when the result is asked for. No request may run then.
        """
        ...

    def reference_logps(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """The frozen reference's log-probs of every token of every turn, one tuple a sequence."""
        ...

    def hold(self) -> bool:
        """Copies what `save_model` and `save_state` write, which write the copies then, each once and in that order.

        The agent may be updated meanwhile. False, and nothing is copied, where it can't or need not be.
        """
        ...

    def save_model(self, folder: Path) -> None:
        """Writes weights and tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` (or peft) loads them."""
        ...

    def save_state(self, folder: Path) -> None:
        """Writes what resuming needs beside the weights: optimizer state and anything random."""
        ...

    def load(self, model_folder: Path, state_folder: Path) -> None:
        """Restores weights and state in place, bit for bit."""
        ...

    def forget(self) -> None:
        """Drops what the engine has cached: its next tokens then depend on nothing that it was asked before."""
        ...

    def reside(self, residence: Residence) -> None:
        """What the agent holds of its device's memory from here on (types.Engine). Unless it is to be `awake`, what
        torch keeps for later goes back to the device too. UserError where the memory is not there."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters since start: tokens_generated, tokens_prompt, tokens_reused, seconds_busy, steps; and
        `memory_peak_gib`, the highest so far."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...
