"""Triton kernels of the LM head in bfloat16: the softmax's sums are taken while the logits are still accumulators.

With x the finished logit, and a row's shift c its target's own logit (so that Σ exp(x − c) ≥ 1 cannot vanish):

    product_kernel   e = exp(x − c) in bfloat16, 0 at the target; per tile Σ e and Σ e (x − c), both from float32
    sums_kernel      others = Σ e over v ≠ target;  log π = −log(1 + others);  H = log Z − Σ e (x − c) / Z
    factors_kernel   the row's factor f, and at the target −others, so that f · e is the gradient of the logits:
                     g (1[v = target] − p_v) = f e_v,  f = −g / Z,  1 − p_target = others / Z

So the logits are never rounded, a confident token's 1 − p keeps all its digits, and what is left between the products
is a factor for each row, which goes into the smaller sides of the two gradient products. Where exp(x − c) overflows (a
target some 70 nats below the peak), the row's shift is raised to its peak and the chunk's product done again: the
kernels with REDO start by reading whether that is needed. Exponents count in powers of two.
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


@triton.jit
def _tile(b_logit, b_bias, b_shift, b_local, left, o_n, inside, scale, softcap,
          SOFTCAP: tl.constexpr, SLOPE: tl.constexpr, MOMENT: tl.constexpr, PEAK: tl.constexpr):  # fmt: skip
    """(what is stored, Σ e or the peak, Σ e (x − c)) of a tile of raw logits."""
    if b_bias is not None:
        b_logit += b_bias[None, :]
    b_slope = 1.0
    if SOFTCAP:
        b_tanh = tanh(b_logit / softcap)
        b_logit = softcap * b_tanh
        b_slope = 1.0 - b_tanh * b_tanh
    b_moment = 0.0
    if PEAK:
        b_x = tl.where(o_n[None, :] < left, b_logit * scale, -float("inf"))
        b_total = tl.max(b_x, 1)
        b_e = b_x
    else:
        b_y = b_logit * scale - b_shift[:, None]
        b_e = tl.exp2(b_y)
        if inside:  # a target's column is here, or the vocabulary's end
            b_e = tl.where((o_n[None, :] == b_local[:, None]) | (o_n[None, :] >= left), 0.0, b_e)
        b_total = tl.sum(b_e, 1)
        if MOMENT:
            b_moment = tl.sum(b_e * b_y, 1)
        if SOFTCAP and SLOPE:
            b_e *= b_slope
    return b_e, b_total, b_moment


@triton.jit
def _store(exps, b_e, m, n, rows, vocabulary, stride, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        exps.store([m, n], b_e.to(tl.bfloat16))
    else:
        o_m, o_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, WIDTH)
        inside = (o_m[:, None] < rows) & (o_n[None, :] < vocabulary)
        p_e = exps + o_m.to(tl.int64)[:, None] * stride + o_n[None, :]
        tl.store(p_e, b_e.to(exps.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    hidden,  # TMA descriptors, or pointers, of [rows, D], [V, D] and, unless nothing is stored, [rows, V]
    weight,
    exps,
    p_bias,
    p_target,
    p_shift,
    p_total,  # [tiles of the vocabulary, rows]
    p_moment,
    p_redo,  # whether the launch is needed; None: it is
    rows,
    vocabulary,
    depth,
    hidden_stride,
    weight_stride,
    exps_stride,
    scale,  # log2 e / temperature
    softcap,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,  # whether the soft-cap's slope goes into what is stored
    MOMENT: tl.constexpr,
    PEAK: tl.constexpr,  # the rows' largest x in the place of the sums, and nothing stored
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,  # the next tile's first loads start before this one is finished
    HALVES: tl.constexpr,  # the tile is finished in two halves, which need half the shared memory
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 wrongly
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A persistent program takes every PROGRAMS-th tile; GROUP tiles of rows share the weights of one pass."""
    needed = 1
    if p_redo is not None:
        needed = tl.load(p_redo)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(vocabulary, BLOCK_N)
    tiles = tiles_m * tiles_n * needed
    steps = tl.cdiv(depth, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        band = tile // (GROUP * tiles_n)
        height = min(tiles_m - band * GROUP, GROUP)
        within = tile - band * GROUP * tiles_n
        m = (band * GROUP + within % height) * BLOCK_M
        n = (within // height) * BLOCK_N
        o_m, o_n = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        m_m = o_m < rows
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(steps):
            if TMA:
                b_h = hidden.load([m, k * BLOCK_K])
                b_w = weight.load([n, k * BLOCK_K])
            else:
                o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
                m_k = o_k[None, :] < depth
                p_h = hidden + o_m.to(tl.int64)[:, None] * hidden_stride + o_k[None, :]
                p_w = weight + (n + o_n).to(tl.int64)[:, None] * weight_stride + o_k[None, :]
                b_h = tl.load(p_h, mask=m_m[:, None] & m_k, other=0.0)
                b_w = tl.load(p_w, mask=(n + o_n < vocabulary)[:, None] & m_k, other=0.0)
            if WIDEN:
                b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
            acc = tl.dot(b_h, b_w.T, acc)

        b_shift = tl.load(p_shift + o_m, mask=m_m, other=0.0)
        b_local = tl.load(p_target + o_m, mask=m_m, other=-1).to(tl.int32) - n
        left = vocabulary - n
        inside = (left < BLOCK_N) | (tl.max(((b_local >= 0) & (b_local < BLOCK_N)).to(tl.int32), 0) > 0)
        if HALVES:
            WIDTH: tl.constexpr = BLOCK_N // 2
            o_h = tl.arange(0, WIDTH)
            first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
            b_bias, b_more = None, None
            if p_bias is not None:
                b_bias = tl.load(p_bias + n + o_h, mask=o_h < left, other=0.0).to(tl.float32)
                b_more = tl.load(p_bias + n + WIDTH + o_h, mask=WIDTH + o_h < left, other=0.0).to(tl.float32)
            b_e, b_total, b_moment = _tile(
                first, b_bias, b_shift, b_local, left, o_h, inside, scale, softcap, SOFTCAP, SLOPE, MOMENT, PEAK
            )
            if exps is not None:
                _store(exps, b_e, m, n, rows, vocabulary, exps_stride, BLOCK_M, WIDTH, TMA)
            b_e, b_total_2, b_moment_2 = _tile(
                second, b_more, b_shift, b_local - WIDTH, left - WIDTH, o_h, inside, scale, softcap,
                SOFTCAP, SLOPE, MOMENT, PEAK,
            )  # fmt: skip
            if exps is not None:
                _store(exps, b_e, m, n + WIDTH, rows, vocabulary, exps_stride, BLOCK_M, WIDTH, TMA)
            b_total = tl.maximum(b_total, b_total_2) if PEAK else b_total + b_total_2
            b_moment += b_moment_2
        else:
            b_bias = None
            if p_bias is not None:
                b_bias = tl.load(p_bias + n + o_n, mask=o_n < left, other=0.0).to(tl.float32)
            b_e, b_total, b_moment = _tile(
                acc, b_bias, b_shift, b_local, left, o_n, inside, scale, softcap, SOFTCAP, SLOPE, MOMENT, PEAK
            )
            if exps is not None:
                _store(exps, b_e, m, n, rows, vocabulary, exps_stride, BLOCK_M, BLOCK_N, TMA)
        o = (n // BLOCK_N) * rows + o_m
        tl.store(p_total + o, b_total, mask=m_m)
        if MOMENT:
            tl.store(p_moment + o, b_moment, mask=m_m)


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
    log_sum = tl.where(distance == 0.0, log1p(others), tl.log(own + others))
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
    softcap,
    temperature,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    beta,
    entropy_coef,
    STEP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,  # whether the entropy has a gradient: the factor then leaves out dlogp
    SOFTCAP: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
        p_entry = p_exps + o_r.to(tl.int64) * exps_stride + tl.load(p_target + o_r, mask=m_r, other=0)
        tl.store(p_entry, (at_target * slope).to(p_exps.dtype.element_ty), mask=m_r)


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
    m_v = (o_v < vocabulary) & (o_v != tl.load(p_target + row))
    b_e = tl.load(p_e, mask=m_v, other=0.0).to(tl.float32)
    b_y = tl.log2(tl.where(b_e > 0.0, b_e, 1.0))
    b_s = b_e * (dlogp + dentropy * (b_y * LN2 + offset))
    if SOFTCAP:
        b_tanh = (b_y + shift) * LN2 * temperature / softcap
        b_s *= 1.0 - b_tanh * b_tanh
    tl.store(p_e, b_s.to(p_exps.dtype.element_ty), mask=m_v)
