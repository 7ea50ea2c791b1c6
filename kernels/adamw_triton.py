"""Launches AdamW over many tensors: one launch for each combination of dtypes, fed by a table of addresses.

Which program works on which tensor depends on their sizes alone and is kept; the addresses travel anew at every step,
since gradients are allocated anew. Hundreds of tensors are looked at between two steps: the host's time counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from ilr_kernels.adamw import TENSOR
from ilr_kernels.adamw_kernel import adamw_kernel
from ilr_kernels.backend import on_device
from ilr_kernels.launch import launch as launch_kernel
from torch import Tensor

BLOCK, WARPS = 2048, 8
UNIT = 16  # elements
Four = tuple[Tensor, Tensor, Tensor, Tensor]  # a weight, its gradient and its moments


class _Group(NamedTuple):
    """Tensors of one combination of dtypes."""

    first: Four
    columns: list[tuple[int, ...]]  # of each: four addresses, the number of elements, its place in the random numbers
    copies: list[Tensor]  # of gradients that did not start at a multiple of 16 bytes


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
    groups: dict[tuple, _Group] = {}
    for four, (number, first) in zip(zip(weights, gradients, means, squares, strict=True), places, strict=True):
        weight, gradient, mean, square = four
        size = weight.numel()
        if size == 0:
            continue
        addresses = w, g, m, v = weight.data_ptr(), gradient.data_ptr(), mean.data_ptr(), square.data_ptr()
        copied = (w | g | m | v) % 16 != 0
        if copied:
            four = weight, gradient, mean, square = _aligned(four)
            addresses = weight.data_ptr(), gradient.data_ptr(), mean.data_ptr(), square.data_ptr()
        kind = (size % UNIT == 0, weight.dtype, gradient.dtype, mean.dtype, square.dtype)
        group = groups.get(kind)
        if group is None:
            group = groups[kind] = _Group(four, [], [])
        group.columns.append((*addresses, size, number * TENSOR + first))
        if copied:
            group.copies.append(gradient)
    for kind, group in groups.items():
        _launch(group, constants, seed & (2**62 - 1), stochastic, UNIT if kind[0] else 1)


def _aligned(four: Four) -> Four:
    """The kernel counts in 16 bytes; a gradient that does not start at such a place is copied, others are refused."""
    weight, gradient, mean, square = four
    for name, x in (("weights", weight), ("means", mean), ("squares", square)):
        if x.data_ptr() % 16 != 0:
            raise ValueError(f"{name} must start at a multiple of 16 bytes (a view of shape {tuple(x.shape)} does not)")
    return weight, gradient.clone() if gradient.data_ptr() % 16 else gradient, mean, square


def _launch(group: _Group, constants: tuple[float, ...], seed: int, stochastic: bool, unit: int) -> None:
    device = group.first[0].device
    *addresses, sizes, origins = zip(*group.columns, strict=True)
    programs, tensor_P, first_N = _schedule(sizes, device)
    rows = [[(address - places[0]) // 16 for address in places] for places in addresses]
    rows += [[size // unit for size in sizes], list(origins)]
    table = torch.frombuffer(array("q", [x for row in rows for x in row]), dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    with on_device(group.first[0]):
        arguments = (table, tensor_P, first_N, *group.first, len(sizes), *constants, seed)
        options = {"num_warps": WARPS, "enable_fp_fusion": True}
        launch_kernel(adamw_kernel, (programs,), arguments, (stochastic, unit, BLOCK), **options)


@cache
def _schedule(sizes: tuple[int, ...], device: torch.device) -> tuple[int, Tensor, Tensor]:
    """(programs, the tensor of each program, the first program of each tensor)."""
    programs_N = torch.tensor([-(-size // BLOCK) for size in sizes])
    tensor_P = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs_N)
    first_N = (programs_N.cumsum(0) - programs_N).to(torch.int32)
    return len(tensor_P), tensor_P.to(device), first_N.to(device)
