"""The Triton pass over a chunk's logits: softmax statistics, then the gradient in the logits' place.

One program takes one row, reads it once for the statistics and, where a gradient is wanted, once more to overwrite it.
The sums are of exponentials relative to the target's own logit, or the first block's largest if that is above it, so
that no maximum is reduced on the way; a row whose sum comes out large all the same is read twice more, relative to its
peak. Everything is calculated in float32 whatever the logits are held in.
"""

import triton
import triton.language as tl
from ilr_kernels.kernel_math import log1p, tanh
from ilr_kernels.policy_loss_kernel import row_derivatives

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGE = tl.constexpr(1048576.0)  # sums above it have lost digits of the entropy


@triton.jit
def _capped(logit, softcap, SOFTCAP: tl.constexpr):
    """The soft-capped logit, and its derivative by the raw one."""
    slope = 1.0
    if SOFTCAP:
        bounded = tanh(logit / softcap)
        logit = softcap * bounded
        slope = 1.0 - bounded * bounded
    return logit, slope


@triton.jit
def _sums(p_row, target, shift, vocabulary, softcap, scale, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """(Σ 2^y, Σ 2^y y) over v ≠ target, y = scale (logit − shift): a confident row's 1 − p is not rounded away."""
    o_v = tl.arange(0, BLOCK_V)
    b_others = tl.zeros([BLOCK_V], tl.float32)
    b_moment = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        m_v = start + o_v < vocabulary
        b_logit, _b_slope = _capped(tl.load(p_row + start + o_v, mask=m_v, other=0.0).to(tl.float32), softcap, SOFTCAP)
        b_y = (b_logit - shift) * scale
        b_e = tl.exp2(b_y)
        if (start + BLOCK_V > vocabulary) | ((target >= start) & (target < start + BLOCK_V)):
            b_e = tl.where(m_v & (start + o_v != target), b_e, 0.0)
        b_others += b_e
        b_moment += b_e * b_y
    return tl.sum(b_others, 0), tl.sum(b_moment, 0)


@triton.jit
def _peak(p_row, last, vocabulary, softcap, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """The largest soft-capped logit of a row in the blocks before `last`."""
    o_v = tl.arange(0, BLOCK_V)
    b_peak = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in range(0, last, BLOCK_V):
        m_v = start + o_v < vocabulary
        b_logit, _b_slope = _capped(tl.load(p_row + start + o_v, mask=m_v, other=0.0).to(tl.float32), softcap, SOFTCAP)
        b_peak = tl.maximum(b_peak, tl.where(m_v, b_logit, -float("inf")))
    return tl.max(b_peak, 0)


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
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STEP: tl.constexpr,  # "statistics", "given" or "policy"
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
):
    """A row of logits: log-prob, entropy, by STEP the loss's parts and the gradient in the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * stride
    row += first_row
    target = tl.load(p_target + row)
    if (target < 0) | (target >= vocabulary):  # an ignored row, where none was left out
        tl.store(p_logp + row, 0.0)
        tl.store(p_entropy + row, 0.0)
        return
    target_logit, _target_slope = _capped(tl.load(p_row + target).to(tl.float32), softcap, SOFTCAP)
    scale = LOG2E / temperature
    shift = tl.maximum(target_logit, _peak(p_row, 1, vocabulary, softcap, SOFTCAP, BLOCK_V))
    others, moment = _sums(p_row, target, shift, vocabulary, softcap, scale, SOFTCAP, BLOCK_V)
    if not (others < LARGE):  # the peak is far above: sums relative to that
        shift = _peak(p_row, vocabulary, vocabulary, softcap, SOFTCAP, BLOCK_V)
        others, moment = _sums(p_row, target, shift, vocabulary, softcap, scale, SOFTCAP, BLOCK_V)
    distance = (target_logit - shift) * scale
    own = tl.exp2(distance)
    total = own + others
    log_total = log1p(tl.where(distance == 0.0, others, total - 1.0))
    logp = distance * LN2 - log_total
    entropy = log_total - (moment + own * distance) * LN2 / total
    tl.store(p_logp + row, logp)
    tl.store(p_entropy + row, entropy)

    dlogp, dentropy = row_derivatives(
        row, row >= 0, logp, entropy, p_dlogp, p_dentropy, p_weight, p_advantage, p_old, p_ref, p_behavior,
        p_value, p_clipped, p_kl, p_truncated, clip_low, clip_high, dual_clip, importance_cap, beta, entropy_coef,
        STEP=STEP, OBJECTIVE=OBJECTIVE, DUAL_CLIP=DUAL_CLIP, KL=KL, IMPORTANCE_MODE=IMPORTANCE_MODE,
    )  # fmt: skip

    if GRADIENT:
        at_target = (dlogp * others - dentropy * own * (logp + entropy)) / total
        log2_total = log_total * LOG2E
        inverse = 1.0 / temperature
        o_v = tl.arange(0, BLOCK_V)
        for start in range(0, vocabulary, BLOCK_V):
            m_v = start + o_v < vocabulary
            b_logit = tl.load(p_row + start + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_logit, b_slope = _capped(b_logit, softcap, SOFTCAP)
            b_y = (b_logit - shift) * scale - log2_total  # in this order nothing is rounded at the peak's size
            b_dx = -tl.exp2(b_y) * (dlogp + dentropy * (b_y * LN2 + entropy))
            b_dx = tl.where(start + o_v == target, at_target, b_dx) * inverse * b_slope
            tl.store(p_row + start + o_v, b_dx.to(p_logits.dtype.element_ty), mask=m_v)
