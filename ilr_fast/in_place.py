"""AdamW on the 16-bit weights themselves: no float32 copies, each update rounded stochastically (`ilr_kernels.adamw`).

    adamw = InPlaceAdamW(parameters, config, seed=3)
    adamw.step(gradients, lr=1e-6, scale=1.0)

With `offload: host` the moments are in the host's memory and pass through the device in buckets; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ilr_kernels.adamw import adamw_step_
from torch import Tensor

from ilr_fast.config import OptimizerConfig
from ilr_fast.host_states import HostStates, Piece


class InPlaceAdamW:
    """Moments in `config.moments`' precision; random numbers come from seed, step and a weight's place."""

    def __init__(self, parameters: Sequence[Any], config: OptimizerConfig, seed: int):
        dtype = getattr(torch, config.moments)
        self.parameters, self.config, self.seed, self.steps = parameters, config, seed, 0
        self.host: HostStates | None = None
        if config.offload == "host":
            self.host = HostStates(parameters, {"mean": dtype, "square": dtype})
            self.means, self.squares = self.host.of("mean"), self.host.of("square")
            return
        self.means = [torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format) for p in parameters]
        self.squares = [torch.zeros_like(m) for m in self.means]

    def collect(self, sinks: Mapping[Any, Tensor]) -> list[Tensor | None]:
        """Each parameter's gradient."""
        return [sinks.get(p, p.grad) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], lr: float, scale: float) -> None:
        """One step of every parameter that has a gradient; gradients are multiplied with `scale`."""
        self.steps += 1
        given = {i: gradient.contiguous() for i, gradient in enumerate(gradients) if gradient is not None}
        if self.host is None:
            lists = ([x[i].detach() for i in given] for x in (self.parameters, self.means, self.squares))
            weights, means, squares = lists
            self._step(weights, list(given.values()), means, squares, [(i, 0) for i in given], lr, scale)
            return

        def work(pieces: Sequence[Piece]) -> None:
            self._step(
                [p.of(self.parameters[p.index]) for p in pieces], [p.of(given[p.index]) for p in pieces],
                [p.states["mean"] for p in pieces], [p.states["square"] for p in pieces],
                [(p.index, p.start) for p in pieces], lr, scale,
            )  # fmt: skip

        self.host.sweep(work, [i in given for i in range(len(self.parameters))])

    def _step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        places: Sequence[tuple[int, int]],
        lr: float,
        scale: float,
    ) -> None:
        config = self.config
        adamw_step_(
            weights, gradients, means, squares, lr=lr, step=self.steps, beta1=config.beta1, beta2=config.beta2,
            eps=config.eps, weight_decay=config.weight_decay, scale=scale,
            seed=self.seed + 0x632BE59BD9B4E019 * self.steps, places=places,
        )  # fmt: skip

    def forget_gradients(self) -> None:
        """The weights' gradients are let go."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {"in_place": {"steps": self.steps, "means": self.means, "squares": self.squares}}

    @staticmethod
    def made(state: Mapping[str, Any]) -> bool:
        """Whether `state` is of this kind."""
        return "in_place" in state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave, wherever that kept it."""
        saved = state["in_place"]
        self.steps = saved["steps"]
        for own, given in ((self.means, saved["means"]), (self.squares, saved["squares"])):
            for target, value in zip(own, given, strict=True):
                target.copy_(value)
