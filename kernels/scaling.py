"""Multiplies tensors by factors on a GPU: a whole one by a scalar, rows by theirs; and sums rows so multiplied."""

from __future__ import annotations

import torch
import triton
from ilr_kernels import scaling_kernel as kernels
from ilr_kernels.backend import on_device
from ilr_kernels.launch import launch
from torch import Tensor


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in place, for a contiguous x and a scalar on the same GPU; a factor of 1 costs a look at it."""
    programs = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count
    with on_device(x):
        grid = (min(programs, -(-x.numel() // 4096)),)
        launch(kernels.scale_kernel, grid, (x, factor, x.numel()), (programs, 4096), num_warps=8)
    return x


def scale_rows(x_CD: Tensor, factor_C: Tensor, out: Tensor) -> Tensor:
    """out ← factor · x, row by row, rounded once; rows of x may be strided, those of `out` are not."""
    if not x_CD.is_cuda:  # the interpreter rounds to bfloat16 towards zero
        return torch.mul(x_CD, factor_C[:, None], out=out)
    rows, depth = x_CD.shape
    block = min(2048, triton.next_power_of_2(depth))
    arguments = (x_CD, factor_C, out, depth, x_CD.stride(0))
    launch(kernels.scale_rows_kernel, (rows, -(-depth // 2048)), arguments, (block,), num_warps=4)
    return out


def add_scaled_rows(x_CV: Tensor, factor_C: Tensor, total_V: Tensor) -> None:
    """total += Σ over rows of factor · x, always in the same order."""
    rows, columns = x_CV.shape
    arguments = (x_CV, factor_C, total_V, rows, columns, x_CV.stride(0))
    launch(kernels.add_scaled_rows_kernel, (-(-columns // 256),), arguments, (32, 256), num_warps=4)
