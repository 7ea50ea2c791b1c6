"""AdamW in place with stochastic rounding beside float32 copies and 8-bit states, on the parameters of a 0.5B model.

    ilr-fast bench adamw

The limit of a variant is a copy of as many bytes as it must read and write for each parameter. Errors are those of the
weights after one step from the same state, against float64, and bfloat16's own rounding is some 2e-3 of them; of ours,
which rounds without bias, also how much of the step arrives: 1 − ⟨found − before, exact − before⟩ / ‖exact − before‖².
Another library that raises, or whose first step (torchao compiles one for each shape) takes longer than `PATIENCE_S`,
says so in its row and leaves the others theirs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from ilr_benchmarks.measure import Case, Outputs, Target, measure, relative_error
from ilr_kernels import reference
from ilr_kernels.adamw import adamw_step_
from torch import Tensor, nn

OPTIONS = dict(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
STEP = 10
# What each variant reads and writes of a parameter, in bytes: weights, a bfloat16 gradient, two moments.
FLOAT32, BFLOAT16, EIGHT_BITS = 4 + 2 + 16, 4 + 2 + 8, 4 + 2 + 4
PATIENCE_S = 30
CHECKED = 3  # tensors whose weights are held against float64


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of one model's parameters."""
    shapes = qwen2(1024, 64, 96, 2, 16) if quick else qwen2(151936, 896, 4864, 24, 128)
    x = Parameters(shapes, device)
    return measure(cases(x, only_ours), f"{x.count / 1e9:.2g}B parameters, bfloat16", rounds, device, queued=True)


def qwen2(vocabulary: int, width: int, inner: int, layers: int, keys: int) -> list[tuple[int, ...]]:
    """The shapes of a Qwen2 model with tied embeddings."""
    layer = [(width, width), (width,), (keys, width), (keys,), (keys, width), (keys,), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *(layer * layers), (width,)]


class Parameters:
    """Weights, gradients and moments of a real scale; every variant starts from the same, and has room of its own."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str):
        g = torch.Generator(device).manual_seed(0)

        def normal(size: float, dtype: torch.dtype) -> list[Tensor]:
            return [(size * torch.randn(s, generator=g, device=device)).to(dtype) for s in shapes]

        self.weights, self.gradients = normal(0.02, torch.bfloat16), normal(1e-3, torch.bfloat16)
        self.means, self.squares = normal(1e-4, torch.float32), normal(1e-3, torch.float32)
        for square in self.squares:
            square.square_()
        self.count = sum(w.numel() for w in self.weights)
        self.device = device

    def truth(self) -> list[Tensor]:
        """The first weights after the step, in float64."""
        parts = [[x.double() for x in part[1 : 1 + CHECKED]] for part in self.state(torch.float32)]
        reference.adamw_step_(*parts, step=STEP, **OPTIONS)  # type: ignore[arg-type]
        return parts[0]

    def state(self, moments: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Copies of the weights and moments, and the gradients."""
        weights = [w.clone() for w in self.weights]
        means, squares = ([x.to(moments, copy=True) for x in part] for part in (self.means, self.squares))
        return weights, self.gradients, means, squares


def cases(x: Parameters, only_ours: bool) -> list[Case]:
    """Limits and variants; a variant's state is made at its first call, and stays."""
    truth = x.truth()

    before = [w.double() for w in x.weights[1 : 1 + CHECKED]]

    def weights_error(found: Outputs) -> dict[str, float]:
        return {"weights": max(relative_error(found[str(i)], exact) for i, exact in enumerate(truth))}

    def step_error(found: Outputs) -> dict[str, float]:
        meant = [exact - start for exact, start in zip(truth, before, strict=True)]
        made = [found[str(i)].double() - start for i, start in enumerate(before)]
        arrived = sum(float((a * b).sum()) for a, b in zip(made, meant, strict=True))
        arrived /= sum(float(b.square().sum()) for b in meant)
        return weights_error(found) | {"step": abs(1 - arrived)}

    def case(name: str, bytes_each: int, make: Callable[[], Callable[[], list[Tensor]]], *targets: Target,
             error: Callable[[Outputs], dict[str, float]] = weights_error) -> Case:  # fmt: skip
        held: list[Callable[[], list[Tensor]]] = []

        def work() -> Outputs:
            if not held:
                held.append(make())
            return {str(i): w for i, w in enumerate(held[0]()[1 : 1 + CHECKED])}

        return Case(name, work, error, tolerance=0.02, limit=limit_of(bytes_each), targets=targets)

    room = torch.empty(2, x.count * FLOAT32 // 4, dtype=torch.bfloat16, device=x.device)

    def copy(bytes_each: int) -> Callable[[], None]:
        size = x.count * bytes_each // 4  # half of the bytes are read, half written, two at a time
        return lambda: room[0, :size].copy_(room[1, :size])

    limits = [Case(limit_of(b), copy(b)) for b in (FLOAT32, BFLOAT16, EIGHT_BITS)]
    near = Target("limit", 1.11)
    ours = [
        case("ours, float32 moments", FLOAT32, lambda: in_place(x, torch.float32), near, error=step_error),
        case("ours, bfloat16 moments", BFLOAT16, lambda: in_place(x, torch.bfloat16), near, error=step_error),
        case("torch's fused AdamW on float32 copies", FLOAT32, lambda: on_copies(x)),
    ]
    return [*limits, *ours, *([] if only_ours else peers(x, case))]


def limit_of(bytes_each: int) -> str:
    return f"limit: a copy of {bytes_each} bytes a parameter"


def in_place(x: Parameters, moments: torch.dtype) -> Callable[[], list[Tensor]]:
    weights, gradients, means, squares = x.state(moments)
    seed = 0

    def step() -> list[Tensor]:
        nonlocal seed
        seed += 1
        adamw_step_(weights, gradients, means, squares, step=STEP, seed=seed, **OPTIONS)
        return weights

    return step


def on_copies(x: Parameters) -> Callable[[], list[Tensor]]:
    """What a trainer does without: float32 copies of weights and gradients, and the weights rounded from them."""
    weights, gradients, means, squares = x.state(torch.float32)
    masters = [nn.Parameter(w.float()) for w in weights]
    adamw = torch.optim.AdamW(masters, fused=True, **torch_options())
    for master, mean, square in zip(masters, means, squares, strict=True):
        count = torch.tensor(float(STEP - 1), device=master.device)
        adamw.state[master] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}

    def step() -> list[Tensor]:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        adamw.step()
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master.detach())
            master.grad = None
        return weights

    return step


def peers(x: Parameters, case: Callable[..., Case]) -> list[Case]:
    """torchao's and bitsandbytes' AdamW with 8-bit moments, from moments of 0: their errors are not comparable."""
    found: list[Case] = []

    def add(name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        def prepared() -> Callable[[], list[Tensor]]:
            parameters = [nn.Parameter(w.clone()) for w in x.weights]
            optimizer = make(parameters)

            def step() -> list[Tensor]:
                for parameter, gradient in zip(parameters, x.gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                return [p.detach() for p in parameters]

            return impatient(step)

        found.append(case(name, EIGHT_BITS, prepared))

    def torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, bf16_stochastic_round=True, **torch_options())

    def bitsandbytes(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **torch_options())

    if x.device == "cuda":
        if find_spec("bitsandbytes"):
            add("bitsandbytes, 8-bit moments, nearest", bitsandbytes)
        if find_spec("torchao"):
            add("torchao, 8-bit moments, stochastic rounding", torchao)
    return found


def impatient(step: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The same, but the first call raises TimeoutError after `PATIENCE_S`."""
    called = False

    def work() -> list[Tensor]:
        nonlocal called
        if called:
            return step()
        called = True

        def give_up(signum: int, frame: Any) -> None:
            raise TimeoutError(f"the first step took longer than {PATIENCE_S} s")

        before = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(PATIENCE_S)
        try:
            return step()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return work


def torch_options() -> dict[str, Any]:
    betas = OPTIONS["beta1"], OPTIONS["beta2"]
    return dict(lr=OPTIONS["lr"], betas=betas, eps=OPTIONS["eps"], weight_decay=OPTIONS["weight_decay"])
