"""AdamW, its schedule, clipping by the whole norm, and float32 master weights where the model's are 16 bits wide.

    lr(s) = lr · s / warmup                                                     s ≤ warmup (steps count from 1)
    lr(s) = lr · (r + (1 − r)(1 + cos(π (s − warmup)/(steps − warmup)))/2)      cosine, r = min_lr_ratio
    g ← g · min(1, clip_norm / (‖g‖ + 1e-6))

An update of 1e-6 is lost in a bfloat16 weight (its spacing near 0.02 is 1e-4), so AdamW then works on float32 copies,
which are rounded into the model after each step; or, with `rounding: stochastic`, on the weights themselves
(in_place.py). torch's AdamW runs fused, on the CPU too: unfused it costs more there than the model does. Clipping goes
into the same pass over the gradients, as torch's GradScaler does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ilr_fast.config import OptimizerConfig
from ilr_fast.errors import UserError
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
        self.in_place = InPlaceAdamW(self.parameters, config, seed) if config.rounding == "stochastic" else None
        if self.in_place is None:
            self._copy_to_float32()

    def _copy_to_float32(self) -> None:
        config = self.config
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
        gradients = self._collect(sinks or {})
        norm = _norm([g for g in gradients if g is not None]) / loss_scale
        lr = learning_rate(self.config, step, self.steps)
        finite = math.isfinite(norm)
        if finite:
            clip = 1.0 if self.config.clip_norm is None else min(1.0, self.config.clip_norm / (norm + 1e-6))
            if self.in_place is not None:
                self.in_place.step(gradients, lr, clip / loss_scale)
            else:
                self._apply(lr, loss_scale / clip if clip else math.inf)
        for parameter in self.parameters if self.in_place is not None else self.masters:
            parameter.grad = None
        return Outcome(norm, lr, not finite)

    def _collect(self, sinks: Mapping[nn.Parameter, Tensor]) -> list[Tensor | None]:
        """Each parameter's gradient; for float32 copies where AdamW looks for it, the 16-bit ones freed one by one."""
        if self.in_place is not None:
            return [sinks.get(p, p.grad) for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter in sinks:
                master.grad = sinks[parameter]
            elif parameter is not master and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        return [m.grad for m in self.masters]

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
        if self.in_place is not None:
            return {"names": self.names, "in_place": self.in_place.state()}
        masters = [None if p is m else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)]
        return {"names": self.names, "adamw": self.adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any], where: str) -> None:
        """Takes over what `state` gave; `where` names its file if it is another model's (UserError)."""
        if state["names"] != self.names or (self.in_place is None) != ("in_place" not in state):
            raise UserError(
                "the optimizer state belongs to other parameters, or to another `rounding`",
                where,
                "resume with the config of the run, or start with `--fresh`",
            )
        if self.in_place is not None:
            self.in_place.restore(state["in_place"])
            return
        self.adamw.load_state_dict(state["adamw"])
        for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
            if parameter is not master:
                master.copy_(parameter if saved is None else saved)


def _norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all together, added up in float32 whatever they are held in."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
