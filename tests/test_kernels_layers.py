"""Kernels of fused layers against float64: norms, gated units, rotary embeddings; on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ilr_kernels.gated import gated, gated_backward_
from ilr_kernels.norm import add_norm_forward, norm_backward, norm_forward, rms_norm
from ilr_kernels.rotary import rotary, rotate_by_table, rotated_split
from ilr_kernels.row_sums import add_rows
from torch import Tensor

BOTH = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")])]  # fmt: skip
SIZES = [(1, 64), (7, 100), (70, 1536), (5, 3, 24), (300, 2, 8)]
DTYPES = (torch.float32, torch.bfloat16)


def near(found: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within some roundings of the dtype, relative to the largest."""
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 4e-6
    error = (found.detach().cpu().double() - exact.detach().cpu()).abs().max() / exact.abs().max()
    assert error < roundings * step, float(error)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_norm(device: str, size: tuple[int, ...], one_plus: bool) -> None:
    check_norm(device, size, one_plus)


def check_norm(device: str, size: tuple[int, ...], one_plus: bool) -> None:
    for dtype in DTYPES:
        x, dy = (normal(*size, dtype=dtype, device=device, seed=i) for i in (0, 1))
        w = normal(size[-1], dtype=dtype, device=device, seed=2)
        results = []
        for which in (dtype, torch.float64):
            a, b = (v.detach().to(which, copy=True).requires_grad_() for v in (x, w))
            rows = torch.cat([a, a[:, :1]], 1)[:, : size[1]] if len(size) == 3 else a  # part of a wider matrix
            y = rms_norm(rows, b, 1e-6, one_plus=one_plus)
            y.backward(dy.to(which))
            results.append((y, a.grad, b.grad))
        for found, exact in zip(*results, strict=True):
            near(found, exact.cpu(), dtype, 2)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(device: str, activation: str) -> None:
    check_gated(device, activation)


def check_gated(device: str, activation: str) -> None:
    for dtype in DTYPES:
        for rows, size in ((1, 16), (5, 1100), (33, 96)):
            both = 3 * normal(rows, 2 * size, dtype=dtype, device=device)
            dout = normal(rows, size, dtype=dtype, device=device, seed=1)
            wide, wide_dout = both.double().cpu(), dout.double().cpu()
            exact = gated(*wide.chunk(2, -1), activation)
            near(gated(*both.chunk(2, -1), activation), exact, dtype, 2)
            gated_backward_(*both.chunk(2, -1), dout, activation)
            gated_backward_(*wide.chunk(2, -1), wide_dout, activation)
            for found, truth in ((both, wide), (dout, wide_dout)):
                near(found, truth, dtype, 2)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("size", [8, 24, 128])
def test_rotary(device: str, size: int) -> None:
    check_rotary(device, size)


def check_rotary(device: str, size: int) -> None:
    for dtype in DTYPES:
        both = normal(9, 5, size, dtype=dtype, device=device)
        cos, sin = (normal(9, size, dtype=dtype, device=device, seed=i) for i in (1, 2))
        dq, dk = normal(9, 3, size, dtype=dtype, device=device, seed=3), normal(9, 1, size, dtype=dtype, device=device)
        results = []
        for which in (dtype, torch.float64):
            x = both.detach().to(which, copy=True).requires_grad_()
            q, k = rotary(x[:, :3], x[:, 3:4], cos.to(which), sin.to(which))
            strided = dq.to(which).transpose(0, 1).contiguous().transpose(0, 1)  # as SDPA's backward hands it over
            torch.autograd.backward((q, k, x[:, 4:]), (strided, dk.to(which), dk.to(which)))
            results.append((q, k, x.grad))
        for found, exact in zip(*results, strict=True):
            near(found, exact.cpu(), dtype, 2)
        x = both.detach().clone().requires_grad_()
        q, k, v = rotated_split((x + 0).flatten(1), cos, sin, heads=3, key_heads=1)
        torch.autograd.backward((q, k, v), (dq, dk, dk))
        results[0] = (q, k, x.grad)  # as good as copies
        for found, exact in zip(*results, strict=True):
            near(found, exact.cpu(), dtype, 2)
        results[0] = (*rotary(both[:, :3], both[:, 3:4], cos, sin), x.grad)
        for found, exact in zip(*results, strict=True):
            near(found, exact.cpu(), dtype, 2)


@pytest.mark.parametrize("device", BOTH)
def test_row_sums(device: str) -> None:
    check_row_sums(device)


def check_row_sums(device: str) -> None:
    rows_N = torch.tensor([0, 1, 2, 0, 1, 3, 0, 4])
    places_N, starts_T = rows_N.argsort(stable=True).int(), torch.tensor([0, 3, 5, 6, 7, 8]).int()
    for dtype in DTYPES:
        one, two = (normal(8, 48, dtype=dtype, device=device, seed=i) for i in (0, 1))
        outs = one.new_empty(5, 48), torch.full((5, 96), float("nan"), dtype=dtype, device=device)[:, :48]
        add_rows(one, two, starts_T.to(device), places_N.to(device), *outs)
        for x, out in ((one, outs[0]), (two, outs[1])):
            exact = torch.zeros(5, 48, dtype=torch.float64).index_add_(0, rows_N, x.double().cpu())
            near(out, exact, dtype)


@pytest.mark.parametrize("device", BOTH)
def test_norm_backward_adds_and_makes_its_output_again(device: str) -> None:
    check_norm_backward(device)


def check_norm_backward(device: str) -> None:
    for dtype in DTYPES:
        x, dy, add = (normal(37, 100, dtype=dtype, device=device, seed=i) for i in range(3))
        w = normal(100, dtype=dtype, device=device, seed=3)
        found = norm_backward(x, w, dy, 1e-6, False, add=add, output=True)
        exact = norm_backward(*(v.double().cpu() for v in (x, w, dy)), 1e-6, False, add=add.double().cpu())
        assert found.y is not None and torch.equal(found.y, norm_forward(x, w, 1e-6, False))
        near(found.dx, exact.dx, dtype, 2)


@pytest.mark.parametrize("device", BOTH)
def test_what_an_exact_engine_computes_is_what_the_trainer_does(device: str) -> None:
    check_bits(device)


def check_bits(device: str) -> None:
    """The same bits: a norm of a sum and one of the sum, RoPE by a table, any rows alone or among others."""
    for dtype in DTYPES:
        for size in (100, 1536):
            x, add = (normal(37, size, dtype=dtype, device=device, seed=i) for i in (0, 1))
            w = normal(size, dtype=dtype, device=device, seed=2)
            y, total = add_norm_forward(x, add, w, 1e-6, False)
            near(total, x.double() + add.double(), dtype)  # the interpreter cuts off where a GPU rounds
            assert device == "cpu" or torch.equal(total, x + add)
            assert torch.equal(y, norm_forward(total, w, 1e-6, False))
            for rows in (1, 7):
                some = add_norm_forward(x[-rows:], add[-rows:], w, 1e-6, False)
                assert torch.equal(some[0], y[-rows:]) and torch.equal(some[1], total[-rows:])
        q, k = normal(9, 3, 24, dtype=dtype, device=device), normal(9, 1, 24, dtype=dtype, device=device, seed=1)
        table, positions_T = normal(50, 24, dtype=dtype, device=device, seed=2), torch.arange(49, 40, -1, device=device)
        cos, sin = (x[positions_T].repeat(1, 2) for x in table.chunk(2, -1))
        wanted = rotary(q, k, cos, sin)
        rotate_by_table(q, k, table, positions_T)
        assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="weight_D"):
        rms_norm(x, torch.zeros(3), 1e-6)
    with pytest.raises(ValueError, match="activation"):
        gated(x, x, "relu")
    with pytest.raises(ValueError, match="gate_TF"):
        gated(x, x[:, :2], "silu")
    with pytest.raises(ValueError, match="even"):
        rotary(x[None, :, :3], x[None, :, :3], x[:, :3], x[:, :3])


@pytest.mark.interpret
def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "kernels_interpret_layers.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600)
    assert "all agree" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
