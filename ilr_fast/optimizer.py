"""AdamW, its schedule, clipping by the whole norm, and float32 master weights where the model's are 16 bits wide.

    lr(s) = lr · s / warmup                                                     s ≤ warmup (steps count from 1)
    lr(s) = lr · (r + (1 − r)(1 + cos(π (s − warmup)/(steps − warmup)))/2)      cosine, r = min_lr_ratio
    g ← g · min(1, clip_norm / (‖g‖ + 1e-6))

An update of 1e-6 is lost in a bfloat16 weight (its spacing near 0.02 is 1e-4), so AdamW then works on float32 copies,
which are rounded into the model after each step (copies.py); or, with `rounding: stochastic`, on the weights themselves
(in_place.py). Either may keep its states in the host's memory (host_states.py). Clipping goes into the same pass over
the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ilr_fast.config import OptimizerConfig
from ilr_fast.copies import CopiedAdamW
from ilr_fast.errors import RunError, UserError
from ilr_fast.in_place import InPlaceAdamW


class Outcome(NamedTuple):
    """What one optimizer step did: the norm before clipping, and whether the weights were left untouched."""

    grad_norm: float
    lr: float
    skipped: bool


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of `steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


class Optimizer:
    """AdamW on named trainable parameters."""

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig, steps: int, seed: int = 0
    ):
        self.config, self.steps = config, steps
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        kind = InPlaceAdamW if config.rounding == "stochastic" else CopiedAdamW
        self.adamw = kind(self.parameters, config, seed)

    def step(
        self, step: int, *, loss_scale: float = 1.0, sinks: Mapping[nn.Parameter, Tensor] | None = None
    ) -> Outcome:
        """One update; gradients are those of `loss_scale` times the loss and are gone afterwards.

        `sinks` holds, for some parameters, a float32 gradient that is used instead of their `.grad`. A norm that is not
        finite leaves weights and optimizer state as they are.
        """
        gradients = self.adamw.collect(sinks or {})
        norm = _norm([g for g in gradients if g is not None]) / loss_scale
        lr = learning_rate(self.config, step, self.steps)
        finite = math.isfinite(norm)
        if finite:
            clip = 1.0 if self.config.clip_norm is None else min(1.0, self.config.clip_norm / (norm + 1e-6))
            try:
                self.adamw.step(gradients, lr, clip / loss_scale)
            except torch.OutOfMemoryError as error:  # some weights may have moved, so the step can't be taken again
                what = f"out of memory while AdamW moved the weights ({str(error).partition(chr(10))[0]})"
                remedy = "set optimizer.offload: host, or see `ilr-fast plan`; the run goes on from its last checkpoint"
                raise RunError(f"{what}\n  → {remedy}") from None
        self.adamw.forget_gradients()
        return Outcome(norm, lr, not finite)

    def forget_gradients(self) -> None:
        """Lets all go, the copies' too."""
        for parameter in self.parameters:
            parameter.grad = None
        self.adamw.forget_gradients()

    def state(self) -> dict[str, Any]:
        """All that resuming needs beside the weights: tensors, numbers and names only; the same wherever they are."""
        return {"names": self.names, **self.adamw.state()}

    def restore(self, state: Mapping[str, Any], where: str) -> None:
        """Takes over what `state` gave; `where` names its file if it is another model's (UserError)."""
        if state["names"] != self.names or not self.adamw.made(state):
            raise UserError(
                "the optimizer state belongs to other parameters, or to another `rounding`",
                where,
                "resume with the config of the run, or start with `--fresh`",
            )
        self.adamw.restore(state)


def _norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all together, added up in float32 whatever they are held in."""
    norms = torch._foreach_norm(list(gradients), dtype=torch.float32) if gradients else ()
    return float(torch.linalg.vector_norm(torch.stack(list(norms)))) if norms else 0.0
