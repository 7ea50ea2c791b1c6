"""What an agent writes for a checkpoint and reads from it: a Hugging Face folder, and the optimizer's state beside it.

    agent.hold()                                # where it can: from here on the agent may be updated
    agent.save_model(folder / "ada"), agent.save_state(folder / "ada.state")
    agent.load(folder / "ada", folder / "ada.state")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ilr_fast.config import AgentConfig
from ilr_fast.host_copy import copied
from ilr_fast.loading import restore_weights
from ilr_fast.optimizer import Optimizer


class AgentFiles:
    """The part of an `Agent` that writes and reads."""

    model: Any
    tokenizer: Any
    config: AgentConfig
    device: torch.device
    optimizer: Optimizer | None
    loss_scale: float
    _held: list[Any] | None = None  # copies of weights and state that are yet to be written

    def hold(self) -> bool:
        """See Host. Adapters are not copied: they are written soon."""
        self._held = None
        if self.config.train == "full":
            self._held = copied([self.model.state_dict(), self._state()], self.device)
        return self._held is not None

    def save_model(self, folder: Path) -> None:
        """Writes weights (adapters in peft's format) and tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder, **({"state_dict": self._held[0]} if self._held else {}))
        self.tokenizer.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        """Writes the optimizer's state; random numbers of training come from (seed, step), so none need be kept."""
        held, self._held = self._held, None
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(held[1] if held else self._state(), folder / "trainer.pt")

    def _state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state() if self.optimizer else None, "loss_scale": self.loss_scale}

    def load(self, model_folder: Path, state_folder: Path) -> None:
        """Restores what `save_model` and `save_state` wrote, in place; UserError for another model's checkpoint."""
        restore_weights(self.model, model_folder)
        file = state_folder / "trainer.pt"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        self.loss_scale = state["loss_scale"]
        if self.optimizer is not None:
            self.optimizer.restore(state["optimizer"], str(file))
