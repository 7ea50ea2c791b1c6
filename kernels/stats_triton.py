"""A loss and its statistics in one launch, where PyTorch would make some twenty (`policy_loss.sum_stats`)."""

from __future__ import annotations

from ilr_kernels.backend import on_device
from ilr_kernels.launch import launch
from ilr_kernels.policy_loss import TokenInputs, TokenLoss
from ilr_kernels.stats_kernel import stats_kernel
from torch import Tensor

SUMS = ("tokens", "entropy", "kl", "policy_tokens", "clipped", "truncated")
MEANS = ("entropy", "kl", "clip_share", "truncated_share")


def sum_losses(
    losses: TokenLoss, entropy_N: Tensor, t: TokenInputs
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(the loss, its sums, their means), 0-d float32, of float32 vectors."""
    parts = (losses.value_N, entropy_N, losses.kl_N, losses.clipped_N, losses.truncated_N)
    vectors = [x_N.contiguous() for x_N in (t.weight_N, t.advantage_N, *parts)]
    out = entropy_N.new_empty(1 + len(SUMS) + len(MEANS))
    with on_device(entropy_N):
        launch(stats_kernel, (1,), (*vectors, out, entropy_N.shape[0]), (4096,), num_warps=16)
    value, *found = out.unbind()
    sums, means = found[: len(SUMS)], found[len(SUMS) :]
    return value, dict(zip(SUMS, sums, strict=True)), dict(zip(MEANS, means, strict=True))
