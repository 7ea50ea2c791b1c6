"""AdamW in place: against float64, rounding without bias, the same bits for the same seed; also what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ilr_kernels import reference
from ilr_kernels.adamw import CHUNK, adamw_step_, round_stochastically
from torch import Tensor

BOTH = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")])]  # fmt: skip
SHAPES = [(3, 5), (128,), (64, 48), (1,), (5000, 3), (0,)]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def problem(weight: torch.dtype, state: torch.dtype, gradient: torch.dtype, device: str, seed: int = 0) -> Lists:
    g = torch.Generator().manual_seed(seed)

    def lists(dtype: torch.dtype, size: float, power: int = 1) -> list[Tensor]:
        return [(size * torch.randn(s, generator=g)).pow(power).to(dtype).to(device) for s in SHAPES]

    return lists(weight, 0.02), lists(gradient, 1e-3), lists(state, 1e-3), lists(state, 1e-3, 2)


def exactly(lists: Lists, **options: Any) -> Lists:
    """The same step in float64."""
    wide: Lists = tuple([x.double().cpu() for x in part] for part in lists)  # type: ignore[assignment]
    reference.adamw_step_(*wide, **options)
    return wide


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 1000])
def test_against_truth_in_float32(device: str, gradient: torch.dtype, step: int) -> None:
    lists = problem(torch.float32, torch.float32, gradient, device)
    options = dict(lr=1e-3, step=step, beta1=0.9, beta2=0.95, weight_decay=0.1, scale=0.25)
    truth = exactly(lists, **options)
    gradients = [x.clone() for x in lists[1]]
    adamw_step_(*lists, **options)
    for part in (0, 2, 3):
        for found, exact in zip(lists[part], truth[part], strict=True):
            largest = float(exact.abs().max()) if exact.numel() else 0.0
            torch.testing.assert_close(found.cpu().double(), exact, rtol=3e-6, atol=3e-7 * largest)
    assert all(torch.equal(a, b) for a, b in zip(lists[1], gradients, strict=True))


@pytest.mark.parametrize("device", BOTH)
def test_what_is_rounded_is_a_neighbour_and_right_on_average(device: str) -> None:
    """4,096 seeds of one step that is a fortieth of the way to the next bfloat16 number."""
    weight = torch.full((64, 64), 0.02, dtype=torch.bfloat16, device=device)
    gradient = torch.full((64, 64), 1e-3, device=device)
    mean, square = torch.zeros(64, 64, device=device), torch.zeros(64, 64, device=device)
    below = torch.nextafter(weight, torch.zeros_like(weight))
    moved = weight.clone()
    adamw_step_([moved], [gradient], [mean], [square], lr=3e-6, step=1, seed=7)
    assert ((moved == weight) | (moved == below)).all()
    distance, share = float((weight - below)[0, 0]), float((moved == below).float().mean())
    expected = 3e-6 / distance
    deviation = math.sqrt(expected * (1 - expected) / weight.numel())
    assert abs(share - expected) < 4 * deviation, (share, expected)


@pytest.mark.parametrize("device", BOTH)
def test_rounded_to_the_nearest_a_weight_stands_still(device: str) -> None:
    weight = torch.full((64, 64), 0.02, dtype=torch.bfloat16, device=device)
    still, zeros = weight.clone(), torch.zeros(2, 64, 64, device=device)
    adamw_step_([still], [zeros[0] + 1e-3], [zeros[0]], [zeros[1]], lr=3e-6, step=1, stochastic=False)
    assert torch.equal(still, weight)


@pytest.mark.parametrize("device", BOTH)
def test_states_in_bfloat16_are_right_on_average(device: str) -> None:
    lists = problem(torch.bfloat16, torch.bfloat16, torch.float32, device)
    truth = exactly(lists, lr=1e-4, step=10)
    start = [[x.clone() for x in part] for part in lists]
    sums = [[torch.zeros_like(x, dtype=torch.float64) for x in part] for part in lists]
    rounds = 400
    for seed in range(rounds):
        trial: Lists = tuple([x.clone() for x in part] for part in start)  # type: ignore[assignment]
        adamw_step_(*trial, lr=1e-4, step=10, seed=seed)
        for total, part in zip(sums, trial, strict=True):
            for a, b in zip(total, part, strict=True):
                a += b.double()
    for part in (0, 2, 3):
        for total, exact in zip(sums[part], truth[part], strict=True):
            if exact.numel():
                spread = exact.abs().clamp_min(1e-12) / 128 / math.sqrt(rounds)  # a unit in the last place, averaged
                assert ((total.cpu() / rounds - exact).abs() / spread).max() < 5


@pytest.mark.parametrize("device", BOTH)
def test_the_seed_decides(device: str) -> None:
    def after(seed: int) -> list[Tensor]:
        lists = problem(torch.bfloat16, torch.bfloat16, torch.bfloat16, device)
        adamw_step_(*lists, lr=1e-4, step=3, seed=seed)
        return [x for part in (0, 2, 3) for x in lists[part]]

    one, again, other = after(1), after(1), after(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("device", BOTH)
def test_part_by_part_is_the_whole(device: str) -> None:
    """Parts of flattened tensors, in any company, give the bits of one step of all."""
    sizes = [CHUNK + 5000, 40, 2 * CHUNK + 16, 3]

    def lists() -> Lists:
        g = torch.Generator().manual_seed(1)
        made = [[(0.02 * torch.randn(n, generator=g)).abs().bfloat16().to(device) for n in sizes] for _ in range(4)]
        return tuple(made)  # type: ignore[return-value]

    whole, parts = lists(), lists()
    options = dict(lr=1e-3, step=5, seed=11)
    adamw_step_(*whole, **options)
    for taken in ([(0, 0, CHUNK), (3, 0, 3)], [(2, CHUNK, 2 * CHUNK), (0, CHUNK, CHUNK + 5000)],
                  [(1, 0, 40)], [(2, 0, CHUNK), (2, 2 * CHUNK, 2 * CHUNK + 16)]):  # fmt: skip
        pieces: Any = [[part[i][a:b] for i, a, b in taken] for part in parts]
        adamw_step_(*pieces, **options, places=[(i, a) for i, a, _ in taken])
    for part in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole[part], parts[part], strict=True))


@pytest.mark.parametrize("device", BOTH)
def test_gradients_off_alignment(device: str) -> None:
    """Views that start anywhere, first and among others, give the bits of gradients that start at 16 bytes."""
    one, other = (problem(torch.bfloat16, torch.float32, torch.float32, device) for _ in range(2))
    shifted = [torch.cat([x.new_zeros(i), x.flatten()])[i:].view(x.shape) for i, x in enumerate(one[1], start=1)]
    assert any(x.data_ptr() % 16 for x in shifted)
    adamw_step_(*one, lr=1e-3, step=2, seed=3)
    adamw_step_(other[0], shifted, *other[2:], lr=1e-3, step=2, seed=3)
    for part in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one[part], other[part], strict=True))


def test_numbers_at_the_edges() -> None:
    x = torch.tensor([3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40])
    for seed in range(50):
        y = round_stochastically(x, torch.Generator().manual_seed(seed)).float()
        assert torch.isfinite(y[:2]).all() and torch.equal(y[2:4], x[2:4]) and y[4].isnan() and (y[5:7] == 0).all()


def test_mistakes_are_named() -> None:
    def lists() -> Lists:
        return problem(torch.bfloat16, torch.float32, torch.float32, "cpu")

    def refused(match: str, *changed: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            adamw_step_(*(changed or lists()), **{"lr": 1e-3, "step": 1, **options})

    w, g, m, v = lists()
    refused("step", step=0)
    refused("lr", lr=math.nan)
    refused(r"gradients must hold 6", w, g[:2], m, v)
    refused(r"means\[0\] must be \(3, 5\)", w, g, [m[1], *m[1:]], v)
    refused(r"weights\[0\] must be float32 or bfloat16", [w[0].half(), *w[1:]], g, m, v)
    refused(r"squares\[2\] must be contiguous", w, g, m, [*v[:2], v[2].t().contiguous().t(), *v[3:]])
    refused(r"gradients\[1\] must be a float", w, [g[0], g[1].long(), *g[2:]], m, v)
    refused(r"places must hold 6", places=[(0, 0)])
    refused(r"places\[1\] must be a number and a multiple", places=[(0, 0), (1, 7), *[(2, 0)] * 4])


@pytest.mark.interpret
def test_under_the_interpreter() -> None:
    script = Path(__file__).parent / "kernels_interpret_adamw.py"
    done = subprocess.run([sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
