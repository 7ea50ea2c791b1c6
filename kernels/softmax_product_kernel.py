"""The first product of the LM head in bfloat16: the softmax's sums are taken while the logits are still accumulators.

With x the finished logit, and a row's shift c its target's own logit (so that Σ exp(x − c) ≥ 1 cannot vanish):

    product_kernel   e = exp(x − c) in bfloat16, 0 at the target; per tile Σ e and Σ e (x − c), both from float32
    sums_kernel      others = Σ e over v ≠ target;  log π = −log(1 + others);  H = log Z − Σ e (x − c) / Z
    factors_kernel   the row's factor f, and at the target −others, so that f · e is the gradient of the logits:
                     g (1[v = target] − p_v) = f e_v,  f = −g / Z,  1 − p_target = others / Z

So the logits are never rounded, a confident token's 1 − p keeps all its digits, and what is left between the products
is a factor for each row, which goes into the smaller sides of the two gradient products. Where exp(x − c) overflows (a
target some 70 nats below the peak), the row's shift is raised to its peak and the chunk's product done again: the
kernels with REDO start by reading whether that is needed. Exponents count in powers of two. The kernels around the
product are in `softmax_rows_kernel.py`.
"""

import triton
import triton.language as tl
from ilr_kernels.kernel_math import tanh


@triton.jit
def _finish(b_logit, exps, p_bias, b_target, b_shift, m, n, rows, vocabulary, exps_stride, inside, scale, softcap,
            BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr,
            MOMENT: tl.constexpr, PEAK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Finishes and stores WIDTH columns of raw logits from column n on; (Σ e or the peak, Σ e (x − c)) of each row."""
    o_n = n + tl.arange(0, WIDTH)
    if p_bias is not None:
        b_logit += tl.load(p_bias + o_n, mask=o_n < vocabulary, other=0.0).to(tl.float32)[None, :]
    b_slope = 1.0
    if SOFTCAP:
        b_tanh = tanh(b_logit / softcap)
        b_logit = softcap * b_tanh
        b_slope = 1.0 - b_tanh * b_tanh
    b_moment = 0.0
    if PEAK:
        b_e = tl.where(o_n[None, :] < vocabulary, b_logit * scale, -float("inf"))
        b_total = tl.max(b_e, 1)
    else:
        b_y = b_logit * scale - b_shift[:, None]
        b_e = tl.exp2(b_y)
        if inside:  # a target's column is here, or the vocabulary's end
            b_e = tl.where((o_n[None, :] == b_target[:, None]) | (o_n[None, :] >= vocabulary), 0.0, b_e)
        b_total = tl.sum(b_e, 1)
        if MOMENT:
            b_moment = tl.sum(b_e * b_y, 1)
        if SOFTCAP and SLOPE:
            b_e *= b_slope
    if exps is not None:
        if TMA:
            exps.store([m, n], b_e.to(tl.bfloat16))
        else:
            o_m = m + tl.arange(0, BLOCK_M)
            p_e = exps + o_m.to(tl.int64)[:, None] * exps_stride + o_n[None, :]
            there = (o_m[:, None] < rows) & (o_n[None, :] < vocabulary)
            tl.store(p_e, b_e.to(exps.dtype.element_ty), mask=there)
    return b_total, b_moment


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["p_total", "p_moment"])
def product_kernel(
    hidden,  # TMA descriptors, or pointers, of [rows, D], [V, D] and, unless nothing is stored, [rows, V]
    weight,
    exps,
    p_bias,
    p_target,
    p_shift,
    p_total,  # [tiles of the vocabulary, rows]
    p_moment,
    p_needed,  # whether the launch is, None: it is
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
    if p_needed is not None:
        needed = tl.load(p_needed)
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
        b_target = tl.load(p_target + o_m, mask=m_m, other=-1).to(tl.int32)
        inside = (n + BLOCK_N > vocabulary) | (tl.max(((b_target >= n) & (b_target < n + BLOCK_N)).to(tl.int32), 0) > 0)
        if HALVES:
            WIDTH: tl.constexpr = BLOCK_N // 2
            first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
            b_total, b_moment = _finish(
                first, exps, p_bias, b_target, b_shift, m, n, rows, vocabulary, exps_stride, inside, scale, softcap,
                BLOCK_M, WIDTH, SOFTCAP, SLOPE, MOMENT, PEAK, TMA,
            )  # fmt: skip
            b_more, b_moment_2 = _finish(
                second, exps, p_bias, b_target, b_shift, m, n + WIDTH, rows, vocabulary, exps_stride, inside, scale,
                softcap, BLOCK_M, WIDTH, SOFTCAP, SLOPE, MOMENT, PEAK, TMA,
            )  # fmt: skip
            b_total = tl.maximum(b_total, b_more) if PEAK else b_total + b_more
            b_moment += b_moment_2
        else:
            b_total, b_moment = _finish(
                acc, exps, p_bias, b_target, b_shift, m, n, rows, vocabulary, exps_stride, inside, scale, softcap,
                BLOCK_M, BLOCK_N, SOFTCAP, SLOPE, MOMENT, PEAK, TMA,
            )  # fmt: skip
        o = (n // BLOCK_N) * rows + o_m
        tl.store(p_total + o, b_total, mask=m_m)
        if MOMENT:
            tl.store(p_moment + o, b_moment, mask=m_m)
