"""The LM head functions on numbers, sizes and layouts of a real scale: fused against float64 truth, with gradients.

Small sizes on the CPU, real ones on a GPU (`pytest -m gpu tests/test_kernels_scale.py`).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from kernels_cases import compare, poisoned
from torch import Tensor

FUSED, REFERENCE = (linear_logprob, linear_policy_loss), (reference.linear_logprob, reference.linear_policy_loss)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SPECIAL = 2  # the token whose logit `make` chooses


def make(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) of rows whose distributions are of one kind.

    large: logits to ±80 and beyond. uniform: within a hundredth. confident: the target's probability is 1 − 1e-6.
    improbable: the target's log-prob is about −150, so that exp(x − x_target) is beyond float32.
    """
    n, d, v = shape
    g = torch.Generator(device).manual_seed(n + d + v)
    hidden = torch.randn(n, d, generator=g, device=device)
    weight = torch.randn(v, d, generator=g, device=device).div_(d**0.5)
    target = torch.randint(v, (n,), generator=g, device=device)
    if kind == "large":
        weight *= 20
    elif kind == "uniform":
        hidden /= 1024
    else:  # the special token's logit is hidden[0] · weight[SPECIAL, 0], of which the others know nothing
        others = math.log(v) + 0.5  # logsumexp of standard normal logits
        weight[:, 0], weight[SPECIAL] = 0, 0
        weight[SPECIAL, 0] = others + 6 * math.log(10)
        hidden[:, 0] = 1
        if kind == "confident":
            target[:] = SPECIAL
        else:
            hidden[:, 0] = 150 / weight[SPECIAL, 0]
            target = torch.where(target == SPECIAL, SPECIAL - 1, target)
    return hidden.to(dtype), weight.to(dtype), target


def results(
    functions: Any, dtype: torch.dtype, hidden: Tensor, weight: Tensor, target: Tensor, up: Tensor, **more: Any
) -> dict[str, Tensor]:
    """What both functions find and every gradient, by name, in the layout that is given."""
    logprob, policy_loss = functions
    leaves = [(x if x.dtype == dtype else x.to(dtype)).detach().requires_grad_() for x in (hidden, weight)]
    logp, entropy = logprob(*leaves, target, with_entropy=True, **more)
    from_logp = torch.autograd.grad((logp * up[0] + entropy * up[1]).sum(), leaves)
    value, stats = policy_loss(*leaves, target, up[2], up[0].abs(), **more)
    from_loss = torch.autograd.grad(value, leaves)
    found = {"logp": logp.detach(), "entropy": entropy.detach(), "loss_logp": stats["logp_T"]}
    found |= {"dhidden": from_logp[0], "dweight": from_logp[1], "loss_dhidden": from_loss[0]}
    return found | {"loss_dweight": from_loss[1], "value": value.detach() / float(up[0].abs().sum())}


def check(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", layout=None, **more: Any):
    """Fused against truth, under random upstream gradients that bring a confident row's gradients to the scale of 1."""
    hidden, weight, target = make(kind, shape, dtype, device)
    up = torch.randn(3, shape[0], generator=torch.Generator(device).manual_seed(1), device=device)
    up[0] *= 1e6 if kind == "confident" else 1
    truth = results(REFERENCE, torch.float64, hidden, weight, target, up, **more)
    plain = results(REFERENCE, dtype, hidden, weight, target, up, **more)
    if layout is not None:
        strided = layout(hidden, weight)
        assert torch.equal(strided[0], hidden) and torch.equal(strided[1], weight)
        assert not (strided[0].is_contiguous() and strided[1].is_contiguous())
        hidden, weight = strided
    with poisoned():
        fused = results(FUSED, dtype, hidden, weight, target, up, **more)
    compare(truth, plain, fused, dtype, f"{kind} {shape} {dtype} {more}")
    if kind == "confident":
        assert (truth["logp"] > -1e-5).all() and (truth["logp"] < -1e-8).all(), "not the case that was meant"
    if kind == "improbable":
        assert (truth["logp"] < -120).all(), "not the case that was meant"


def wider(x: Tensor, left: int, right: int) -> Tensor:
    """The same values as columns of a wider tensor, whose other columns are NaN."""
    out = x.new_full((len(x), left + x.shape[1] + right), float("nan"))
    out[:, left : left + x.shape[1]] = x
    return out[:, left : left + x.shape[1]]


def every_second(x: Tensor) -> Tensor:
    """The same values as every second row of a longer tensor."""
    return x.repeat_interleave(2, 0)[::2]


LAYOUTS = {
    "hidden in a wider tensor": lambda h, w: (wider(h, 8, 16), w),
    "hidden off alignment": lambda h, w: (wider(h, 3, 2), w),
    "hidden transposed": lambda h, w: (h.t().contiguous().t(), w),
    "hidden of every second position": lambda h, w: (every_second(h), w),
    "weight in a wider tensor": lambda h, w: (h, wider(w, 16, 8)),
    "weight off alignment": lambda h, w: (h, wider(w, 1, 0)),
    "weight transposed": lambda h, w: (h, w.t().contiguous().t()),
    "weight of every second row": lambda h, w: (h, every_second(w)),
    "both": lambda h, w: (wider(h, 8, 8), wider(w, 8, 8)),
}
KINDS = ("large", "uniform", "confident", "improbable")

# rows, hidden size, vocabulary: one row and very many; hidden sizes off 8; vocabularies off 64
SMALL = [
    (1, 64, 32000), (5, 100, 50257), (3, 33, 151937), (2, 64, 262144), (3, 8192, 1003), (1, 896, 5003),
    (131072, 64, 40),
]  # fmt: skip
LARGE = [
    (2049, 4096, 32000), (1025, 2048, 50257), (515, 896, 151937), (257, 640, 262144), (64, 8192, 128256),
    (1, 4096, 151936), (131072, 64, 1000), (8192, 128, 50257), (300, 100, 50257), (300, 33, 5003),
]  # fmt: skip


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_sizes(shape):
    for dtype in DTYPES if shape[0] * shape[2] < 2**19 else (torch.bfloat16,):
        check("large", shape, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions(kind):
    for dtype in DTYPES:
        check(kind, (6, 64, 32003), dtype)
        check(kind, (9, 24, 50), dtype, temperature=0.9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    for dtype in DTYPES:
        check("large", (21, 24, 133), dtype, layout=LAYOUTS[name])


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")(test))


@gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_sizes_on_a_gpu(shape):
    for dtype in DTYPES if shape[0] * shape[2] < 2**27 else (torch.bfloat16,):
        check("large", shape, dtype, "cuda")


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_distributions_on_a_gpu(kind):
    for dtype in DTYPES:
        check(kind, (130, 512, 50257), dtype, "cuda")
        check(kind, (333, 64, 262144), dtype, "cuda")
        check(kind, (9, 24, 50), dtype, "cuda", temperature=0.9, softcap=400.0)


@gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_on_a_gpu(name):
    for dtype in DTYPES:
        check("large", (200, 128, 5003), dtype, "cuda", layout=LAYOUTS[name])
        check("large", (33, 100, 1000), dtype, "cuda", layout=LAYOUTS[name])
