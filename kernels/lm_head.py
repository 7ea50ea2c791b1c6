"""Log-probs and the policy loss straight from hidden states, without ever holding the [tokens, vocabulary] logits.

    x = softcap · tanh((weight h + bias) / softcap) / temperature,   log π = x_target − logsumexp(x)

The policy loss's gradient by a row of logits needs only that row's log-prob and its token's advantage, so it is formed
while the logits are still there, in the forward pass: three matrix products in all, and autograd's backward merely
scales what is done. Sequence ratios (GSPO), and sequence importance weights, need every log-prob of a turn before the
first gradient: they sweep twice and cost a fourth product. `linear_logprob` keeps nothing and forms its logits again in
the backward pass.

    loss, stats = linear_policy_loss(hidden, head.weight, targets, advantages, weights, loss=PolicyLoss(beta=0.01),
                                     ref_logp_T=ref)
    loss.backward()
"""

from __future__ import annotations

from typing import Any

import torch
from ilr_kernels import lm_head_checks as checks
from ilr_kernels.backend import uses_triton
from ilr_kernels.policy_loss import PolicyLoss, TokenInputs, TokenLoss, Turns, mean_stats, sum_stats, token_loss
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Swept, accumulation_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_LOSS = PolicyLoss()


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Natural log-probs of the targets, and with `with_entropy` the entropies of the distributions (nats).

    hidden_TD [T, D] and weight_VD [V, D] are float tensors of one dtype, target_T [T] int64 (`target_T[t]` is the token
    that `hidden_TD[t]` predicts). Rows whose target is −100 give 0 and no gradient. Returns logp_T [T], or
    (logp_T, entropy_T), in float32 (float64 for float64 input), differentiable in hidden, weight and bias.
    Raises ValueError naming the argument for a wrong shape, dtype or device and for a target outside the vocabulary.
    """
    checks.check_head(hidden_TD, weight_VD, target_T, bias_V, temperature, softcap)
    rows = _rows_or_all(target_T != checks.IGNORED)
    logp_T, entropy_T = _LinearLogprob.apply(
        hidden_TD, weight_VD, bias_V, target_T, rows, temperature, softcap, with_entropy
    )
    return (logp_T, entropy_T) if with_entropy else logp_T


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
    loss: PolicyLoss = DEFAULT_LOSS,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    weight_grad_VD: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Σ token_weight · per-token policy loss (formulas: `policy_loss.py`), and statistics.

    hidden_TD [T, D] and weight_VD [V, D] are float tensors of one dtype; target_T [T] is int64, −100 where ignored; the
    other _T arguments are float vectors [T]. `old_logp_T=None` means on-policy: every ratio is 1. `turn_T` (integers)
    numbers the turns that sequence ratios and weights are taken over; a turn must lie within one call. `chunk` is the
    number of rows whose logits are held at once.

    Returns a 0-d loss (float32; float64 for float64 input) and a dict of detached tensors: `logp_T` and `entropy_T`
    (NaN in rows that were skipped, because their weight or advantage is 0 and neither KL, entropy bonus nor another
    token of their turn needs them), the 0-d means `entropy`, `kl`, `clip_share`, `truncated_share` (`mean_stats`; None
    for `kl` without ref_logp_T and for `truncated_share` without importance weights), and under `sums` what these
    means are made of, which adds up over micro-batches (`sum_stats`).

    Gradients of hidden, weight and bias are formed in this call wherever they are required and grad mode is on;
    backward() scales them, once. With `weight_grad_VD` (weight's shape; its dtype or float32) dweight is added to that
    buffer here and now, and none flows to weight_VD; the loss must then reach backward() unscaled: another upstream
    gradient than 1 raises on the CPU and gives a NaN dhidden on a GPU, where looking would stall.
    Raises ValueError naming the argument for whatever does not fit.
    """
    checks.check_head(hidden_TD, weight_VD, target_T, bias_V, temperature, softcap)
    vectors = {
        "token_weight_T": token_weight_T,
        "advantage_T": advantage_T,
        "old_logp_T": old_logp_T,
        "ref_logp_T": ref_logp_T,
        "behavior_logp_T": behavior_logp_T,
    }
    checks.check_tokens(hidden_TD, vectors)
    checks.check_loss(loss, hidden_TD, ref_logp_T, behavior_logp_T, turn_T)
    checks.check_buffer(weight_grad_VD, weight_VD)
    checks.check_chunk(chunk)
    forms_gradients = _differentiates(hidden_TD, weight_VD, bias_V, weight_grad_VD)
    with torch.no_grad():
        rows, turns = _needed_rows(loss, target_T, advantage_T, token_weight_T, turn_T)
        dtype = accumulation_dtype(hidden_TD.dtype)
        inputs = TokenInputs(*(x if x is None else _take(x, rows).to(dtype) for x in vectors.values()), turns)
        head = Head(weight_VD, bias_V, temperature, softcap)
        hidden_ND = _take(hidden_TD, rows)
        grads = _buffers(head, hidden_ND, hidden_TD.requires_grad, weight_grad_VD) if forms_gradients else None
        swept = _sweep_policy(head, hidden_ND, _take(target_T, rows), loss, inputs, grads, chunk)
        stats = _stats(loss, swept, inputs, rows, len(target_T))
        value = swept.losses.value_N.sum()
    if grads is None:
        return value, stats
    formed = Gradients(
        None if grads.hidden_ND is None else _put(grads.hidden_ND, rows, len(target_T), 0),
        None if weight_grad_VD is not None or grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype),
        None if grads.bias_V is None else grads.bias_V.to(weight_VD.dtype),
    )
    return _FormedGradients.apply(hidden_TD, weight_VD, bias_V, value, formed, weight_grad_VD is not None), stats


def _sweep_policy(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    loss: PolicyLoss,
    inputs: TokenInputs,
    grads: Gradients | None,
    chunk: int | None,
) -> Swept:
    """One sweep where each row's loss is its own; two where it is its turn's: log-probs first, then gradients."""
    sweep = _backend(hidden_ND)
    if len(target_N) == 0:
        nothing_N = inputs.weight_N
        return Swept(nothing_N, nothing_N, TokenLoss(*[nothing_N] * 6))
    if not loss.over_turns:
        return sweep(head, hidden_ND, target_N, Policy(loss, inputs), grads, chunk)
    swept = sweep(head, hidden_ND, target_N, None, None, chunk)
    losses = token_loss(loss, swept.logp_N, swept.entropy_N, inputs)
    if grads is not None:
        step = Given(losses.dlogp_N, losses.dentropy_N if loss.entropy_coef != 0 else None)
        sweep(head, hidden_ND, target_N, step, grads, chunk)
    return swept._replace(losses=losses)


def _needed_rows(
    loss: PolicyLoss, target_T: Tensor, advantage_T: Tensor, weight_T: Tensor, turn_T: Tensor | None
) -> tuple[Tensor | None, Turns | None]:
    """The rows that must be computed (None: all), and their turns where the loss is taken over turns."""
    valid_T = target_T != checks.IGNORED
    needed_T = valid_T & (weight_T != 0)
    if loss.beta == 0 and loss.entropy_coef == 0:
        needed_T &= advantage_T != 0
    if not loss.over_turns:
        return _rows_or_all(needed_T), None
    assert turn_T is not None
    _, index_T = turn_T.unique(return_inverse=True)
    live = torch.zeros(len(turn_T), dtype=torch.bool, device=turn_T.device)
    live[index_T[needed_T]] = True
    rows = _rows_or_all(valid_T & live[index_T])
    _, index_N, length = _take(index_T, rows).unique(return_inverse=True, return_counts=True)
    return rows, Turns(index_N, length)


def _stats(loss: PolicyLoss, swept: Swept, inputs: TokenInputs, rows: Tensor | None, tokens: int) -> dict[str, Any]:
    sums = sum_stats(swept.losses, swept.entropy_N, inputs)
    stats: dict[str, Any] = dict(mean_stats(sums))
    if inputs.ref_logp_N is None:
        stats["kl"] = None
    if loss.importance == "none":
        stats["truncated_share"] = None
    stats["logp_T"] = _put(swept.logp_N, rows, tokens, float("nan"))
    stats["entropy_T"] = _put(swept.entropy_N, rows, tokens, float("nan"))
    stats["sums"] = sums
    return stats


class _FormedGradients(torch.autograd.Function):
    """Hangs gradients that are already there onto a value: backward scales them by the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, value, formed: Gradients, must_be_unscaled: bool) -> Tensor:  # type: ignore[override]
        ctx.formed, ctx.must_be_unscaled = formed, must_be_unscaled
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        formed, ctx.formed = ctx.formed, None
        if formed is None:
            raise RuntimeError("linear_policy_loss: the gradients were used up by an earlier backward()")
        on_cpu = not upstream.is_cuda
        if on_cpu and float(upstream) == 1:
            return *formed, None, None, None
        if ctx.must_be_unscaled:
            if on_cpu:
                raise ValueError(
                    f"weight_grad_VD: dweight was formed for an upstream gradient of 1, not {float(upstream)}"
                )
            upstream = torch.where(upstream == 1, upstream, float("nan"))
        return *(None if g is None else g.mul_(upstream) for g in formed), None, None, None


class _LinearLogprob(torch.autograd.Function):
    """Log-probs and entropies; nothing is kept but the inputs, the logits are formed again in the backward pass."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, rows, temperature, softcap, with_entropy):  # type: ignore[override]
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, rows)
        ctx.temperature, ctx.softcap, ctx.with_entropy = temperature, softcap, with_entropy
        hidden_ND, target_N = _take(hidden_TD, rows), _take(target_T, rows)
        if len(target_N) == 0:
            nothing_T = hidden_TD.new_zeros(len(target_T), dtype=accumulation_dtype(hidden_TD.dtype))
            return nothing_T, nothing_T.clone() if with_entropy else None
        head = Head(weight_VD, bias_V, temperature, softcap)
        swept = _backend(hidden_TD)(head, hidden_ND, target_N, None, None, with_entropy=with_entropy)
        return tuple(None if x is None else _put(x, rows, len(target_T), 0) for x in swept[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_T, dentropy_T):  # type: ignore[override]
        hidden_TD, weight_VD, bias_V, target_T, rows = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.temperature, ctx.softcap)
        hidden_ND, target_N = _take(hidden_TD, rows), _take(target_T, rows)
        grads = _buffers(head, hidden_ND, ctx.needs_input_grad[0], None)
        if len(target_N) > 0:
            dentropy_N = None if dentropy_T is None or not ctx.with_entropy else _take(dentropy_T, rows)
            step = Given(_take(dlogp_T, rows), dentropy_N)
            _backend(hidden_TD)(head, hidden_ND, target_N, step, grads, with_entropy=dentropy_N is not None)
        dhidden_TD = None if grads.hidden_ND is None else _put(grads.hidden_ND, rows, len(target_T), 0)
        dweight_VD, dbias_V = (None if g is None else g.to(weight_VD.dtype) for g in grads[1:])
        return dhidden_TD, dweight_VD, dbias_V, None, None, None, None, None


def _backend(hidden_ND: Tensor):
    """The sweep of the backend that takes this tensor; Triton is imported only where it is used."""
    if uses_triton(hidden_ND):
        from ilr_kernels import lm_head_triton

        return lm_head_triton.sweep
    from ilr_kernels import lm_head_torch

    return lm_head_torch.sweep


def _differentiates(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, weight_grad_VD: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return weight_grad_VD is not None or any(x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias_V))


def _buffers(head: Head, hidden_ND: Tensor, dhidden: bool, weight_grad_VD: Tensor | None) -> Gradients:
    """Room for the gradients that are wanted; sums over chunks are kept in float32 at least."""
    dtype = accumulation_dtype(hidden_ND.dtype)
    dweight_VD = weight_grad_VD
    if dweight_VD is None and head.weight_VD.requires_grad:
        dweight_VD = torch.zeros_like(head.weight_VD, dtype=dtype)
    return Gradients(
        torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if dhidden else None,
        dweight_VD,
        torch.zeros_like(head.bias_V, dtype=dtype) if head.bias_V is not None and head.bias_V.requires_grad else None,
    )


def _rows_or_all(needed_T: Tensor) -> Tensor | None:
    return None if needed_T.all() else needed_T.nonzero()[:, 0]


def _take(x_T: Tensor, rows: Tensor | None) -> Tensor:
    return x_T if rows is None else x_T[rows]


def _put(x_N: Tensor, rows: Tensor | None, tokens: int, fill: float) -> Tensor:
    """Rows back in their places, `fill` elsewhere."""
    if rows is None:
        return x_N
    return x_N.new_full((tokens, *x_N.shape[1:]), fill).index_copy_(0, rows, x_N)
