"""AdamW on the 16-bit weights themselves: no float32 copies, each update rounded stochastically (`ilr_kernels.adamw`).

    adamw = InPlaceAdamW(parameters, config, seed=3)
    adamw.step(gradients, lr=1e-6, scale=1.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ilr_kernels.adamw import adamw_step_
from torch import Tensor

from ilr_fast.config import OptimizerConfig


class InPlaceAdamW:
    """Moments in `config.moments`' precision, made with the first step; random numbers come from seed and step."""

    def __init__(self, parameters: Sequence[Tensor], config: OptimizerConfig, seed: int):
        dtype = getattr(torch, config.moments)
        self.parameters, self.config, self.seed, self.steps = parameters, config, seed, 0
        self.means = [torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format) for p in parameters]
        self.squares = [torch.zeros_like(m) for m in self.means]

    def step(self, gradients: Sequence[Tensor | None], lr: float, scale: float) -> None:
        """One step of every parameter that has a gradient; gradients are multiplied with `scale`."""
        self.steps += 1
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        given = [gradient.contiguous() for gradient in gradients if gradient is not None]
        weights, means, squares = ([x[i] for i in there] for x in (self.parameters, self.means, self.squares))
        config = self.config
        adamw_step_(
            [w.detach() for w in weights], given, means, squares, lr=lr, step=self.steps, beta1=config.beta1,
            beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay, scale=scale,
            seed=self.seed + 0x632BE59BD9B4E019 * self.steps,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {"steps": self.steps, "means": self.means, "squares": self.squares}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.steps = state["steps"]
        for own, saved in ((self.means, state["means"]), (self.squares, state["squares"])):
            for target, value in zip(own, saved, strict=True):
                target.copy_(value)
