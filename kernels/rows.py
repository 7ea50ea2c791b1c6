"""Some of the rows: which they are, taking them out, and putting results back in their places."""

from __future__ import annotations

import torch
from ilr_kernels.backend import on_device
from ilr_kernels.lm_head_checks import IGNORED
from torch import Tensor


def needed_rows(target_T: Tensor, factors: tuple[Tensor, ...], vocabulary: int) -> Tensor | None:
    """The rows whose target is not ignored and none of whose factors is 0; None where that is all of them.

    The one place that waits for a GPU, which has looked at everything in one launch by then. A target outside the
    vocabulary raises ValueError.
    """
    outside, needed = _counts(target_T, factors, vocabulary)
    if outside > 0:
        outside_T = ((target_T < 0) | (target_T >= vocabulary)) & (target_T != IGNORED)
        row = int(outside_T.nonzero()[0])
        raise ValueError(
            f"target_T[{row}] = {int(target_T[row])} is outside the vocabulary of {vocabulary} (ignored: {IGNORED})"
        )
    if needed == len(target_T):
        return None
    return torch.nonzero_static(counted(target_T, factors), size=needed)[:, 0]


def counted(target_T: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Whether a row's target is not ignored and none of its factors is 0."""
    counted_T = target_T != IGNORED
    for factor_T in factors:
        counted_T &= factor_T != 0
    return counted_T


def _counts(target_T: Tensor, factors: tuple[Tensor, ...], vocabulary: int) -> tuple[int, int]:
    """How many targets lie outside the vocabulary, and how many rows are needed."""
    if not target_T.is_cuda:
        outside_T = ((target_T < 0) | (target_T >= vocabulary)) & (target_T != IGNORED)
        return int(outside_T.sum()), int(counted(target_T, factors).sum())
    from ilr_kernels.rows_kernel import count_kernel

    counts = target_T.new_empty(2)
    first, second = (*factors, None, None)[:2]
    with on_device(target_T):
        count_kernel[(1,)](
            target_T.contiguous(),
            None if first is None else first.contiguous(),
            None if second is None else second.contiguous(),
            counts,
            len(target_T),
            vocabulary,
            IGNORED=IGNORED,
            BLOCK=4096,
            num_warps=16,
        )
    outside, needed = counts.tolist()
    return outside, needed


def take(x_T: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of x; None: all."""
    return x_T if rows is None else x_T[rows]


def put(x_N: Tensor, rows: Tensor | None, tokens: int, fill: float) -> Tensor:
    """Rows back in their places, `fill` elsewhere."""
    if rows is None:
        return x_N
    return x_N.new_full((tokens, *x_N.shape[1:]), fill).index_copy_(0, rows, x_N)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which nothing may wait for the GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
