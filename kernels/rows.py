"""Some of the rows: taking them out, and putting results back in their places."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x_T: Tensor, rows: Tensor | None) -> Tensor:
    return x_T if rows is None else x_T[rows]


def put(x_N: Tensor, rows: Tensor | None, tokens: int, fill: float) -> Tensor:
    """Rows back in their places, `fill` elsewhere."""
    if rows is None:
        return x_N
    return x_N.new_full((tokens, *x_N.shape[1:]), fill).index_copy_(0, rows, x_N)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which nothing may wait for the GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
