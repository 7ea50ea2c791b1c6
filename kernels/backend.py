"""Which backend runs: PyTorch on the CPU, Triton on a GPU and, with TRITON_INTERPRET=1, on the CPU as well."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def uses_triton(x: Tensor) -> bool:
    """Whether tensors like `x` go to the Triton kernels (float64 never does: they calculate in float32)."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, since Triton launches on that; nothing to do on the CPU."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
