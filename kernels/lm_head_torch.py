"""The sweep over the LM head in PyTorch: what training on a CPU uses.

Per chunk of rows: one product gives the logits, a pass over blocks of a few rows (small enough to stay in the cache
while they are shifted, exponentiated, summed and overwritten with their gradient) does everything between, and two
products give dhidden and add to dweight. Besides the three products, memory is touched about once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilr_kernels.policy_loss import TokenLoss, token_loss
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Swept, accumulation_dtype, spread_gradients

CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB of float32; below ~128 rows the products lose speed
BLOCK_ELEMENTS = 2**19  # logits worked on at once: 2 MiB and a scratch of the same size stay in the cores' caches


def sweep(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    step: Given | Policy | None,
    grads: Gradients | None,
    chunk: int | None = None,
    with_entropy: bool = True,
) -> Swept:
    """Log-probs and entropies of N rows, and into `grads` the gradients that `step` asks for (see `sweep.py`)."""
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    dtype = accumulation_dtype(hidden_ND.dtype)
    chunk = min(n, chunk or max(16, CHUNK_ELEMENTS // vocabulary))
    block = max(torch.get_num_threads(), BLOCK_ELEMENTS // vocabulary)
    slab_CV = hidden_ND.new_empty(chunk, vocabulary)
    scratch_BV = hidden_ND.new_empty(min(block, chunk), vocabulary, dtype=dtype)
    logp_N = hidden_ND.new_empty(n, dtype=dtype)
    entropy_N = torch.empty_like(logp_N) if with_entropy else None
    losses: list[TokenLoss] = []
    for start in range(0, n, chunk):
        logits_CV = _logits(head, hidden_ND[start : start + chunk], slab_CV)
        for first in range(start, min(start + chunk, n), block):
            rows = slice(first, min(first + block, start + chunk, n))
            _block(head, logits_CV[rows.start - start : rows.stop - start], target_N[rows], scratch_BV,
                   step, grads is not None, rows, logp_N, entropy_N, losses)  # fmt: skip
        if grads is not None:
            spread_gradients(logits_CV, hidden_ND, head, grads, slice(start, min(start + chunk, n)))
    joined = TokenLoss(*(torch.cat(parts) for parts in zip(*losses, strict=True))) if losses else None
    return Swept(logp_N, entropy_N, joined)


def _logits(head: Head, hidden_CD: Tensor, slab_CV: Tensor) -> Tensor:
    """weight · hidden + bias of a chunk, in the slab."""
    out = slab_CV[: len(hidden_CD)]
    if head.bias_V is None:
        return torch.mm(hidden_CD, head.weight_VD.t(), out=out)
    return torch.addmm(head.bias_V, hidden_CD, head.weight_VD.t(), out=out)


def _block(
    head: Head,
    logits_BV: Tensor,
    target_B: Tensor,
    scratch_BV: Tensor,
    step: Given | Policy | None,
    with_gradient: bool,
    rows: slice,
    logp_N: Tensor,
    entropy_N: Tensor | None,
    losses: list[TokenLoss],
) -> None:
    """One block: log-probs and entropies into their rows, the loss into `losses`, the gradient over the logits."""
    x_BV = logits_BV if logits_BV.dtype == logp_N.dtype else logits_BV.to(logp_N.dtype)
    if head.softcap is not None:
        x_BV.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1:
        x_BV.div_(head.temperature)
    max_B1 = x_BV.amax(1, keepdim=True)
    x_BV.sub_(max_B1)  # from here on x is at most 0 and sums of exp(x) are safe
    e_BV = torch.exp(x_BV, out=scratch_BV[: len(x_BV)])
    sum_B = e_BV.sum(1)
    log_sum_B = sum_B.log()
    logp_B = x_BV.gather(1, target_B[:, None])[:, 0] - log_sum_B
    logp_N[rows] = logp_B
    if entropy_N is not None:
        entropy_N[rows] = log_sum_B - torch.linalg.vecdot(e_BV, x_BV) / sum_B
    if isinstance(step, Policy):
        losses.append(token_loss(step.loss, logp_B, entropy_N[rows], step.inputs.at(rows)))
    if not with_gradient:
        return
    dlogp_B, dentropy_B = _derivatives(step, losses, rows)
    e_BV.div_(sum_B[:, None])
    slope_BV = None if head.softcap is None else _softcap_slope(head, x_BV + max_B1)
    if dentropy_B is None:
        torch.mul(e_BV, -dlogp_B[:, None], out=x_BV)
    else:
        offset_B = dlogp_B + dentropy_B * (entropy_N[rows] - log_sum_B)
        x_BV.mul_(dentropy_B[:, None]).add_(offset_B[:, None]).mul_(e_BV).neg_()
    x_BV.scatter_add_(1, target_B[:, None], dlogp_B[:, None])
    if head.temperature != 1:
        x_BV.div_(head.temperature)
    if slope_BV is not None:
        x_BV.mul_(slope_BV)
    if x_BV is not logits_BV:
        logits_BV.copy_(x_BV)


def _derivatives(step: Given | Policy | None, losses: list[TokenLoss], rows: slice) -> tuple[Tensor, Tensor | None]:
    """dL/dlog π and dL/dH (None: 0 everywhere) of a block."""
    if isinstance(step, Given):
        return step.dlogp_N[rows], None if step.dentropy_N is None else step.dentropy_N[rows]
    assert isinstance(step, Policy), "gradients need derivatives to start from"
    return losses[-1].dlogp_N, losses[-1].dentropy_N if step.loss.entropy_coef != 0 else None


def _softcap_slope(head: Head, x_BV: Tensor) -> Tensor:
    """d softcapped / d raw logit = 1 − tanh², from the finished logits."""
    return 1 - (x_BV * (head.temperature / head.softcap)).square()
