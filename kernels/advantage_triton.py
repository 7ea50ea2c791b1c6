"""Launches the advantage kernel: two allocations and one launch, and as little as possible around them.

The data are small, so that a call costs what the host does.
"""

from __future__ import annotations

import torch
from ilr_kernels.advantage_kernel import advantage_kernel, tiling
from ilr_kernels.launch import Launch
from torch import Tensor


class Advantage:
    """The calibration and normalization of rewards of one shape and dtype on one device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, calibrate: str, normalize: str):
        agents, self._questions, samples = shape
        blocks, warps = tiling(agents, samples)
        grid = (-(-self._questions // blocks["BLOCK_Q"]), -(-agents // blocks["BLOCK_M"]), 1)
        constants = (agents, samples, calibrate, normalize, *blocks.values())
        self._launch = Launch(advantage_kernel, grid, constants, num_warps=warps, enable_fp_fusion=True)
        self._device = device.index

    def __call__(
        self, rewards_MQG: Tensor, mask_MQG: Tensor | None, calibrate_weight: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(calibrated_MQG, advantage_MQG), float32; the arguments have been checked."""
        if not rewards_MQG.is_contiguous():
            rewards_MQG = rewards_MQG.contiguous()
        if mask_MQG is not None and not mask_MQG.is_contiguous():
            mask_MQG = mask_MQG.contiguous()
        calibrated_MQG = torch.empty_like(rewards_MQG, dtype=torch.float32)
        advantage_MQG = torch.empty_like(calibrated_MQG)
        if self._questions > 0:
            tensors = (rewards_MQG, mask_MQG, calibrated_MQG, advantage_MQG)
            scalars = (self._questions, float(calibrate_weight), float(eps))
            if self._device is None or self._device == torch._C._cuda_getDevice():
                self._launch(self._device, tensors, scalars)
            else:
                with torch.cuda.device(self._device):
                    self._launch(self._device, tensors, scalars)
        return calibrated_MQG, advantage_MQG
