"""Triton kernels around the product of the LM head in bfloat16: what is done once for each row (formulas:
`softmax_product_kernel.py`), and the entropy's part of the gradient.

    target_kernel    the target's own logit, which a row's exponentials are relative to
    sums_kernel      log-prob and entropy from the sums of all tiles
    peaks_kernel     raises the shift of rows whose sum overflowed
    factors_kernel   the losses, each row's factor, and the gradient's entry at the target
    entropy_kernel   where the entropy has a gradient: a pass over the exponentials
"""

import triton
import triton.language as tl
from ilr_kernels.kernel_math import log1p, tanh
from ilr_kernels.policy_loss_kernel import row_derivatives

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
OVERFLOW = tl.constexpr(1.2676506e30)  # 2^100: sums above it are not trusted


@triton.jit
def target_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_target,
    p_target_x,  # [rows] the target's finished logit, times log2 e
    p_shift,  # [rows] the same
    p_redo,  # [1] cleared
    vocabulary,
    depth,
    hidden_stride,
    weight_stride,
    softcap,
    temperature,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one row's target logit in float32; 0 where the target is outside the vocabulary."""
    row = tl.program_id(0)
    target = tl.load(p_target + row)
    target = tl.where((target < 0) | (target >= vocabulary), 0, target)
    p_h = p_hidden + row.to(tl.int64) * hidden_stride
    p_w = p_weight + target * weight_stride
    o_d = tl.arange(0, BLOCK_D)
    b_dot = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, depth, BLOCK_D):
        m_d = start + o_d < depth
        b_h = tl.load(p_h + start + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dot += b_h * tl.load(p_w + start + o_d, mask=m_d, other=0.0).to(tl.float32)
    logit = tl.sum(b_dot, 0)
    if p_bias is not None:
        logit += tl.load(p_bias + target).to(tl.float32)
    if SOFTCAP:
        logit = softcap * tanh(logit / softcap)
    logit = logit / temperature * LOG2E
    tl.store(p_target_x + row, logit)
    if row == 0:
        tl.store(p_redo, 0)
    tl.store(p_shift + row, logit)


@triton.jit(do_not_specialize=["rows"])
def peaks_kernel(p_total, p_shift, p_others, p_redo, rows, tiles, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    """Raises the shift of rows whose sum overflowed to their peak, which `product_kernel` left in the sums' place."""
    if tl.load(p_redo) == 0:
        return
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    b_peak = tl.full([BLOCK_T, BLOCK_R], -float("inf"), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        p_t = p_total + o_t.to(tl.int64)[:, None] * rows + o_r[None, :]
        b_peak = tl.maximum(b_peak, tl.load(p_t, mask=(o_t < tiles)[:, None] & m_r[None, :], other=-float("inf")))
    over = tl.load(p_others + o_r, mask=m_r, other=0.0) >= OVERFLOW
    tl.store(p_shift + o_r, tl.max(b_peak, 0), mask=m_r & over)


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    p_total,
    p_moment,
    p_target_x,
    p_shift,
    p_others,  # [rows] Σ over v ≠ target of exp(x − c)
    p_logp,
    p_entropy,
    p_redo,  # set where a sum overflowed; for REDO: read first
    rows,
    tiles,
    REDO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds up the tiles of BLOCK_R rows, always in the same order."""
    if REDO and tl.load(p_redo) == 0:
        return
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    b_total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    b_moment = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        o = o_t.to(tl.int64)[:, None] * rows + o_r[None, :]
        m = (o_t < tiles)[:, None] & m_r[None, :]
        b_total += tl.load(p_total + o, mask=m, other=0.0)
        if p_entropy is not None:
            b_moment += tl.load(p_moment + o, mask=m, other=0.0)
    others = tl.sum(b_total, 0)
    distance = tl.load(p_target_x + o_r, mask=m_r, other=0.0) - tl.load(p_shift + o_r, mask=m_r, other=0.0)
    own = tl.exp2(distance)  # 1 unless the shift was raised
    log_sum = log1p(tl.where(distance == 0.0, others, own + others - 1.0))
    tl.store(p_others + o_r, others, mask=m_r)
    tl.store(p_logp + o_r, distance * LN2 - log_sum, mask=m_r)
    if p_entropy is not None:
        moment = (tl.sum(b_moment, 0) + own * distance) * LN2
        tl.store(p_entropy + o_r, log_sum - moment / (own + others), mask=m_r)
    if not REDO:
        over = tl.max(tl.where(m_r & (others >= OVERFLOW), 1, 0), 0)
        if over > 0:
            tl.store(p_redo, 1)


@triton.jit(do_not_specialize=["rows"])
def factors_kernel(
    p_exps,
    p_more,  # exponentials from the token `split` on, where they lie elsewhere; or None
    p_target,
    p_target_x,
    p_shift,
    p_others,
    p_logp,
    p_entropy,
    p_factor,  # [rows] what a row of exps is multiplied with to give the gradient of its logits
    p_dlogp,
    p_dentropy,
    p_weight,
    p_advantage,
    p_old,
    p_ref,
    p_behavior,
    p_value,
    p_clipped,
    p_kl,
    p_truncated,
    rows,
    exps_stride,
    more_stride,
    split,
    softcap,
    temperature,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    beta,
    entropy_coef,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,  # whether the entropy has a gradient: the factor then leaves out dlogp
    SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
):
    """The losses of BLOCK_R rows, their factors, and the gradient's entry at the target."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    logp = tl.load(p_logp + o_r, mask=m_r, other=0.0)
    entropy = 0.0
    if p_entropy is not None:
        entropy = tl.load(p_entropy + o_r, mask=m_r, other=0.0)
    dlogp, dentropy = row_derivatives(
        o_r, m_r, logp, entropy, p_dlogp, p_dentropy, p_weight, p_advantage, p_old, p_ref, p_behavior,
        p_value, p_clipped, p_kl, p_truncated, clip_low, clip_high, dual_clip, importance_cap, beta, entropy_coef,
        STEP=STEP, OBJECTIVE=OBJECTIVE, DUAL_CLIP=DUAL_CLIP, KL=KL, IMPORTANCE_MODE=IMPORTANCE_MODE,
    )  # fmt: skip
    if GRADIENT:
        target_x = tl.load(p_target_x + o_r, mask=m_r, other=0.0)
        own = tl.exp2(target_x - tl.load(p_shift + o_r, mask=m_r, other=0.0))
        others = tl.load(p_others + o_r, mask=m_r, other=0.0)
        slope = 1.0
        if SOFTCAP:
            bounded = target_x * LN2 * temperature / softcap
            slope = 1.0 - bounded * bounded
        factor = -1.0 / ((own + others) * temperature)
        at_target = -others
        if ENTROPY:
            at_target = at_target * dlogp + dentropy * own * (logp + entropy)
        else:
            factor *= dlogp
        tl.store(p_factor + o_r, factor, mask=m_r)
        target = tl.load(p_target + o_r, mask=m_r, other=0)
        entry = (at_target * slope).to(p_exps.dtype.element_ty)
        m_first = m_r
        if p_more is not None:
            m_first = m_r & (target < split)
            tl.store(p_more + o_r.to(tl.int64) * more_stride + target - split, entry, mask=m_r & (target >= split))
        tl.store(p_exps + o_r.to(tl.int64) * exps_stride + target, entry, mask=m_first)


@triton.jit
def entropy_kernel(
    p_exps,  # exponentials in, e (g + h (log p + H)) out
    p_target,
    p_shift,
    p_others,
    p_target_x,
    p_entropy,
    p_dlogp,
    p_dentropy,
    vocabulary,
    exps_stride,
    softcap,
    temperature,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The entropy's part of the gradient, by element: the logit is recovered from its exponential."""
    row = tl.program_id(0)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dlogp = tl.load(p_dlogp + row)
    dentropy = tl.load(p_dentropy + row)
    shift = tl.load(p_shift + row)
    total = tl.exp2(tl.load(p_target_x + row) - shift) + tl.load(p_others + row)
    offset = tl.load(p_entropy + row) - tl.log(total)
    p_e = p_exps + row.to(tl.int64) * exps_stride + o_v
    m_v = o_v < vocabulary
    b_e = tl.load(p_e, mask=m_v, other=0.0).to(tl.float32)
    b_y = tl.log2(tl.where(b_e > 0.0, b_e, 1.0))
    b_s = b_e * (dlogp + dentropy * (b_y * LN2 + offset))
    if SOFTCAP:
        b_tanh = (b_y + shift) * LN2 * temperature / softcap
        b_s *= 1.0 - b_tanh * b_tanh
    b_s = tl.where(o_v == tl.load(p_target + row), b_e, b_s)  # that entry is made; a mask would split the accesses
    tl.store(p_e, b_s.to(p_exps.dtype.element_ty), mask=m_v)
