"""Perception Calibration and the group advantage, from the rewards of all agents at once.

For agent i of m, on one question and stage, with the peers' group statistics (arXiv 2509.26306):

    R̄ = R + Σ over l ≠ i of clip((R − avg_l) / (max_l − min_l), −1/(m−1), 1/(m−1))       calibrate = reward
    Â = (R̄ − mean) / (std + eps)   grpo,      R̄ − mean   dr_grpo,      R̄ − mean of the others   rloo

Where max_l = min_l the term is its limit, sign(R − max_l)/(m−1). `calibrate="advantage"` leaves R̄ = R and adds
calibrate_weight times the same sum to Â, which, unlike the paper's form, also acts on two-valued rewards: there R̄ is
an affine function of R within a group, and the division by std takes it out again.

    calibrated_advantage(torch.tensor([[[1.0, 0, 0, 0]], [[1.0, 1, 1, 0]]]))   # two agents, one question, four samples
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from ilr_kernels import reference
from ilr_kernels.backend import uses_triton
from torch import Tensor

CALIBRATE = ("reward", "advantage", "none")
NORMALIZE = ("grpo", "dr_grpo", "rloo")
Mask = tuple[torch.Size, torch.dtype, torch.device]


def calibrated_advantage(
    rewards_MQG: Tensor,
    mask_MQG: Tensor | None = None,
    *,
    calibrate: str = "reward",
    calibrate_weight: float = 1.0,
    normalize: str = "grpo",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Calibrated rewards and advantages of M agents, Q question-stages and G samples, each (agent, question) a group.

    rewards_MQG [M, Q, G] is any float dtype; mask_MQG (bool, same shape) is false where a sample is missing, so groups
    may differ in size; what stands there in the rewards is never read into a result. Returns (calibrated_MQG,
    advantage_MQG) in float32, zeros where masked. A group of one has advantage 0, and so, exactly, has a group of equal
    rewards (plus the calibration where `calibrate="advantage"`). A peer without a sample adds nothing; m = 1: R̄ = R.
    Calculated in float64 on the CPU; in float32 in one launch on a GPU, where nothing waits and a CUDA graph can be
    captured after a first call. Raises ValueError naming the argument.
    """
    if torch.compiler.is_compiling():
        return _outside_graph(rewards_MQG, mask_MQG, calibrate, calibrate_weight, normalize, eps)
    mask = None if mask_MQG is None else (mask_MQG.shape, mask_MQG.dtype, mask_MQG.device)
    kernel = _prepared(rewards_MQG.shape, rewards_MQG.dtype, rewards_MQG.device, mask, calibrate, normalize, eps)
    if kernel is not None:
        return kernel(rewards_MQG, mask_MQG, calibrate_weight, eps)
    calibrated_MQG, advantage_MQG = reference.calibrated_advantage(
        rewards_MQG.detach().double(),
        mask_MQG,
        calibrate=calibrate,
        calibrate_weight=calibrate_weight,
        normalize=normalize,
        eps=eps,
    )
    return calibrated_MQG.float(), advantage_MQG.float()


@torch.compiler.disable
def _outside_graph(
    rewards_MQG: Tensor, mask_MQG: Tensor | None, calibrate: str, calibrate_weight: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    options = {"calibrate_weight": calibrate_weight, "normalize": normalize, "eps": eps}
    return calibrated_advantage(rewards_MQG, mask_MQG, calibrate=calibrate, **options)  # type: ignore[arg-type]


@lru_cache
def _prepared(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    mask: Mask | None,
    calibrate: str,
    normalize: str,
    eps: float,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The launch on a GPU, None elsewhere; kept, since on a GPU a call costs little more than this would."""
    _check(shape, dtype, device, mask, calibrate, normalize, eps)
    if not uses_triton(torch.empty(0, dtype=dtype, device=device)):
        return None
    from ilr_kernels.advantage_triton import Advantage

    return Advantage(shape, device, calibrate, normalize)


def _check(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    mask: Mask | None,
    calibrate: str,
    normalize: str,
    eps: float,
) -> None:
    if len(shape) != 3 or 0 in shape[::2]:
        raise ValueError(f"rewards_MQG must be (agents, questions, samples), not {tuple(shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"rewards_MQG must be a float tensor, not {dtype}")
    if mask is not None:
        if mask[0] != shape or mask[1] != torch.bool:
            raise ValueError(f"mask_MQG must be bool and {tuple(shape)}, not {mask[1]} {tuple(mask[0])}")
        if mask[2] != device:
            raise ValueError(f"mask_MQG is on {mask[2]}, rewards_MQG on {device}")
    if calibrate not in CALIBRATE:
        raise ValueError(f"calibrate must be one of {', '.join(CALIBRATE)}, not {calibrate!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, not {normalize!r}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")
