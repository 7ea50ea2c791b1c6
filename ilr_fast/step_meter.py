"""The numbers of one rollout's updates, gathered without stalling the device and read once at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from ilr_kernels.policy_loss import mean_stats
from torch import Tensor

from ilr_fast.optimizer import Outcome

METRICS = (
    "loss", "entropy", "kl_reference", "logp_diff_mean", "logp_diff_max",
    "clip_share", "truncated_share", "grad_norm", "lr",
)  # fmt: skip


class StepMeter:
    """Adds up over micro-batches and updates. `metrics()` gives every key of METRICS, None where there is no number."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._losses: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._measured: set[str] = set()
        self._differences: list[Tensor] = []

    def absorb(self, other: StepMeter) -> None:
        """Adds what another has gathered."""
        self.outcomes += other.outcomes
        self._losses += other._losses
        self._differences += other._differences
        self._measured |= other._measured
        for key, value in other._sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def loss(self, loss: Tensor, stats: Mapping[str, Any]) -> None:
        """One micro-batch: its share of the step's loss and the statistics of `linear_policy_loss`."""
        self._losses.append(loss.detach())
        for key, value in stats["sums"].items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._measured |= {key for key in ("kl", "truncated_share") if stats[key] is not None}

    def difference(self, logp_N: Tensor, behavior_logp_N: Tensor) -> None:
        """The trainer's log-probs, under the weights that sampled, against the engine's."""
        self._differences.append((logp_N - behavior_logp_N).abs())

    def metrics(self) -> dict[str, float | None]:
        """Losses, norms and statistics are means over the updates; clip shares are of the tokens with an advantage."""
        found: dict[str, float | None] = dict.fromkeys(METRICS)
        if self._losses:
            found["loss"] = _number(torch.stack(self._losses).sum() / len(self.outcomes))
            means = mean_stats(self._sums)
            found["entropy"], found["clip_share"] = _number(means["entropy"]), _number(means["clip_share"])
            found["kl_reference"] = _number(means["kl"]) if "kl" in self._measured else None
            found["truncated_share"] = (
                _number(means["truncated_share"]) if "truncated_share" in self._measured else None
            )
        if self._differences:
            difference = torch.cat(self._differences)
            found["logp_diff_mean"], found["logp_diff_max"] = _number(difference.mean()), _number(difference.max())
        if self.outcomes:
            norms = [o.grad_norm for o in self.outcomes if not o.skipped]
            found["grad_norm"] = sum(norms) / len(norms) if norms else None
            found["lr"] = self.outcomes[-1].lr
        return found


def _number(value: Tensor) -> float | None:
    """None where nothing was counted, or the model's own numbers are not finite."""
    number = float(value)
    return number if math.isfinite(number) else None
