"""What a sweep over the LM head is given and gives: the records that both backends (torch and Triton) share.

A sweep forms the logits of a few rows at a time, in one buffer, and takes from them each row's log-prob and entropy.
Where it is told what a row's gradient is (`Given`, or `Policy`, which finds it from the log-prob), it writes the
gradient of the logits over the logits and multiplies it out, so that nothing of size N × V outlives a chunk:

    dL/dx_v = g (1[v = target] − p_v) − h p_v (log p_v + H),   g = dL/dlog π,   h = dL/dH

A sweep that is given a `gate` waits at it before its first costly launch (`rows.over_needed_rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from ilr_kernels.policy_loss import PolicyLoss, TokenInputs, TokenLoss
from torch import Tensor


class Head(NamedTuple):
    """An LM head: logits = softcap · tanh((weight · hidden + bias) / softcap) / temperature."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None


class Given(NamedTuple):
    """The derivatives by each row's log-prob and entropy are known."""

    dlogp_N: Tensor
    dentropy_N: Tensor | None


class Policy(NamedTuple):
    """The derivatives come from the policy loss, row by row (no loss over whole turns)."""

    loss: PolicyLoss
    inputs: TokenInputs


Step = Given | Policy | None


class Gradients(NamedTuple):
    """Where gradients go, None where none is wanted: dhidden is written, dweight and dbias are added.

    With `fresh` nothing is in dweight yet: the first chunk overwrites it.
    """

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    fresh: bool = False


class Swept(NamedTuple):
    """What a sweep found; `entropy_N` and `losses` are None where they were not asked for."""

    logp_N: Tensor
    entropy_N: Tensor | None
    losses: TokenLoss | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what log-probs, losses and sums over chunks are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_logits(head: Head, hidden_CD: Tensor, slab_CV: Tensor) -> Tensor:
    """weight · hidden + bias of a chunk, in the slab."""
    out = slab_CV[: len(hidden_CD)]
    if head.bias_V is None:
        return torch.mm(hidden_CD, head.weight_VD.t(), out=out)
    return torch.addmm(head.bias_V, hidden_CD, head.weight_VD.t(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """total += a @ b, or total = a @ b, where `total` may be float32 while a and b are 16 bits wide."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if overwrite else total.addmm_(a, b)
    elif not total.is_cuda:
        total.copy_(a @ b) if overwrite else total.add_(a @ b)
    elif overwrite:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def spread_gradients(logits_NV: Tensor, hidden_ND: Tensor, head: Head, grads: Gradients, rows: slice) -> None:
    """Multiplies the gradient of a chunk's logits out into dhidden, dweight and dbias."""
    if grads.hidden_ND is not None:
        torch.mm(logits_NV, head.weight_VD, out=grads.hidden_ND[rows])
    if grads.weight_VD is not None:
        add_product(grads.weight_VD, logits_NV.t(), hidden_ND[rows], overwrite=grads.fresh and rows.start == 0)
    if grads.bias_V is not None:
        grads.bias_V.add_(logits_NV.sum(0, dtype=grads.bias_V.dtype))
