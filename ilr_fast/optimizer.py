"""AdamW, its schedule, clipping by the whole norm, and float32 master weights where the model's are 16 bits wide.

    lr(s) = lr · s / warmup                                                     s ≤ warmup (steps count from 1)
    lr(s) = lr · (r + (1 − r)(1 + cos(π (s − warmup)/(steps − warmup)))/2)      cosine, r = min_lr_ratio
    g ← g · min(1, clip_norm / (‖g‖ + 1e-6))

An update of 1e-6 is lost in a bfloat16 weight (its spacing near 0.02 is 1e-4), so AdamW then works on float32 copies,
which are rounded into the model after each step. torch's AdamW runs fused, on the CPU too: unfused it costs more there
than the model does. Clipping goes into the same pass over the gradients, as torch's GradScaler does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ilr_fast.config import OptimizerConfig
from ilr_fast.errors import UserError


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

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig, steps: int):
        self.config, self.steps = config, steps
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        self.adamw = torch.optim.AdamW(
            self.masters, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip

    def step(
        self, step: int, *, loss_scale: float = 1.0, sinks: Mapping[nn.Parameter, Tensor] | None = None
    ) -> Outcome:
        """One update; gradients are those of `loss_scale` times the loss and are gone afterwards.

        `sinks` holds, for some parameters, a float32 gradient that is used instead of their `.grad`. A norm that is not
        finite leaves weights and optimizer state as they are.
        """
        self._collect(sinks or {})
        gradients = [m.grad for m in self.masters if m.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / loss_scale
        lr = learning_rate(self.config, step, self.steps)
        finite = math.isfinite(norm)
        if finite:
            clip = 1.0 if self.config.clip_norm is None else min(1.0, self.config.clip_norm / (norm + 1e-6))
            self._apply(lr, loss_scale / clip if clip else math.inf)
        self.adamw.zero_grad(set_to_none=True)
        return Outcome(norm, lr, not finite)

    def _collect(self, sinks: Mapping[nn.Parameter, Tensor]) -> None:
        """Puts each gradient where AdamW looks for it, in float32; 16-bit ones are freed one by one."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter in sinks:
                master.grad = sinks[parameter]
            elif parameter is not master and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def _apply(self, lr: float, divisor: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # The fused kernel divides gradients by `grad_scale` as it reads them, which saves a pass over all of them.
        scale = None if divisor == 1 else torch.tensor(divisor, device=self.masters[0].device)
        setattr(self.adamw, "grad_scale", scale)  # noqa: B010 (mypy does not know it)
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def state(self) -> dict[str, Any]:
        """All that resuming needs beside the weights: tensors, numbers and names only."""
        masters = [None if p is m else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)]
        return {"names": self.names, "adamw": self.adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any], where: str) -> None:
        """Takes over what `state` gave; `where` names its file if it is another model's (UserError)."""
        if state["names"] != self.names:
            raise UserError(
                "the optimizer state belongs to other parameters",
                where,
                "resume with the config of the run, or start with `--fresh`",
            )
        self.adamw.load_state_dict(state["adamw"])
        for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
            if parameter is not master:
                master.copy_(parameter if saved is None else saved)
