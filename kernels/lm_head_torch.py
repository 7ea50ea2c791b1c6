"""The sweep over the LM head in PyTorch: what training on a CPU uses.

Per chunk of rows: one product gives the logits; a pass over blocks of a few rows, small enough to stay in the cores'
caches while they are shifted, exponentiated, summed and overwritten with their gradient, does everything between; and
two products give dhidden and add to dweight. Besides the three products the logits travel through memory about once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from ilr_kernels.chunks import cpu_block, cpu_chunk
from ilr_kernels.policy_loss import TokenLoss, token_loss
from ilr_kernels.rows import Gate
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Swept, accumulation_dtype, chunk_logits, spread_gradients
from torch import Tensor


def sweep(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    step: Given | Policy | None,
    grads: Gradients | None,
    chunk: int | None = None,
    with_entropy: bool = True,
    gate: Gate | None = None,
) -> Swept:
    """Log-probs and entropies of N rows, and into `grads` the gradients that `step` asks for (see `sweep.py`)."""
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    chunk = min(n, chunk or cpu_chunk(vocabulary))
    block = min(chunk, cpu_block(vocabulary, torch.get_num_threads()))
    dtype = accumulation_dtype(hidden_ND.dtype)
    logp_N = hidden_ND.new_empty(n, dtype=dtype)
    work = _Work(
        head,
        target_N,
        step,
        grads is not None,
        scratch_BV=hidden_ND.new_empty(block, vocabulary, dtype=dtype),
        logp_N=logp_N,
        entropy_N=torch.empty_like(logp_N) if with_entropy else None,
    )
    slab_CV = hidden_ND.new_empty(chunk, vocabulary)
    if gate is not None:
        gate.wait()
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        logits_CV = chunk_logits(head, hidden_ND[rows], slab_CV)
        for first in range(start, rows.stop, block):
            in_block = slice(first, min(first + block, rows.stop))
            work.block(in_block, logits_CV[first - start : in_block.stop - start])
        if grads is not None:
            spread_gradients(logits_CV, hidden_ND, head, grads, rows)
    losses = TokenLoss(*(torch.cat(parts) for parts in zip(*work.losses, strict=True))) if work.losses else None
    return Swept(logp_N, work.entropy_N, losses)


class _Softmax(NamedTuple):
    """Exponentials of a block, 0 at the target, whose own stands aside: a confident row's 1 − p is not rounded away."""

    e_BV: Tensor
    own_B: Tensor
    others_B: Tensor
    sum_B: Tensor
    log_sum_B: Tensor


@dataclass
class _Work:
    """What is done to a block of logits between the products, and what it leaves behind."""

    head: Head
    target_N: Tensor
    step: Given | Policy | None
    with_gradient: bool
    scratch_BV: Tensor
    logp_N: Tensor
    entropy_N: Tensor | None
    losses: list[TokenLoss] = field(default_factory=list)

    def block(self, rows: slice, logits_BV: Tensor) -> None:
        """Log-probs, entropies and losses of these rows; the gradient of their logits takes the logits' place."""
        x_BV = logits_BV if logits_BV.dtype == self.logp_N.dtype else logits_BV.to(self.logp_N.dtype)
        slope_BV = self._finish_logits(x_BV)
        x_BV.sub_(x_BV.amax(1, keepdim=True))  # from here on x ≤ 0: its exponentials can be summed
        softmax = self._softmax(rows, x_BV)
        dlogp_B, dentropy_B = self._derivatives(rows)
        if not self.with_gradient or dlogp_B is None:
            return
        self._gradient(rows, x_BV, softmax, dlogp_B, dentropy_B)
        if slope_BV is not None:
            x_BV.mul_(slope_BV)
        if x_BV is not logits_BV:
            logits_BV.copy_(x_BV)

    def _softmax(self, rows: slice, x_BV: Tensor) -> _Softmax:
        """Log-probs and entropies of these rows, and their exponentials."""
        at_B1 = self.target_N[rows, None]
        target_x_B = x_BV.gather(1, at_B1)[:, 0]
        e_BV = torch.exp(x_BV, out=self.scratch_BV[: len(x_BV)])
        own_B = target_x_B.exp()
        e_BV.scatter_(1, at_B1, 0)
        others_B = e_BV.sum(1)
        sum_B = own_B + others_B
        log_sum_B = torch.where(target_x_B == 0, others_B.log1p(), sum_B.log())
        self.logp_N[rows] = target_x_B - log_sum_B
        if self.entropy_N is not None:
            # Row by row: no [B, V] scratch, which between small tensors that stay would leave holes (the heap grows
            # by a block at a time), and many times faster than bmm's products of one row.
            dot_B = torch.stack([torch.dot(e_V, x_V) for e_V, x_V in zip(e_BV, x_BV, strict=True)])
            self.entropy_N[rows] = log_sum_B - (dot_B + own_B * target_x_B) / sum_B
        return _Softmax(e_BV, own_B, others_B, sum_B, log_sum_B)

    def _finish_logits(self, x_BV: Tensor) -> Tensor | None:
        """Soft-cap, then temperature, in place; returns d finished / d raw where it is not 1."""
        cap, temperature = self.head.softcap, self.head.temperature
        slope_BV = None
        if cap is not None:
            x_BV.div_(cap).tanh_()
            if self.with_gradient:
                slope_BV = (1 - x_BV.square()).div_(temperature)
            x_BV.mul_(cap)
        if temperature != 1:
            x_BV.div_(temperature)
            slope_BV = x_BV.new_tensor(1 / temperature) if slope_BV is None else slope_BV
        return slope_BV

    def _derivatives(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """dL/dlog π and dL/dH (None: 0) of these rows; the policy loss is calculated here."""
        if isinstance(self.step, Given):
            return self.step.dlogp_N[rows], None if self.step.dentropy_N is None else self.step.dentropy_N[rows]
        if self.step is None:
            return None, None
        assert self.entropy_N is not None, "the policy loss reports entropies"
        losses = token_loss(self.step.loss, self.logp_N[rows], self.entropy_N[rows], self.step.inputs.at(rows))
        self.losses.append(losses)
        return losses.dlogp_N, losses.dentropy_N if self.step.loss.entropy_coef != 0 else None

    def _gradient(
        self, rows: slice, x_BV: Tensor, softmax: _Softmax, dlogp_B: Tensor, dentropy_B: Tensor | None
    ) -> None:
        """x ← g (1[v = target] − p) − h p (log p + H), by the finished logits; p = e / sum, log p = x − log sum."""
        e_BV, own_B, others_B, sum_B, log_sum_B = softmax
        at_target_B = dlogp_B * others_B
        if dentropy_B is None:
            torch.mul(e_BV, (-dlogp_B / sum_B)[:, None], out=x_BV)
        else:
            assert self.entropy_N is not None
            at_target_B = at_target_B - dentropy_B * own_B * (self.logp_N[rows] + self.entropy_N[rows])
            offset_B = dlogp_B + dentropy_B * (self.entropy_N[rows] - log_sum_B)
            x_BV.mul_(dentropy_B[:, None]).add_(offset_B[:, None]).mul_(e_BV.div_(-sum_B[:, None]))
        x_BV.scatter_(1, self.target_N[rows, None], (at_target_B / sum_B)[:, None])
