"""The policy loss of one token, its derivatives, and the record that chooses its variant.

With r = exp(log π − log π_old) (or, for `ratio="sequence"`, GSPO's exp of the turn's mean log-ratio, arXiv 2507.18071),
advantage A, importance weight w and entropy H, a token's loss is

    w · policy  +  beta · r_token · KL  −  entropy_coef · H

    ppo     policy = −min(r A, clip(r, 1−clip_low, 1+clip_high) A);  A < 0: at most −dual_clip · A   (arXiv 1912.09729)
    cispo   policy = −clip(r, 1−clip_low, 1+clip_high) A log π, no gradient through the clipped ratio (arXiv 2506.13585)
    k2      (log π − log π_ref)² / 2          k3      exp(d) − d − 1,  d = log π_ref − log π
    w       exp(log π_old − log π_behavior), of the token or multiplied up over the turn, cut at `importance_cap`
            (truncate) or 0 above it (mask); log π itself, detached, stands for log π_old where there is none

Choices where the literature differs: w and the r that weights the KL are constants to the gradient (so k2's gradient
stays that of the exact reverse KL off-policy); that r is always the token's own; w acts on the policy term alone.

    PolicyLoss(clip_high=0.28, kl="k2", beta=0.01, importance="token")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Which policy loss; the defaults are clipped GRPO without KL. A contradiction raises `ValueError`."""

    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    objective: Literal["ppo", "cispo"] = "ppo"
    kl: Literal["k2", "k3"] = "k3"
    beta: float = 0.0
    entropy_coef: float = 0.0
    importance: Literal["none", "token", "sequence"] = "none"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        choices = {
            "ratio": ("token", "sequence"),
            "objective": ("ppo", "cispo"),
            "kl": ("k2", "k3"),
            "importance": ("none", "token", "sequence"),
            "importance_mode": ("truncate", "mask"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("clip_low", "clip_high", "beta", "entropy_coef", "importance_cap"):
            if not isinstance(getattr(self, name), (int, float)) or math.isnan(getattr(self, name)):
                raise ValueError(f"{name} must be a number, not {getattr(self, name)!r}")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(
                f"clip bounds crossed: clip_low={self.clip_low} and clip_high={self.clip_high} are distances from 1 "
                "and must not be negative"
            )
        if self.clip_low > 1:
            raise ValueError(f"clip_low must be at most 1 (a ratio is never negative), not {self.clip_low}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1 (3 is usual) or None, not {self.dual_clip}")
        if self.dual_clip is not None and self.objective == "cispo":
            raise ValueError("dual_clip belongs to objective='ppo'; cispo clips its ratio on both sides already")
        if not 0 <= self.beta < math.inf or not math.isfinite(self.entropy_coef):
            raise ValueError(
                f"beta must be finite and not negative, entropy_coef finite; they are {self.beta}, {self.entropy_coef}"
            )
        if not self.importance_cap > 0:
            raise ValueError(f"importance_cap must be above 0, not {self.importance_cap}")

    @property
    def over_turns(self) -> bool:
        """Whether a token's loss depends on the other tokens of its turn."""
        return self.ratio == "sequence" or self.importance == "sequence"


class Turns(NamedTuple):
    """Which tokens belong together: sums over turns that are the same, bit for bit, whenever they are repeated."""

    order_N: Tensor  # the tokens, turn by turn
    index_N: Tensor  # the turn of each token, numbered from 0 without gaps
    length_N: Tensor  # the tokens of each turn; as many entries as tokens, 0 where there is no such turn

    @classmethod
    def of(cls, turn_N: Tensor) -> Turns:
        """The turns of tokens by their numbers [N]; nothing here waits for a GPU."""
        sorted_N, order_N = turn_N.sort(stable=True)
        starts_N = torch.ones_like(sorted_N)
        starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
        index_N = torch.empty_like(order_N).scatter_(0, order_N, starts_N.cumsum(0) - 1)
        length_N = torch.zeros_like(order_N).scatter_add_(0, index_N, torch.ones_like(order_N))
        return cls(order_N, index_N, length_N)

    def sum(self, values_N: Tensor) -> Tensor:
        """Each token's turn total of `values_N`."""
        if len(values_N) == 0:
            return values_N
        ordered_N = values_N[self.order_N]
        return torch.segment_reduce(ordered_N, "sum", lengths=self.length_N, unsafe=True, initial=0)[self.index_N]

    def mean(self, values_N: Tensor) -> Tensor:
        """Each token's turn mean of `values_N`."""
        return self.sum(values_N) / self.length_N[self.index_N]


class TokenInputs(NamedTuple):
    """What the loss knows of N tokens beside log π and the entropy; all float vectors of length N, or None."""

    weight_N: Tensor
    advantage_N: Tensor
    old_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    behavior_logp_N: Tensor | None = None
    turns: Turns | None = None

    def at(self, rows: slice) -> TokenInputs:
        """The inputs of some of the rows; a loss over whole turns must not be cut, so `turns` is left out."""

        def cut(x_N: Tensor | None) -> Tensor | None:
            return None if x_N is None else x_N[rows]

        old_N, ref_N, behavior_N = cut(self.old_logp_N), cut(self.ref_logp_N), cut(self.behavior_logp_N)
        return TokenInputs(self.weight_N[rows], self.advantage_N[rows], old_N, ref_N, behavior_N)


class TokenLoss(NamedTuple):
    """Per token: the weighted loss, its derivatives by log π and by the entropy, and what the statistics count."""

    value_N: Tensor
    dlogp_N: Tensor
    dentropy_N: Tensor | None  # kernels leave out what is 0
    clipped_N: Tensor  # 1 where the clip took the gradient away (cispo: where it changed the ratio)
    kl_N: Tensor  # r · k3, an unbiased estimate of KL(π ‖ π_ref) whichever estimator the loss uses; 0 without π_ref
    truncated_N: Tensor  # 1 where the importance weight was above its cap


def token_loss(loss: PolicyLoss, logp_N: Tensor, entropy_N: Tensor, t: TokenInputs) -> TokenLoss:
    """The loss of N tokens and its derivatives. With `loss.over_turns` the tokens must be whole turns."""
    policy_N, dpolicy_N, clipped_N = _policy(loss, logp_N, t)
    importance_N, truncated_N = _importance(loss, logp_N, t)
    kl_N, dkl_N, kl_stat_N = _kl(loss, logp_N, t)
    value_N = importance_N * policy_N + loss.beta * kl_N - loss.entropy_coef * entropy_N
    dpolicy_N = t.weight_N * importance_N * dpolicy_N
    if loss.ratio == "sequence" and loss.objective == "ppo":
        assert t.turns is not None
        dpolicy_N = t.turns.mean(dpolicy_N)  # log s is the mean of the turn's log-ratios
    return TokenLoss(
        t.weight_N * value_N,
        dpolicy_N + t.weight_N * loss.beta * dkl_N,
        t.weight_N * -loss.entropy_coef,
        clipped_N.to(logp_N.dtype),
        kl_stat_N,
        truncated_N.to(logp_N.dtype),
    )


def _policy(loss: PolicyLoss, logp_N: Tensor, t: TokenInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The policy term, its derivative (by log r for ppo, by log π for cispo) and where the clip acts."""
    a_N = t.advantage_N
    log_ratio_N = torch.zeros_like(logp_N) if t.old_logp_N is None else logp_N - t.old_logp_N
    if loss.ratio == "sequence":
        assert t.turns is not None
        log_ratio_N = t.turns.mean(log_ratio_N)
    ratio_N = log_ratio_N.exp()
    above_N, below_N = ratio_N > 1 + loss.clip_high, ratio_N < 1 - loss.clip_low
    bounded_N = ratio_N.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    if loss.objective == "cispo":
        return -bounded_N * a_N * logp_N, -bounded_N * a_N, (above_N | below_N) & (a_N != 0)
    value_N = -torch.minimum(ratio_N * a_N, bounded_N * a_N)
    clipped_N = ((a_N > 0) & above_N) | ((a_N < 0) & below_N)
    if loss.dual_clip is not None:
        value_N = torch.where(a_N < 0, torch.minimum(value_N, -loss.dual_clip * a_N), value_N)
        clipped_N |= (a_N < 0) & (ratio_N > loss.dual_clip)
    return value_N, torch.where(clipped_N, 0, -a_N * ratio_N), clipped_N


def _importance(loss: PolicyLoss, logp_N: Tensor, t: TokenInputs) -> tuple[Tensor, Tensor]:
    """The importance weight against the engine's sampling, and where it was above its cap."""
    if loss.importance == "none":
        return torch.ones_like(logp_N), torch.zeros_like(logp_N, dtype=torch.bool)
    assert t.behavior_logp_N is not None
    log_weight_N = (logp_N if t.old_logp_N is None else t.old_logp_N) - t.behavior_logp_N
    if loss.importance == "sequence":
        assert t.turns is not None
        log_weight_N = t.turns.sum(log_weight_N)
    weight_N = log_weight_N.exp()
    above_N = weight_N > loss.importance_cap
    return torch.where(above_N, loss.importance_cap if loss.importance_mode == "truncate" else 0, weight_N), above_N


def _kl(loss: PolicyLoss, logp_N: Tensor, t: TokenInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The KL term, its derivative by log π, and the estimate that is reported."""
    if t.ref_logp_N is None:
        zero_N = torch.zeros_like(logp_N)
        return zero_N, zero_N, zero_N
    d_N = t.ref_logp_N - logp_N
    ratio_N = torch.ones_like(logp_N) if t.old_logp_N is None else (logp_N - t.old_logp_N).exp()
    k3_N = ratio_N * (d_N.expm1() - d_N)
    if loss.kl == "k3":
        return k3_N, ratio_N * -d_N.expm1(), k3_N
    return ratio_N * d_N.square() / 2, ratio_N * -d_N, k3_N


def sum_stats(losses: TokenLoss, entropy_N: Tensor, t: TokenInputs) -> dict[str, Tensor]:
    """What the statistics are made of, as sums that add up over micro-batches and ranks (0-d tensors).

    Counted is every token that was computed and whose weight is not 0: `tokens`, `entropy`, `kl`; and of those the ones
    whose advantage is not 0 either, since clip and importance act on nothing else: `policy_tokens`, `clipped`,
    `truncated`. Every counted token counts the same, whatever its weight.
    """
    counted_N = (t.weight_N != 0).to(entropy_N.dtype)
    policy_N = counted_N * (t.advantage_N != 0)
    return {
        "tokens": counted_N.sum(),
        "entropy": torch.where(counted_N > 0, entropy_N, 0).sum(),
        "kl": torch.where(counted_N > 0, losses.kl_N, 0).sum(),
        "policy_tokens": policy_N.sum(),
        "clipped": (policy_N * losses.clipped_N).sum(),
        "truncated": (policy_N * losses.truncated_N).sum(),
    }


def mean_stats(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means of `sum_stats` (or of several, added by key): NaN where nothing was counted.

    `entropy` and `kl` are means over the counted tokens, `clip_share` and `truncated_share` shares of `policy_tokens`.
    """
    return {
        "entropy": sums["entropy"] / sums["tokens"],
        "kl": sums["kl"] / sums["tokens"],
        "clip_share": sums["clipped"] / sums["policy_tokens"],
        "truncated_share": sums["truncated"] / sums["policy_tokens"],
    }
