"""References in plain PyTorch for every kernel function: whole logits, autograd, any dtype up to float64.

The same names and arguments as the fused functions; what only concerns how those work (`chunk`, `weight_grad_VD`, …) is
accepted and has no effect. Made to be read and to be right: ILR.md's formulas (see `docs/`) one after the other.

    loss, stats = reference.linear_policy_loss(hidden.double(), weight.double(), target, advantage, token_weight)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor


def calibrated_advantage(
    rewards_MQG: Tensor,
    mask_MQG: Tensor | None = None,
    *,
    calibrate: str = "reward",
    calibrate_weight: float = 1.0,
    normalize: str = "grpo",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Perception Calibration (arXiv 2509.26306) and the group advantage; see `advantage.calibrated_advantage`.

    Returns (calibrated_MQG, advantage_MQG) in the dtype of the rewards.
    """
    mask_MQG = torch.ones_like(rewards_MQG, dtype=torch.bool) if mask_MQG is None else mask_MQG
    reward_MQG = torch.where(mask_MQG, rewards_MQG, 0)
    calibration_MQG = _calibration(reward_MQG, mask_MQG)
    calibrated_MQG = reward_MQG + calibration_MQG if calibrate == "reward" else reward_MQG
    advantage_MQG = _normalized(calibrated_MQG, mask_MQG, normalize, eps)
    if calibrate == "advantage":
        in_group_MQG = mask_MQG & (mask_MQG.sum(-1, keepdim=True) > 1)
        advantage_MQG = advantage_MQG + torch.where(in_group_MQG, calibrate_weight * calibration_MQG, 0)
    return torch.where(mask_MQG, calibrated_MQG, 0), torch.where(mask_MQG, advantage_MQG, 0)


def _calibration(reward_MQG: Tensor, mask_MQG: Tensor) -> Tensor:
    """Σ over peers l of clip((R − avg_l) / (max_l − min_l), ±1/(m−1)); its limit sign(R − max_l)/(m−1) at max = min."""
    agents = len(reward_MQG)
    total_MQG = torch.zeros_like(reward_MQG)
    if agents == 1:
        return total_MQG
    bound = 1 / (agents - 1)
    mean_MQ, max_MQ, min_MQ = _group_statistics(reward_MQG, mask_MQG)
    for i in range(agents):
        for peer in range(agents):
            if peer == i:
                continue
            mean, high, low = (x[peer][:, None] for x in (mean_MQ, max_MQ, min_MQ))
            spread = torch.where(high > low, high - low, 1)
            share = ((reward_MQG[i] - mean) / spread).clamp(-bound, bound)
            limit = torch.sign(reward_MQG[i] - high) * bound
            term = torch.where(high > low, share, limit)
            total_MQG[i] += torch.where(mask_MQG[peer].any(-1, keepdim=True), term, 0)
    return total_MQG


def _group_statistics(x_MQG: Tensor, mask_MQG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, maximum and minimum of each group's samples (of an empty group: 0, −inf, inf)."""
    mean_MQ = torch.where(mask_MQG, x_MQG, 0).sum(-1) / mask_MQG.sum(-1).clamp(min=1)
    max_MQ = torch.where(mask_MQG, x_MQG, -torch.inf).amax(-1)
    min_MQ = torch.where(mask_MQG, x_MQG, torch.inf).amin(-1)
    return mean_MQ, max_MQ, min_MQ


def _normalized(x_MQG: Tensor, mask_MQG: Tensor, normalize: str, eps: float) -> Tensor:
    """The group advantage; exactly 0 in a group of one and where all are equal, whatever a mean rounds to."""
    mean_MQ, max_MQ, min_MQ = _group_statistics(x_MQG, mask_MQG)
    count_MQ = mask_MQG.sum(-1)
    centred_MQG = torch.where(mask_MQG, x_MQG - mean_MQ[..., None], 0)
    if normalize == "grpo":
        std_MQ = (centred_MQG.square().sum(-1) / (count_MQ - 1).clamp(min=1)).sqrt()
        centred_MQG = centred_MQG / (std_MQ[..., None] + eps)
    elif normalize == "rloo":
        centred_MQG = centred_MQG * (count_MQ / (count_MQ - 1).clamp(min=1))[..., None]
    else:
        assert normalize == "dr_grpo", normalize
    return torch.where((max_MQ > min_MQ)[..., None], centred_MQG, 0)


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    keep_softmax: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs (and entropies) of the targets, 0 where the target is −100; see `lm_head.linear_logprob`."""
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    return logits_logprob(logits_TV, target_T, temperature=temperature, softcap=softcap, with_entropy=with_entropy)


def logits_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs (and entropies) of the targets from logits; see `lm_head.logits_logprob`. Differentiable here."""
    logits_TV = logits_TV.to(torch.float64 if logits_TV.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    valid_T = target_T != -100
    logp_T = logp_TV.gather(1, torch.where(valid_T, target_T, 0)[:, None])[:, 0]
    logp_T = torch.where(valid_T, logp_T, 0)
    if not with_entropy:
        return logp_T
    return logp_T, torch.where(valid_T, -(logp_TV.exp() * logp_TV).sum(-1), 0)


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    advantage_T: Tensor,
    token_weight_T: Tensor,
    *,
    old_logp_T: Tensor | None = None,
    ref_logp_T: Tensor | None = None,
    behavior_logp_T: Tensor | None = None,
    turn_T: Tensor | None = None,
    loss: PolicyLoss | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    weight_grad_VD: Tensor | None = None,
    with_logp: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """The policy loss over whole logits; see `lm_head.linear_policy_loss`. Stats: logp_T and entropy_T of every row."""
    variant = loss or PolicyLoss()
    logp_T, entropy_T = linear_logprob(
        hidden_TD, weight_VD, target_T, bias_V=bias_V, temperature=temperature, softcap=softcap, with_entropy=True
    )
    dtype = logp_T.dtype
    valid_T = target_T != -100
    old_T = logp_T.detach() if old_logp_T is None else old_logp_T.to(dtype)
    a_T = advantage_T.to(dtype)
    log_ratio_T = logp_T - old_T
    ratio_T = log_ratio_T.exp()
    if variant.ratio == "sequence":
        assert turn_T is not None
        ratio_T = _over_turns(log_ratio_T, turn_T, valid_T, torch.mean).exp()
    bounded_T = ratio_T.clamp(1 - variant.clip_low, 1 + variant.clip_high)
    if variant.objective == "cispo":
        policy_T = -bounded_T.detach() * a_T * logp_T
    else:
        gain_T = torch.minimum(ratio_T * a_T, bounded_T * a_T)
        if variant.dual_clip is not None:
            gain_T = torch.where(a_T < 0, torch.maximum(gain_T, variant.dual_clip * a_T), gain_T)
        policy_T = -gain_T
    per_token_T = policy_T - variant.entropy_coef * entropy_T
    if variant.importance != "none":
        assert behavior_logp_T is not None
        log_weight_T = old_T.detach() - behavior_logp_T.to(dtype)
        if variant.importance == "sequence":
            assert turn_T is not None
            log_weight_T = _over_turns(log_weight_T, turn_T, valid_T, torch.sum)
        above = variant.importance_cap if variant.importance_mode == "truncate" else 0.0
        weight_T = log_weight_T.exp()
        per_token_T = per_token_T + (torch.where(weight_T > variant.importance_cap, above, weight_T) - 1) * policy_T
    if ref_logp_T is not None and variant.beta != 0:
        d_T = ref_logp_T.to(dtype) - logp_T
        kl_T = d_T.square() / 2 if variant.kl == "k2" else torch.exp(d_T) - d_T - 1
        per_token_T = per_token_T + variant.beta * log_ratio_T.exp().detach() * kl_T
    counted_T = valid_T & (token_weight_T != 0)
    value = torch.where(counted_T, per_token_T * token_weight_T.to(dtype), 0).sum()
    return value, {"logp_T": logp_T.detach(), "entropy_T": entropy_T.detach()}


def _over_turns(x_T: Tensor, turn_T: Tensor, valid_T: Tensor, reduce: Any) -> Tensor:
    """Each valid token gets its turn's mean or sum of x over the turn's valid tokens."""
    out_T = x_T
    for turn in turn_T.unique():
        in_turn_T = (turn_T == turn) & valid_T
        if in_turn_T.any():
            out_T = torch.where(in_turn_T, reduce(x_T[in_turn_T]), out_T)
    return out_T


@torch.no_grad()
def adamw_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    lr: float,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """One AdamW step in the tensors' own dtype, rounded to the nearest; see `adamw.adamw_step_`."""
    for weight, gradient, mean, square in zip(weights, gradients, means, squares, strict=True):
        g = scale * gradient.to(weight.dtype)
        mean.mul_(beta1).add_((1 - beta1) * g)
        square.mul_(beta2).add_((1 - beta2) * g * g)
        weight.mul_(1 - lr * weight_decay)
        root = (square / (1 - beta2**step)).sqrt() + eps
        weight.sub_(lr * mean / (1 - beta1**step) / root)
