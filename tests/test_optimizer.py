"""AdamW on float32 copies and in place: equal in float32, both learn in bfloat16, and both go on where they stopped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilr_fast.config import OptimizerConfig
from ilr_fast.errors import UserError
from ilr_fast.optimizer import Optimizer


def fresh(dtype: torch.dtype, count: int = 3) -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    return [(f"w{i}", nn.Parameter((0.02 * torch.randn(40, 64, generator=g)).to(dtype))) for i in range(count)]


def optimizer(parameters: Any, rounding: str, steps: int = 300, **changes: Any) -> Optimizer:
    options = {"lr": 3e-5, "rounding": rounding, "clip_norm": None, **changes}
    return Optimizer(parameters, OptimizerConfig(**options), steps, seed=5)


def descend(parameters: Any, made: Optimizer, first: int, last: int) -> float:
    """Steps towards weights whose distance is 1e-3, by the gradient of the squared distance; the mean distance left."""
    wanted = [w.detach().float() + 1e-3 for _, w in fresh(torch.float32)]
    for step in range(first, last + 1):
        for (_, weight), goal in zip(parameters, wanted, strict=True):
            weight.grad = 2 * (weight.detach() - goal.to(weight.dtype))
        made.step(step)
    left = [(w.detach().float() - goal).mean().abs() for (_, w), goal in zip(parameters, wanted, strict=True)]
    return float(torch.stack(left).mean())


def test_in_float32_both_are_torchs_adamw() -> None:
    found: dict[str, list[Tensor]] = {}
    for rounding in ("copies", "stochastic"):
        parameters = fresh(torch.float32)
        made = optimizer(parameters, rounding, weight_decay=0.1, clip_norm=0.5)
        descend(parameters, made, 1, 20)
        found[rounding] = [w.detach() for _, w in parameters]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_in_bfloat16_stochastic_rounding_goes_as_far_as_float32_copies(moments: str) -> None:
    left = {}
    for name, changes in {"copies": {}, "stochastic": {"moments": moments}}.items():
        parameters = fresh(torch.bfloat16)
        left[name] = descend(parameters, optimizer(parameters, name, **changes), 1, 60)
    nearest = fresh(torch.bfloat16)
    adamw = torch.optim.AdamW([w for _, w in nearest], lr=3e-5, betas=(0.9, 0.95), weight_decay=0.0)
    made: Any = type("Plain", (), {"step": lambda self, step: adamw.step()})()
    left["nearest"] = descend(nearest, made, 1, 60)
    assert left["copies"] < 2e-4 and left["stochastic"] < 2e-4 < left["nearest"], left


@pytest.mark.parametrize("changes", [{"rounding": "copies"}, {"rounding": "stochastic", "moments": "bfloat16"}])
def test_a_resumed_run_goes_on_bit_for_bit(changes: dict[str, str]) -> None:
    def make(parameters: Any) -> Optimizer:
        return optimizer(parameters, **changes)

    whole = fresh(torch.bfloat16)
    descend(whole, make(whole), 1, 12)
    first = fresh(torch.bfloat16)
    made = make(first)
    descend(first, made, 1, 5)
    state = copy.deepcopy(made.state())
    second = fresh(torch.bfloat16)
    with torch.no_grad():
        for (_, a), (_, b) in zip(second, first, strict=True):
            a.copy_(b)
    resumed = make(second)
    resumed.restore(state, "trainer.pt")
    descend(second, resumed, 6, 12)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, second, strict=True))


def test_another_kind_of_state_is_refused() -> None:
    parameters = fresh(torch.bfloat16)
    state = optimizer(parameters, "copies").state()
    with pytest.raises(UserError, match="another `rounding`"):
        optimizer(parameters, "stochastic").restore(state, "trainer.pt")


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameters = fresh(torch.bfloat16)
    made = optimizer(parameters, "stochastic")
    before = [w.detach().clone() for _, w in parameters]
    for _, weight in parameters:
        weight.grad = torch.full_like(weight, float("nan"))
    assert made.step(1).skipped and made.in_place is not None and made.in_place.steps == 0
    assert all(torch.equal(w, b) and w.grad is None for (_, w), b in zip(parameters, before, strict=True))
