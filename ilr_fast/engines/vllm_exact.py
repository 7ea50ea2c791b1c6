"""vLLM so that a token has the same bits whatever shares its batch, decoded or in a prompt, cached or not.

Its batch-invariant mode is most of it: products in tiles that do not depend on the number of rows, attention in one
split. Two things are added here: the residual goes into a norm before the kernel does, and for heads of another width
than 128 attention is Triton's. The mode replaces operators of the whole process, the trainer's too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ilr_fast.errors import UserError

SEEN = (0, 25)  # releases of vLLM whose batch-invariant mode was seen to be enough


def check_exact(model: Any, device: torch.device, where: str) -> None:
    """UserError where it is not known that vLLM's kernels give every token the same bits in any batch."""
    place = f"{where}.engine.exact"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        what = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise UserError(f"no exact engine on {what}", place, "use a GPU of compute capability 9.0, or leave it out")
    if model.dtype != torch.bfloat16:
        raise UserError(f"no exact engine in {model.dtype}", place, "use `dtype: bfloat16`, or leave it out")
    found = Version(metadata.version("vllm"))
    if found.release[:2] != SEEN:
        raise UserError(f"no exact engine with vLLM {found}", place, "install vllm==0.25.1, or leave it out")
    if "vllm" in sys.modules and os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        raise UserError("vLLM is in this process already, and not exact", place, "set `host: process`")


def exact_arguments(model: Any) -> dict[str, Any]:
    """Arguments of vLLM's engine for `model`; its norms are exact from then on.

    FlashAttention 3 tiles the keys of heads of 64 otherwise for one query than for many.
    """
    _one_norm_for_any_batch()
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention_backend": "FLASH_ATTN" if width == 128 else "TRITON_ATTN"}


def _one_norm_for_any_batch() -> None:
    """The residual is added before vLLM's batch-invariant norm: its fused kernel sums otherwise below 256 tokens."""
    from vllm.model_executor.layers import layernorm

    norm = layernorm.rms_norm_batch_invariant
    if isinstance(norm, _AddThenNorm):
        return
    layernorm.rms_norm_batch_invariant = _AddThenNorm(norm)


class _AddThenNorm:
    """vLLM's `rms_norm_batch_invariant`, without its fused kernel."""

    def __init__(self, norm: Callable[..., Tensor]):
        self._norm = norm

    def __call__(self, x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self._norm(x, weight, eps)
        total = x + residual
        return self._norm(total, weight, eps), total
