"""Inputs of the LM head's benchmarks at a real scale, and their float64 truth, slice by slice.

Logits have a standard deviation of 2. A tenth of the rows has a ratio far outside the clip range and the others one
well inside, so that no variant's rounding decides which rows are clipped. Advantages belong to 16 turns, as in GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from ilr_benchmarks.measure import Outputs
from ilr_kernels import reference
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

TURNS = 16
SLICE = 1024  # rows whose float64 logits are held at once


@dataclass(frozen=True)
class Problem:
    """Arguments of the loss for N rows, hidden size D and vocabulary V; hidden and weight require gradients."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    advantage_N: Tensor
    token_weight_N: Tensor
    old_logp_N: Tensor
    turn_N: Tensor

    @staticmethod
    def make(rows: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype) -> Problem:
        torch.manual_seed(0)
        hidden_ND = torch.randn(rows, hidden, device=device).to(dtype)
        weight_VD = (torch.randn(vocabulary, hidden, device=device) * (2 / hidden**0.5)).to(dtype)
        target_N = torch.randint(vocabulary, (rows,), device=device)
        turn_N = torch.arange(rows, device=device) * TURNS // rows
        shift_N = torch.where(torch.rand(rows, device=device) < 0.1, 0.6, 0.03 * torch.randn(rows, device=device))
        old_N = torch.cat([
            reference.linear_logprob(h, weight_VD, t)
            for h, t in zip(hidden_ND.split(1024), target_N.split(1024), strict=True)
        ])
        return Problem(
            hidden_ND.requires_grad_(),
            weight_VD.requires_grad_(),
            target_N,
            torch.randn(TURNS, device=device)[turn_N],
            torch.full((rows,), 1 / rows, device=device),
            old_N - shift_N,
            turn_N,
        )

    def half_zero(self) -> Problem:
        """The same with no advantage in half of the rows, at random."""
        keep_N = torch.rand(len(self.target_N), device=self.target_N.device) < 0.5
        return replace(self, advantage_N=torch.where(keep_N, self.advantage_N, 0))

    def first(self, rows: int) -> Problem:
        """The first rows, as leaves of their own, and the same head."""
        parts = {name: x[:rows] for name, x in vars(self).items() if name not in ("hidden_ND", "weight_VD")}
        return replace(self, hidden_ND=self.hidden_ND.detach()[:rows].clone().requires_grad_(), **parts)

    def arguments(self) -> dict[str, Any]:
        return {
            "hidden_TD": self.hidden_ND,
            "weight_VD": self.weight_VD,
            "target_T": self.target_N,
            "advantage_T": self.advantage_N,
            "token_weight_T": self.token_weight_N,
            "old_logp_T": self.old_logp_N,
            "turn_T": self.turn_N,
        }

    def forget(self) -> None:
        self.hidden_ND.grad = self.weight_VD.grad = None


def policy_truth(x: Problem, loss: PolicyLoss) -> Outputs:
    """The policy loss, log-probs, entropies and both gradients in float64."""

    def value(part: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        loss_value, stats = reference.linear_policy_loss(**part, loss=loss)
        return loss_value, stats["logp_T"], stats["entropy_T"]

    return _truth(x, value, whole_turns=loss.over_turns)


def logprob_truth(x: Problem) -> Outputs:
    """Σ advantage · log-prob, log-probs, entropies, and the sum's gradients, in float64."""

    def value(part: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        logp_T, entropy_T = reference.linear_logprob(
            part["hidden_TD"], part["weight_VD"], part["target_T"], with_entropy=True
        )
        return (logp_T * part["advantage_T"]).sum(), logp_T.detach(), entropy_T.detach()

    return _truth(x, value, whole_turns=False)


def _truth(x: Problem, value: Callable[[dict[str, Any]], tuple[Tensor, Tensor, Tensor]], whole_turns: bool) -> Outputs:
    """In slices, since float64 logits are large: whole turns where a row's loss is its turn's."""
    exact_VD = x.weight_VD.detach().double().requires_grad_()
    rows = max(1, len(x.target_N) // TURNS)
    rows = rows if whole_turns else min(rows, SLICE)
    losses, logp, entropy, dhidden = [], [], [], []
    for start in range(0, len(x.target_N), rows):
        part = {name: tensor[start : start + rows] for name, tensor in x.arguments().items() if name != "weight_VD"}
        hidden_TD = part.pop("hidden_TD").detach().double().requires_grad_()
        loss_value, logp_T, entropy_T = value({**part, "hidden_TD": hidden_TD, "weight_VD": exact_VD})
        loss_value.backward()
        losses.append(loss_value.detach())
        logp.append(logp_T)
        entropy.append(entropy_T)
        dhidden.append(hidden_TD.grad.float())
    assert exact_VD.grad is not None
    return {
        "loss": torch.stack(losses).sum(),
        "logp": torch.cat(logp),
        "entropy": torch.cat(entropy),
        "dhidden": torch.cat(dhidden),
        "dweight": exact_VD.grad.float(),
    }
