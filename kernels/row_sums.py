"""Sums of rows by a list: the gradient of `x.index_select(0, rows_N)` for two tensors, in a fixed order.

places_N = rows_N.argsort(stable=True)                              # as int32
starts_T = F.pad(rows_N.bincount(minlength=T).cumsum(0), (1, 0))    # as int32
add_rows(dk_NW, dv_NW, starts_T, places_N, dk_TW, dv_TW)
"""

from __future__ import annotations

import torch
from ilr_kernels.backend import on_device, uses_triton
from torch import Tensor


def add_rows(
    one_NW: Tensor, two_NW: Tensor, starts_T: Tensor, places_N: Tensor, one_TW: Tensor, two_TW: Tensor
) -> None:
    """Fills row t of both outputs with the sum of the inputs' rows places_N[starts_T[t]:starts_T[t + 1]].

    Inputs are contiguous [N, W], outputs [T, W] with contiguous rows; starts [T + 1] and places [N] are int32, and
    places from starts_T[T] on are not read. Sums are float32, or float64 for float64. Raises ValueError for inputs that
    are not contiguous.
    """
    if not one_NW.is_contiguous() or not two_NW.is_contiguous():
        raise ValueError("one_NW and two_NW must be contiguous")
    if not uses_triton(one_NW):
        counts = starts_T.diff().long()
        row_N = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        for x, out in ((one_NW, one_TW), (two_NW, two_TW)):
            wide = torch.promote_types(x.dtype, torch.float32)
            sums = torch.zeros(out.shape, dtype=wide, device=out.device)
            out.copy_(sums.index_add_(0, row_N, x[places_N[: len(row_N)].long()].to(wide)))
        return
    from ilr_kernels.launch import launch
    from ilr_kernels.row_sums_kernel import row_sums_kernel

    width = one_NW.shape[1]
    arguments = (one_NW, two_NW, one_TW, two_TW, starts_T, places_N, one_TW.stride(0), two_TW.stride(0))
    with on_device(one_NW):
        launch(row_sums_kernel, (len(one_TW), 2), arguments, (width, 1 << (width - 1).bit_length()), num_warps=2)
