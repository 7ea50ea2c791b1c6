"""Log-probs and the policy loss straight from hidden states, without ever holding the [tokens, vocabulary] logits.

    x = softcap · tanh((weight h + bias) / softcap) / temperature,   log π = x_target − logsumexp(x)

The policy loss's gradient by a row of logits needs only that row's log-prob and its token's advantage, so it is formed
while the logits are still there, in the forward pass: three matrix products in all, and autograd's backward merely
scales what is done. Sequence ratios (GSPO), and sequence importance weights, need every log-prob of a turn before the
first gradient: they sweep twice and cost a fourth product. `linear_logprob` forms its logits again in the backward
pass, unless it may keep the softmax; `logits_logprob` starts from logits that are there.

    loss, stats = linear_policy_loss(hidden, head.weight, targets, advantages, weights, loss=PolicyLoss(beta=0.01),
                                     ref_logp_T=ref)
    loss.backward()
"""

from __future__ import annotations

from typing import Any

import torch
from ilr_kernels import lm_head_checks as checks
from ilr_kernels.backend import uses_triton
from ilr_kernels.lm_head_autograd import FormedGradients, LinearLogprob, choose_sweep, differentiates, make_buffers
from ilr_kernels.policy_loss import PolicyLoss, TokenInputs, TokenLoss, Turns, mean_stats, sum_stats, token_loss
from ilr_kernels.rows import Counting, Gate, capturing, counted, over_needed_rows, put, take
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Swept, accumulation_dtype
from torch import Tensor

DEFAULT_LOSS = PolicyLoss()


@torch.compiler.disable
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
    """Natural log-probs of the targets, and with `with_entropy` the entropies of the distributions (nats).

    hidden_TD [T, D] and weight_VD [V, D] are float tensors of one dtype, target_T [T] int64 (`target_T[t]` is the token
    that `hidden_TD[t]` predicts). Rows whose target is −100 give 0 and no gradient. Returns logp_T [T], or
    (logp_T, entropy_T), in float32 (float64 for float64 input), differentiable in hidden, weight and bias.

    The backward pass forms the logits again: four products in all. On a GPU in bfloat16 `keep_softmax` holds the
    exponentials from forward to backward instead, 2 · T · V bytes, and saves the fourth; backward() then works once.
    Raises ValueError naming the argument for a wrong shape, dtype or device and for a target outside the vocabulary.
    """
    checks.check_head(hidden_TD, weight_VD, target_T, bias_V, temperature, softcap)
    if capturing(hidden_TD):
        ignored_T, counting = target_T == checks.IGNORED, None
        target_T = torch.where(ignored_T, 0, target_T)
    else:
        ignored_T, counting = None, Counting(target_T, (), weight_VD.shape[0])
    keep_softmax = keep_softmax and differentiates(hidden_TD, weight_VD, bias_V, None)
    logp_T, entropy_T = LinearLogprob.apply(
        hidden_TD, weight_VD, bias_V, target_T, counting, temperature, softcap, with_entropy, keep_softmax
    )
    if ignored_T is not None:
        logp_T, entropy_T = (None if x is None else torch.where(ignored_T, 0, x) for x in (logp_T, entropy_T))
    return (logp_T, entropy_T) if with_entropy else logp_T


@torch.no_grad()
@torch.compiler.disable
def logits_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Natural log-probs of the targets from given logits, and with `with_entropy` entropies (nats); not differentiable.

    logits_TV [T, V] is a float tensor of any dtype, read once and left as it is; target_T [T] int64, −100 gives 0.
    Returns logp_T [T], or (logp_T, entropy_T), in float32 (float64 for float64 logits). Raises ValueError naming the
    argument for a wrong shape, dtype or device and for a target outside the vocabulary.
    """
    checks.check_logits(logits_TV, target_T, temperature, softcap)
    counting = None if capturing(logits_TV) else Counting(target_T, (), logits_TV.shape[1])
    if uses_triton(logits_TV):
        from ilr_kernels.lm_head_triton import read_logits as read
    else:
        from ilr_kernels.logits_torch import read_logits as read
    logp_T, entropy_T = read(logits_TV, target_T, temperature, softcap)
    if counting is not None:
        counting.check()
    return (logp_T, entropy_T) if with_entropy else logp_T


@torch.compiler.disable
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
    with_logp: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Σ token_weight · per-token policy loss (formulas: `policy_loss.py`), and statistics.

    hidden_TD [T, D] and weight_VD [V, D] are float tensors of one dtype; target_T [T] is int64, −100 where ignored; the
    other _T arguments are float vectors [T]. `old_logp_T=None` means on-policy: every ratio is 1. `turn_T` (integers)
    numbers the turns that sequence ratios and weights are taken over; a turn must lie within one call. `chunk` is the
    number of rows whose logits are held at once.

    Returns a 0-d loss (float32; float64 for float64 input) and a dict of detached tensors: `logp_T` and `entropy_T`
    (NaN in rows that were skipped, because their weight or advantage is 0 and neither KL, entropy bonus nor another
    token of their turn needs them; `with_logp` asks for those of every row whose target is not −100), the 0-d means
    `entropy`, `kl`, `clip_share`, `truncated_share` (`mean_stats`; None for `kl` without ref_logp_T and for
    `truncated_share` without importance weights), and under `sums` what these means are made of, which adds up over
    micro-batches (`sum_stats`).

    Gradients of hidden, weight and bias are formed in this call wherever they are required and grad mode is on;
    backward() scales them, once. With `weight_grad_VD` (weight's shape; its dtype or float32) dweight is added to that
    buffer here and now, and none flows to weight_VD; the loss must then reach backward() unscaled: another upstream
    gradient than 1 raises on the CPU and gives a NaN dhidden on a GPU, where looking would stall. On a GPU dweight adds
    up over chunks in the dtype of what it is added to: for 16-bit heads a float32 `weight_grad_VD` is more exact.
    While a CUDA graph is captured, values are not checked and no row is skipped (both would have to wait for the GPU).
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
    forms_gradients = differentiates(hidden_TD, weight_VD, bias_V, weight_grad_VD)
    head = Head(weight_VD, bias_V, temperature, softcap)
    dtype = accumulation_dtype(hidden_TD.dtype)

    def run(rows: Tensor | None, gate: Gate | None) -> tuple[Tensor | None, TokenInputs, Gradients | None, Swept]:
        turns = Turns.of(take(turn_T, rows)) if loss.over_turns and turn_T is not None else None
        inputs = TokenInputs(*(x if x is None else take(x, rows).to(dtype) for x in vectors.values()), turns)
        hidden_ND, target_N = take(hidden_TD, rows), take(target_T, rows)
        grads = make_buffers(head, hidden_ND, hidden_TD.requires_grad, weight_grad_VD) if forms_gradients else None
        return rows, inputs, grads, _sweep_policy(head, hidden_ND, target_N, loss, inputs, grads, chunk, gate)

    with torch.no_grad():
        if capturing(hidden_TD):
            target_T, vectors = _masked(target_T, vectors)
            counting = None
        else:
            factors = _factors(loss, target_T, advantage_T, token_weight_T, turn_T)
            counting = Counting(target_T, factors, weight_VD.shape[0])
        rows, inputs, grads, swept = over_needed_rows(counting, run)
        value, stats = _stats(loss, swept, inputs, rows, target_T.shape[0])
        if with_logp and counting is not None and rows is not None:
            _fill_rest(head, hidden_TD, target_T, counting.rest(), chunk, stats)
    if grads is None:
        return value, stats
    formed = (
        None if grads.hidden_ND is None else put(grads.hidden_ND, rows, target_T.shape[0], 0),
        None if weight_grad_VD is not None or grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype),
        None if grads.bias_V is None else grads.bias_V.to(weight_VD.dtype),
    )
    return FormedGradients.apply(hidden_TD, weight_VD, bias_V, value, formed, weight_grad_VD is not None), stats


def _sweep_policy(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    loss: PolicyLoss,
    inputs: TokenInputs,
    grads: Gradients | None,
    chunk: int | None,
    gate: Gate | None,
) -> Swept:
    """One sweep where each row's loss is its own; two where it is its turn's: log-probs first, then gradients."""
    sweep = choose_sweep(hidden_ND, head.weight_VD)
    if target_N.shape[0] == 0:
        nothing_N = inputs.weight_N
        return Swept(nothing_N, nothing_N, TokenLoss(*[nothing_N] * 6))
    if not loss.over_turns:
        return sweep(head, hidden_ND, target_N, Policy(loss, inputs), grads, chunk, gate=gate)
    swept = sweep(head, hidden_ND, target_N, None, None, chunk, gate=gate)
    losses = token_loss(loss, swept.logp_N, swept.entropy_N, inputs)
    if grads is not None:
        step = Given(losses.dlogp_N, losses.dentropy_N if loss.entropy_coef != 0 else None)
        sweep(head, hidden_ND, target_N, step, grads, chunk)
    return swept._replace(losses=losses)


def _masked(target_T: Tensor, vectors: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Ignored rows as rows of zero weight, where none can be left out: while a CUDA graph is captured."""
    valid_T = target_T != checks.IGNORED
    masked = {name: None if x is None else torch.where(valid_T, x, 0) for name, x in vectors.items()}
    return torch.where(valid_T, target_T, 0), masked


def _factors(
    loss: PolicyLoss, target_T: Tensor, advantage_T: Tensor, weight_T: Tensor, turn_T: Tensor | None
) -> tuple[Tensor, ...]:
    """What must not be 0 for a row to be needed; a row is where any of its turn is, if the loss is over turns."""
    factors = (weight_T, advantage_T) if loss.beta == 0 and loss.entropy_coef == 0 else (weight_T,)
    if not loss.over_turns or turn_T is None:
        return factors
    turns = Turns.of(turn_T)
    return (turns.sum(counted(target_T, factors).float()),)


def _fill_rest(
    head: Head, hidden_TD: Tensor, target_T: Tensor, rest: Tensor, chunk: int | None, stats: dict[str, Any]
) -> None:
    """Log-probs and entropies of the rows that the loss does not need."""
    if rest.shape[0] == 0:
        return
    hidden_ND = take(hidden_TD, rest)
    swept = choose_sweep(hidden_ND, head.weight_VD)(head, hidden_ND, take(target_T, rest), None, None, chunk)
    stats["logp_T"].index_copy_(0, rest, swept.logp_N)
    stats["entropy_T"].index_copy_(0, rest, swept.entropy_N)


def _stats(
    loss: PolicyLoss, swept: Swept, inputs: TokenInputs, rows: Tensor | None, tokens: int
) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and what is told of it."""
    assert swept.losses is not None and swept.entropy_N is not None
    if uses_triton(swept.logp_N):
        from ilr_kernels.stats_triton import sum_losses

        value, sums, means = sum_losses(swept.losses, swept.entropy_N, inputs)
    else:
        value, sums = swept.losses.value_N.sum(), sum_stats(swept.losses, swept.entropy_N, inputs)
        means = mean_stats(sums)
    stats: dict[str, Any] = dict(means)
    if inputs.ref_logp_N is None:
        stats["kl"] = None
    if loss.importance == "none":
        stats["truncated_share"] = None
    stats["logp_T"] = put(swept.logp_N, rows, tokens, float("nan"))
    stats["entropy_T"] = put(swept.entropy_N, rows, tokens, float("nan"))
    stats["sums"] = sums
    return value, stats
