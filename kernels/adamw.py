"""AdamW in place on 16-bit weights, without float32 copies: the update is rounded stochastically.

    g ← scale · g     m ← m + (1 − β1)(g − m)     v ← v + (1 − β2)(g² − v)          (Loshchilov and Hutter, 2019)
    w ← round(w (1 − lr · decay) − lr · m / (1 − β1^t) / (√(v / (1 − β2^t)) + eps))

An update of 1e-6 is lost in a bfloat16 weight of 0.02, whose neighbours lie 1.2e-4 away, if it is rounded to the
nearest. Rounded up with a probability that equals the share of the way to the upper neighbour, the weight moves rarely
but by the right amount on average (Gupta et al., 2015). That saves the 4 bytes a parameter of a float32 copy, and with
`state_dtype` bfloat16 4 of the 8 bytes of the moments, which are rounded the same way.

    adamw_step_(weights, gradients, means, squares, lr=1e-6, step=1, seed=0)

Tensors may also be parts of larger ones, by `places`: a step part by part gives the bits of one step of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from ilr_kernels.backend import uses_triton
from torch import Tensor

CHUNK = 2**18  # elements worked on at once on the CPU, with random numbers of their own; parts begin at multiples of it
TENSOR = 2**40  # a tensor has fewer elements
WEIGHTS = (torch.float32, torch.bfloat16)


@torch.no_grad()
def adamw_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    lr: float,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    stochastic: bool = True,
    places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """One AdamW step of every tensor in `weights`, which with `means` and `squares` is overwritten.

    The four sequences have equal lengths, and their tensors equal shapes place by place; all are contiguous and on one
    device. Weights, means and squares are float32 or bfloat16 (each sequence of one dtype or mixed), gradients any
    float dtype. `step` counts from 1; gradients are multiplied with `scale` as they are read. bfloat16 results are
    rounded stochastically by random numbers that depend on `seed`, the tensor's number and the element alone (another
    `seed` for every step), or to the nearest without `stochastic`. `places` gives each tensor's number, by default its
    place in the sequences, and its first element, a multiple of CHUNK, where it is a part of a flattened tensor. On a
    GPU one launch for each combination of dtypes. Raises ValueError naming the argument.
    """
    places = places if places is not None else [(number, 0) for number in range(len(weights))]
    _check(weights, gradients, means, squares, step, lr)
    _check_places(places, len(weights))
    constants = (lr, beta1, beta2, eps, weight_decay, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), scale)
    if not weights:
        return
    if uses_triton(weights[0]):
        from ilr_kernels.adamw_triton import launch

        launch(weights, gradients, means, squares, constants, seed, stochastic, places)
        return
    generator = torch.Generator()
    for tensors, (number, first) in zip(zip(weights, gradients, means, squares, strict=True), places, strict=True):
        weight, gradient, mean, square = (x.view(-1) for x in tensors)
        for start in range(0, weight.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            rounds = generator.manual_seed(_mixed(seed, number, first + start)) if stochastic else None
            _step_of(weight[piece], gradient[piece], mean[piece], square[piece], constants, rounds)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 x [any shape] on the CPU → bfloat16, one of its two neighbours, with mean x; inf and NaN stay."""
    bits = x.contiguous().view(torch.int32)
    up = bits + torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32)
    beyond = (up & 0x7F800000) == 0x7F800000
    rounded = (torch.where(beyond, bits, up) & -(2**16)).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def _step_of(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    constants: tuple[float, ...],
    generator: torch.Generator | None,
) -> None:
    """The step of a flat piece on the CPU."""
    lr, beta1, beta2, eps, weight_decay, correction1, correction2, scale = constants
    g, m, v, w = (x.float() for x in (gradient, mean, square, weight))
    g = g * scale
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    w = w - lr * weight_decay * w
    w = w - lr * correction1 * m / (v.sqrt() * correction2 + eps)
    for target, value in ((weight, w), (mean, m), (square, v)):
        rounds = generator is not None and target.dtype == torch.bfloat16
        target.copy_(round_stochastically(value, generator) if rounds and generator is not None else value)


def _mixed(seed: int, number: int, element: int) -> int:
    """A seed in [0, 2^63) for the elements from `element` on of a tensor (Steele, Lea and Flood's finalizer, 2014)."""
    x = (seed + 0x9E3779B97F4A7C15 * (1 + number * TENSOR + element)) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def _check_places(places: Sequence[tuple[int, int]], tensors: int) -> None:
    if len(places) != tensors:
        raise ValueError(f"places must hold {tensors} pairs, one for each of weights, not {len(places)}")
    for i, (number, first) in enumerate(places):
        if not 0 <= number < 2**23 or not 0 <= first < TENSOR or first % CHUNK:
            raise ValueError(f"places[{i}] must be a number and a multiple of {CHUNK}, not {(number, first)}")


def _check(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: int,
    lr: float,
) -> None:
    if step < 1:
        raise ValueError(f"step must count from 1, not {step}")
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be finite and not negative, not {lr}")
    for name, tensors in (("gradients", gradients), ("means", means), ("squares", squares)):
        if len(tensors) != len(weights):
            raise ValueError(f"{name} must hold {len(weights)} tensors, one for each of weights, not {len(tensors)}")
    device = weights[0].device if weights else None
    for i, four in enumerate(zip(weights, gradients, means, squares, strict=True)):
        weight, gradient, mean, square = four
        shape = weight.shape
        if (
            not (gradient.shape == shape == mean.shape == square.shape)
            or not (weight.dtype in WEIGHTS and mean.dtype in WEIGHTS and square.dtype in WEIGHTS)
            or not gradient.dtype.is_floating_point
            or not (weight.is_contiguous() and gradient.is_contiguous())
            or not (mean.is_contiguous() and square.is_contiguous())
            or not (weight.device == gradient.device == mean.device == square.device == device)
        ):
            _name_mistake(i, four, weights[0].device)


def _name_mistake(i: int, four: tuple[Tensor, ...], device: torch.device) -> None:
    """ValueError about the i-th weight, gradient, mean and square."""
    for name, x in zip(("weights", "gradients", "means", "squares"), four, strict=True):
        if x.shape != four[0].shape or x.device != device:
            raise ValueError(
                f"{name}[{i}] must be {tuple(four[0].shape)} on {device}, not {tuple(x.shape)} on {x.device}"
            )
        if not x.is_contiguous():
            raise ValueError(f"{name}[{i}] must be contiguous")
        if name == "gradients" and not x.is_floating_point():
            raise ValueError(f"gradients[{i}] must be a float tensor, not {x.dtype}")
        if name != "gradients" and x.dtype not in WEIGHTS:
            raise ValueError(f"{name}[{i}] must be float32 or bfloat16, not {x.dtype}")
