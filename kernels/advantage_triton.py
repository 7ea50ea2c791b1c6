"""Launches the advantage kernel: one program for each agent and question, one launch in all."""

from __future__ import annotations

import torch
import triton
from ilr_kernels.advantage_kernel import advantage_kernel, warps
from ilr_kernels.backend import on_device
from torch import Tensor


def launch(
    rewards_MQG: Tensor,
    mask_MQG: Tensor | None,
    calibrate: str,
    calibrate_weight: float,
    normalize: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(calibrated_MQG, advantage_MQG), float32; the arguments have been checked."""
    agents, questions, samples = rewards_MQG.shape
    rewards_MQG = rewards_MQG.detach().contiguous()
    calibrated_MQG, advantage_MQG = (torch.empty_like(rewards_MQG, dtype=torch.float32) for _ in range(2))
    if questions == 0:
        return calibrated_MQG, advantage_MQG
    block = triton.next_power_of_2(samples)
    with on_device(rewards_MQG):
        advantage_kernel[(questions, agents)](
            rewards_MQG,
            None if mask_MQG is None else mask_MQG.contiguous().view(torch.uint8),
            calibrated_MQG,
            advantage_MQG,
            agents,
            questions,
            samples,
            float(calibrate_weight),
            float(eps),
            CALIBRATE=calibrate,
            NORMALIZE=normalize,
            BLOCK_G=block,
            num_warps=warps(block),
            enable_fp_fusion=True,
        )
    return calibrated_MQG, advantage_MQG
