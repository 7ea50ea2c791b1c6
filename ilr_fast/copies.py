"""AdamW on float32 copies of 16-bit weights, rounded into the model after each step; float32 weights need no copies.

torch's AdamW runs fused, on the CPU too: unfused it costs more there than the model does. Its kernel divides gradients
by `grad_scale` as it reads them, as torch's GradScaler has it do, which saves a pass over all of them. With
`offload: host` moments and copies pass through the device in buckets, by the same kernel.

Copies are spread over the values that round to their weights. One that began at its weight would not change it before
its steps add up to half of the 16-bit spacing (1.2e-4 at 0.05 in bfloat16: 120 steps at 1e-6), and all would wait.

    adamw = CopiedAdamW(parameters, config)
    adamw.step(adamw.collect(sinks), lr=1e-6, scale=1.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as functional_adamw

from ilr_fast.config import OptimizerConfig
from ilr_fast.host_states import HostStates, Piece

PIECE = 1 << 24  # weights whose copies are spread, or gradients widened, at once
HALF = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}  # of the 16-bit spacing, in float32's last bits


@torch.no_grad()
def spread(weight: Tensor, seed: int, place: int) -> Tensor:
    """Float32 copies [same shape] of 16-bit weights, each drawn evenly from the values that round to its weight.

    `place`: the weight's number among those of one optimizer; the same seed and place draw the same values on a device.
    Zeros, infinities and NaNs stay what they are. (L. Schuchman, Dither signals and their effect on quantization noise,
    1964.)
    """
    copy = weight.detach().float().contiguous()
    half = HALF.get(weight.dtype)
    if half is None:
        return copy
    generator = torch.Generator(copy.device).manual_seed((seed * 1_000_003 + place) % 2**63)
    for piece in copy.view(-1).split(PIECE):
        moves = torch.randint(1 - half, half, piece.shape, generator=generator, dtype=torch.int32, device=copy.device)
        moves.mul_(piece.isfinite() & (piece != 0))
        piece.view(torch.int32).add_(moves)  # the bits of a float32 grow with its size
    return copy


class CopiedAdamW:
    """Moments in float32. `masters` are the float32 copies, or the weights themselves where those are float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, seed: int = 0):
        self.parameters, self.config = parameters, config
        self.host = _HostCopies(parameters, seed) if config.offload == "host" else None
        self.masters: list[Any] = (
            [p if p.dtype == torch.float32 else nn.Parameter(spread(p, seed, i)) for i, p in enumerate(parameters)]
            if self.host is None else list(parameters)
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(
            self.masters, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip

    def collect(self, sinks: Mapping[Any, Tensor]) -> list[Tensor | None]:
        """Each parameter's gradient; for float32 copies where AdamW looks for it, the 16-bit ones go part by part."""
        if self.host is not None:
            return [sinks.get(p, p.grad) for p in self.parameters]
        narrow = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter in sinks:
                master.grad = sinks[parameter]
            elif parameter is not master and parameter.grad is not None:
                narrow.append((parameter, master))
        for part in _parts(narrow):
            widened = [torch.empty_like(p, dtype=torch.float32) for p, _ in part]
            torch._foreach_copy_(widened, [p.grad for p, _ in part])
            for (parameter, master), gradient in zip(part, widened, strict=True):
                master.grad, parameter.grad = gradient, None
        return [m.grad for m in self.masters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], lr: float, scale: float) -> None:
        """One step of every parameter that has a gradient; gradients are multiplied with `scale`."""
        divisor = 1 / scale if scale else math.inf
        if self.host is not None:
            self.host.step(gradients, lr, divisor, self.config)
            return
        for group in self.adamw.param_groups:
            group["lr"] = lr
        setattr(self.adamw, "grad_scale", _grad_scale(divisor, self.masters[0].device))  # noqa: B010 (unknown to mypy)
        self.adamw.step()
        changed = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if changed:
            torch._foreach_copy_([p for p, _ in changed], [m for _, m in changed])

    def forget_gradients(self) -> None:
        """The copies' gradients, which a step has made of the weights' own, are let go."""
        for parameter in self.masters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """`adamw` as torch's own, and the copies, None for a float32 weight."""
        if self.host is not None:
            groups = self.adamw.state_dict()["param_groups"]
            return {"adamw": {"state": self.host.state(), "param_groups": groups}, "masters": self.host.copies()}
        masters = [None if p is m else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    @staticmethod
    def made(state: Mapping[str, Any]) -> bool:
        """Whether `state` is of this kind."""
        return "masters" in state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave, wherever that kept it."""
        if self.host is not None:
            self.host.restore(state["adamw"]["state"], state["masters"])
            return
        self.adamw.load_state_dict(state["adamw"])
        for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
            if parameter is not master:
                master.copy_(parameter if saved is None else saved)


def _parts(pairs: Sequence[tuple[Any, Any]]) -> Iterator[list[tuple[Any, Any]]]:
    """Weights and copies, of about PIECE numbers at a time: few launches, and little memory beside the whole."""
    part: list[tuple[Any, Any]] = []
    size = 0
    for pair in pairs:
        part.append(pair)
        size += pair[0].numel()
        if size >= PIECE:
            yield part
            part, size = [], 0
    if part:
        yield part


class _HostCopies:
    """Moments, and copies of the 16-bit weights, in the host's memory."""

    def __init__(self, parameters: Sequence[nn.Parameter], seed: int):
        self._parameters = parameters
        self._copied = any(p.dtype != torch.float32 for p in parameters)
        kinds = dict.fromkeys(("mean", "square", *(("copy",) if self._copied else ())), torch.float32)
        self._states = HostStates(parameters, kinds)
        self._steps = [0] * len(parameters)
        for i, (own, parameter) in enumerate(zip(self.copies(), parameters, strict=True)):
            if own is not None:
                own.copy_(spread(parameter, seed, i))  # on the GPU: the host takes its time

    def step(self, gradients: Sequence[Tensor | None], lr: float, divisor: float, config: OptimizerConfig) -> None:
        """One step, bucket by bucket."""
        wanted = [gradient is not None for gradient in gradients]
        self._steps = [steps + there for steps, there in zip(self._steps, wanted, strict=True)]
        grad_scale = _grad_scale(divisor, self._parameters[0].device) if self._parameters else None

        def work(pieces: Sequence[Piece]) -> None:
            weights = [piece.of(self._parameters[piece.index]) for piece in pieces]
            masters = [
                weight if weight.dtype == torch.float32 else piece.states["copy"]
                for weight, piece in zip(weights, pieces, strict=True)
            ]
            functional_adamw(
                masters,
                [piece.of(_contiguous(gradients[piece.index])).float() for piece in pieces],
                [piece.states["mean"] for piece in pieces],
                [piece.states["square"] for piece in pieces],
                [],
                [torch.tensor(self._steps[p.index] - 1.0, device=masters[0].device) for p in pieces],
                fused=True,
                grad_scale=grad_scale,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=lr,
                weight_decay=config.weight_decay,
                eps=config.eps,
                maximize=False,
            )
            for weight, master in zip(weights, masters, strict=True):
                if weight is not master:
                    weight.copy_(master)

        self._states.sweep(work, wanted)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """As in torch's state_dict: by a parameter's number, for those that have been moved."""
        means, squares = self._states.of("mean"), self._states.of("square")
        return {
            i: {"step": torch.tensor(float(steps)), "exp_avg": means[i], "exp_avg_sq": squares[i]}
            for i, steps in enumerate(self._steps) if steps
        }  # fmt: skip

    def copies(self) -> list[Tensor | None]:
        """The copy of each 16-bit weight."""
        copies = self._states.of("copy") if self._copied else [None] * len(self._parameters)
        return [None if p.dtype == torch.float32 else c for p, c in zip(self._parameters, copies, strict=True)]

    def restore(self, state: Mapping[int, Mapping[str, Tensor]], masters: Sequence[Tensor | None]) -> None:
        """Takes over AdamW's state by parameter (0 where it has none) and float32 copies (None: the parameter)."""
        self._steps = [int(state[i]["step"]) if i in state else 0 for i in range(len(self._parameters))]
        for kind, name in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
            for i, own in enumerate(self._states.of(kind)):
                own.copy_(state[i][name]) if i in state else own.zero_()
        self._take_copies(masters)

    @torch.no_grad()
    def _take_copies(self, masters: Sequence[Tensor | None]) -> None:
        for own, parameter, saved in zip(self.copies(), self._parameters, masters, strict=True):
            if own is not None:
                own.copy_(parameter.float() if saved is None else saved)


def _contiguous(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.contiguous()


def _grad_scale(divisor: float, device: torch.device) -> Tensor | None:
    return None if divisor == 1 else torch.tensor(divisor, device=device)
