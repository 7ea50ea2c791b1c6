"""The Triton pass over a chunk's logits: softmax statistics, then the gradient in the logits' place.

One program takes one row, reads it once for the statistics (a running maximum and the sums rescaled to it) and, where a
gradient is wanted, once more to overwrite it. Everything is calculated in float32 whatever the logits are held in.
"""

import triton
import triton.language as tl
from ilr_kernels.kernel_math import log1p, tanh
from ilr_kernels.policy_loss_kernel import row_derivatives


@triton.jit
def _finish(logit, softcap, temperature, SOFTCAP: tl.constexpr):
    """The finished logit and its derivative by the raw one: soft-cap first, then temperature."""
    slope = 1.0 / temperature
    if SOFTCAP:
        bounded = tanh(logit / softcap)
        logit = softcap * bounded
        slope *= 1.0 - bounded * bounded
    return logit / temperature, slope


@triton.jit(do_not_specialize=["first_row"])
def rows_kernel(
    p_logits,  # [chunk, V], the gradient takes their place
    p_target,
    p_logp,
    p_entropy,
    p_dlogp,  # read for STEP "given", written for "policy"
    p_dentropy,  # read for "given"; None: 0
    p_weight,  # from here on for "policy" alone
    p_advantage,
    p_old,
    p_ref,
    p_behavior,
    p_value,
    p_clipped,
    p_kl,
    p_truncated,
    first_row,  # the chunk's first row in the vectors
    vocabulary,
    stride,
    softcap,
    temperature,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    beta,
    entropy_coef,
    STEP: tl.constexpr,  # "statistics", "given" or "policy"
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * stride
    row += first_row
    target = tl.load(p_target + row)
    target_logit = tl.load(p_row + target).to(tl.float32)
    target_x, _target_slope = _finish(target_logit, softcap, temperature, SOFTCAP)
    o_v = tl.arange(0, BLOCK_V)

    peak = -float("inf")
    others = 0.0  # Σ over v ≠ target of exp(x − peak): a confident row's 1 − p is not rounded away
    moment = 0.0  # Σ over v ≠ target of exp(x − peak) (x − peak)
    for start in range(0, vocabulary, BLOCK_V):
        m_v = start + o_v < vocabulary
        b_logit = tl.load(p_row + start + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_x, _b_slope = _finish(b_logit, softcap, temperature, SOFTCAP)
        new_peak = tl.maximum(peak, tl.max(tl.where(m_v, b_x, -float("inf")), 0))
        drop = tl.where(start == 0, 0.0, peak - new_peak)
        b_x -= new_peak
        b_e = tl.where(m_v & (start + o_v != target), tl.exp(b_x), 0.0)
        scale = tl.exp(drop)
        moment = scale * (moment + drop * others) + tl.sum(b_e * b_x, 0)
        others = scale * others + tl.sum(b_e, 0)
        peak = new_peak
    distance = target_x - peak
    own = tl.exp(distance)
    total = own + others
    log_total = tl.where(distance == 0.0, log1p(others), tl.log(total))
    logp = distance - log_total
    entropy = log_total - (moment + own * distance) / total
    tl.store(p_logp + row, logp)
    tl.store(p_entropy + row, entropy)

    dlogp, dentropy = row_derivatives(
        row, row >= 0, logp, entropy, p_dlogp, p_dentropy, p_weight, p_advantage, p_old, p_ref, p_behavior,
        p_value, p_clipped, p_kl, p_truncated, clip_low, clip_high, dual_clip, importance_cap, beta, entropy_coef,
        STEP=STEP, OBJECTIVE=OBJECTIVE, DUAL_CLIP=DUAL_CLIP, KL=KL, IMPORTANCE_MODE=IMPORTANCE_MODE,
    )  # fmt: skip

    if GRADIENT:
        at_target = (dlogp * others - dentropy * own * (logp + entropy)) / total
        for start in range(0, vocabulary, BLOCK_V):
            m_v = start + o_v < vocabulary
            b_logit = tl.load(p_row + start + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_x, b_slope = _finish(b_logit, softcap, temperature, SOFTCAP)
            b_logp = b_x - peak - log_total  # in this order nothing is rounded at the peak's size
            b_dx = -tl.exp(b_logp) * (dlogp + dentropy * (b_logp + entropy))
            b_dx = tl.where(start + o_v == target, at_target, b_dx)
            tl.store(p_row + start + o_v, (b_dx * b_slope).to(p_logits.dtype.element_ty), mask=m_v)
