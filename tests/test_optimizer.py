"""AdamW on float32 copies and in place: equal in float32, both learn in bfloat16, and both go on where they stopped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ilr_kernels.adamw import CHUNK
from torch import Tensor, nn

from ilr_fast import copies
from ilr_fast.config import OptimizerConfig
from ilr_fast.copies import spread
from ilr_fast.errors import UserError
from ilr_fast.host_states import HostStates
from ilr_fast.optimizer import Optimizer

DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")])]  # fmt: skip


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


@pytest.mark.parametrize("piece", [1, 40 * 64 + 1, copies.PIECE])
def test_gradients_are_widened_part_by_part(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PIECE", piece)
    parameters = fresh(torch.bfloat16, 5)
    made = optimizer(parameters, "copies")
    given = [None if i == 1 else torch.randn(40, 64).bfloat16() for i in range(5)]
    for (_, weight), gradient in zip(parameters, given, strict=True):
        weight.grad = gradient
    sink = torch.randn(40, 64)
    found = made.adamw.collect({parameters[4][1]: sink})
    assert found[1] is None and found[4] is sink
    for gradient, narrow in zip(found[:1] + found[2:4], given[:1] + given[2:4], strict=True):
        assert gradient is not None and narrow is not None
        assert gradient.dtype == torch.float32 and torch.equal(gradient, narrow.float())
    assert all(weight.grad is None for _, weight in parameters[:4])
    made.forget_gradients()
    assert all(weight.grad is None for weight in (*(w for _, w in parameters), *made.adamw.masters))


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_spread_over_what_rounds_to_their_weights(dtype: torch.dtype, device: str) -> None:
    limits = torch.finfo(dtype)
    edges = [0.0, 1.0, -2.0, 0.5, limits.max, limits.min, limits.tiny, limits.tiny / 4, torch.inf, -torch.inf]
    weight = torch.cat([torch.tensor(edges), 0.02 * torch.randn(100_000)]).to(dtype).to(device)
    copies = spread(weight, seed=1, place=0)
    assert torch.equal(copies.to(dtype), weight) and torch.isnan(spread(weight * torch.nan, 1, 0)).all()
    at = torch.full((100_000,), 0.75, dtype=dtype, device=device)  # the spacing there is eps / 2
    away = (spread(at, seed=1, place=1) - 0.75) / (limits.eps / 2)
    assert abs(float(away.mean())) < 0.005 and abs(float(away.std()) - 12**-0.5) < 0.005
    assert not torch.equal(spread(at, 1, 1), spread(at, 1, 2)) and torch.equal(spread(at, 1, 1), spread(at, 1, 1))


@pytest.mark.parametrize("offload", ["none", "host"])
def test_weights_in_bfloat16_move_on_average_from_the_first_step(offload: str) -> None:
    parameters = fresh(torch.bfloat16)
    before = [w.detach().float() for _, w in parameters]
    made = optimizer(parameters, "copies", lr=3e-6, offload=offload)
    for step in (1, 2, 3):
        for _, weight in parameters:
            weight.grad = torch.full_like(weight, -1.0)
        made.step(step)
    moved = torch.stack([w.detach().float() - b for (_, w), b in zip(parameters, before, strict=True)]).mean()
    assert 0.7 < float(moved) / 9e-6 < 1.3, float(moved)


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


KINDS = [
    {"rounding": "copies"},
    {"rounding": "copies", "dtype": torch.float32},
    {"rounding": "stochastic", "moments": "bfloat16"},
    {"rounding": "stochastic", "moments": "float32"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_states_on_the_host_give_the_same_bits(kind: dict[str, Any], device: str, monkeypatch) -> None:
    """Parameters larger and smaller than a bucket, one of them now and then without a gradient."""
    options = dict(kind)
    dtype = options.pop("dtype", torch.bfloat16)
    monkeypatch.setattr(HostStates.__init__, "__defaults__", (12 * CHUNK + 100,))
    sizes = [(3, 5), (5, CHUNK // 2 + 7), (40, 64), (CHUNK,), (2 * CHUNK + 1000,), (17,)]
    found: list[list[Tensor]] = []
    states: list[dict] = []
    for offload in ("none", "host"):
        g = torch.Generator().manual_seed(0)
        parameters = [
            (f"w{i}", nn.Parameter((0.02 * torch.randn(s, generator=g)).to(dtype).to(device)))
            for i, s in enumerate(sizes)
        ]
        made = optimizer(parameters, offload=offload, weight_decay=0.1, clip_norm=0.5, **options)
        for step in range(1, 4):
            for i, (_, weight) in enumerate(parameters):
                gradient = torch.randn(weight.shape, generator=g).to(weight)
                weight.grad = None if i == 2 and step == 2 else gradient
            sinks = {parameters[3][1]: torch.randn(sizes[3], generator=g).to(device)}
            made.step(step, sinks=sinks)
        found.append([w.detach().clone() for _, w in parameters])
        states.append(copy.deepcopy(made.state()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [flat.shape for flat in flattened(states[0])] == [flat.shape for flat in flattened(states[1])]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*map(flattened, states), strict=True))


def flattened(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state.float()]
    below = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in below for tensor in flattened(value)]


@pytest.mark.parametrize("kind", [k for k in KINDS if "dtype" not in k])
@pytest.mark.parametrize(("before", "after"), [("none", "host"), ("host", "none"), ("host", "host")])
def test_a_run_goes_on_with_its_states_elsewhere(kind: dict[str, Any], before: str, after: str) -> None:
    whole = fresh(torch.bfloat16)
    descend(whole, optimizer(whole, **kind), 1, 8)
    parameters = fresh(torch.bfloat16)
    made = optimizer(parameters, **kind, offload=before)
    descend(parameters, made, 1, 4)
    state = copy.deepcopy(made.state())
    resumed = optimizer(parameters, **kind, offload=after)
    resumed.restore(state, "trainer.pt")
    descend(parameters, resumed, 5, 8)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, parameters, strict=True))


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
    assert made.step(1).skipped and made.adamw.steps == 0
    assert all(torch.equal(w, b) and w.grad is None for (_, w), b in zip(parameters, before, strict=True))
