"""Log-probs and entropies of given logits in PyTorch: what a CPU uses, a few rows at a time."""

from __future__ import annotations

import torch
from ilr_kernels.sweep import accumulation_dtype
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # logits worked on at once


def read_logits(
    logits_TV: Tensor, target_T: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T], float32 (float64 for float64 logits); 0 where the target is outside."""
    tokens, vocabulary = logits_TV.shape
    logp_T, entropy_T = logits_TV.new_empty(2, tokens, dtype=accumulation_dtype(logits_TV.dtype))
    block = max(1, BLOCK_ELEMENTS // vocabulary)
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        x_BV = logits_TV[rows].to(logp_T.dtype)
        if softcap is not None:
            x_BV = softcap * torch.tanh(x_BV / softcap)
        logp_BV = torch.log_softmax(x_BV / temperature, dim=1)
        target_B = target_T[rows]
        valid_B = (target_B >= 0) & (target_B < vocabulary)
        logp_T[rows] = torch.where(valid_B, logp_BV.gather(1, torch.where(valid_B, target_B, 0)[:, None])[:, 0], 0)
        entropy_T[rows] = torch.where(valid_B, -(logp_BV.exp() * logp_BV).sum(1), 0)
    return logp_T, entropy_T
