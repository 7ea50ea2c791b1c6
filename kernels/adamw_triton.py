"""Launches AdamW over many tensors: one launch for each combination of dtypes, fed by a table of addresses.

Which program works on which tensor depends on their sizes alone and is kept; the addresses travel anew at every step,
since gradients are allocated anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from ilr_kernels.adamw import TENSOR
from ilr_kernels.adamw_kernel import adamw_kernel
from ilr_kernels.backend import on_device
from torch import Tensor

BLOCK, WARPS = 2048, 8
UNIT = 16  # elements


def launch(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    constants: tuple[float, ...],
    seed: int,
    stochastic: bool,
    places: Sequence[tuple[int, int]],
) -> None:
    """The arguments have been checked."""
    kinds: dict[tuple, list[tuple[tuple[Tensor, ...], int]]] = {}
    for tensors, (number, first) in zip(zip(weights, gradients, means, squares, strict=True), places, strict=True):
        if tensors[0].numel() > 0:
            unit = UNIT if tensors[0].numel() % UNIT == 0 else 1
            origin = number * TENSOR + first
            kinds.setdefault((unit, *(x.dtype for x in tensors)), []).append((_aligned(tensors), origin))
    for kind, group in kinds.items():
        tensors_N, origins_N = zip(*group, strict=True)
        _launch(tensors_N, origins_N, constants, seed & (2**62 - 1), stochastic, kind[0])


def _aligned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel counts in 16 bytes; a gradient that does not start at such a place is copied, others are refused."""
    for name, x in zip(("weights", "means", "squares"), (tensors[0], *tensors[2:]), strict=True):
        if x.data_ptr() % 16 != 0:
            raise ValueError(f"{name} must start at a multiple of 16 bytes (a view of shape {tuple(x.shape)} does not)")
    weight, gradient, mean, square = tensors
    return weight, gradient.clone() if gradient.data_ptr() % 16 else gradient, mean, square


def _launch(
    group: Sequence[tuple[Tensor, ...]],
    origins: Sequence[int],
    constants: tuple[float, ...],
    seed: int,
    stochastic: bool,
    unit: int,
) -> None:
    device = group[0][0].device
    sizes = tuple(tensors[0].numel() for tensors in group)
    programs, tensor_P, first_N = _schedule(sizes, device)
    firsts = [x.data_ptr() for x in group[0]]
    places = [[(tensors[i].data_ptr() - firsts[i]) // 16 for tensors in group] for i in range(4)]
    table = torch.tensor([*places, [size // unit for size in sizes], list(origins)], dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    with on_device(group[0][0]):
        adamw_kernel[(programs,)](
            table,
            tensor_P,
            first_N,
            *group[0],
            len(group),
            *constants,
            seed,
            STOCHASTIC=stochastic,
            UNIT=unit,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


@cache
def _schedule(sizes: tuple[int, ...], device: torch.device) -> tuple[int, Tensor, Tensor]:
    """(programs, the tensor of each program, the first program of each tensor)."""
    programs_N = torch.tensor([-(-size // BLOCK) for size in sizes])
    tensor_P = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs_N)
    first_N = (programs_N.cumsum(0) - programs_N).to(torch.int32)
    return len(tensor_P), tensor_P.to(device), first_N.to(device)
