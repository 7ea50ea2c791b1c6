"""Launches the advantage kernel: one allocation and one launch, and as little as possible around them.

The data are small, so that a call costs what the host does. The compiled kernel is therefore kept and launched
directly, which saves Triton's own look-up of it by every argument.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from ilr_kernels.advantage_kernel import advantage_kernel, tiling
from ilr_kernels.backend import on_device
from torch import Tensor

_compiled: dict[tuple, Any] = {}  # by everything that the kernel was specialized on: its constants, as launched


def launch(
    rewards_MQG: Tensor,
    mask_MQG: Tensor | None,
    calibrate: str,
    calibrate_weight: float,
    normalize: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(calibrated_MQG, advantage_MQG), float32, views of one tensor; the arguments have been checked."""
    shape, device = rewards_MQG.shape, rewards_MQG.device
    calibrated_MQG, advantage_MQG = torch.empty((2, *shape), dtype=torch.float32, device=device).unbind()
    if shape[1] == 0:
        return calibrated_MQG, advantage_MQG
    if not rewards_MQG.is_contiguous():
        rewards_MQG = rewards_MQG.contiguous()
    if mask_MQG is not None and not mask_MQG.is_contiguous():
        mask_MQG = mask_MQG.contiguous()
    given = (rewards_MQG, mask_MQG, calibrated_MQG, shape[1], float(calibrate_weight), float(eps))
    key = (device, rewards_MQG.dtype, mask_MQG is None, shape[0], shape[2], calibrate, normalize)
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with on_device(rewards_MQG):
            _launch(key, given)
    else:
        _launch(key, given)
    return calibrated_MQG, advantage_MQG


def _launch(key: tuple, given: tuple) -> None:
    """Through the compiled kernel where there is one, else through Triton, which compiles it and hands it out."""
    found = _compiled.get(key)
    if found is not None:
        kernel, constants, block_q, programs_m = found
        kernel[-(-given[3] // block_q), programs_m, 1](*given, *constants)
        return
    agents, samples, calibrate, normalize = key[3:]
    blocks, warps = tiling(agents, samples)
    constants = (agents, samples, calibrate, normalize, *blocks.values())
    programs_m = triton.cdiv(agents, blocks["BLOCK_M"])
    grid = (triton.cdiv(given[3], blocks["BLOCK_Q"]), programs_m)
    kernel = advantage_kernel[grid](*given, *constants, num_warps=warps, enable_fp_fusion=True)
    if kernel is not None:  # there is none under the interpreter
        _compiled[key] = kernel, constants, blocks["BLOCK_Q"], programs_m
