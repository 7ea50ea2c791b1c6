"""The Triton kernels of RMSNorm: each row is read once, sums are float32."""

import triton
import triton.language as tl


@triton.jit
def _normal(b_x, p_weight, o_d, m_d, eps, SIZE: tl.constexpr, ONE_PLUS: tl.constexpr):
    """(x̂ [R, D], 1/rms [R, 1], weight [1, D]) in float32; padding columns are 0."""
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / SIZE + eps)
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if ONE_PLUS:
        b_w += 1.0
    return b_x * b_r, b_r, b_w


@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    p_x,
    p_weight,
    p_y,  # [rows, SIZE], contiguous
    p_add,  # [rows, SIZE]: added to x before the norm; or None
    p_sum,  # [rows, SIZE]: the sum, whose rounded values are normed; or None
    rows,
    heads,  # rows of x for each token
    stride,  # from token to token in x
    eps,
    SIZE: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows."""
    o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < SIZE
    m = (o_r < rows)[:, None] & m_d[None, :]
    o_x = (o_r // heads * stride + o_r % heads * SIZE)[:, None] + o_d[None, :]
    o_y = o_r[:, None] * SIZE + o_d[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)  # [R, D]
    if p_add is not None:
        b_sum = (b_x + tl.load(p_add + o_y, mask=m, other=0.0).to(tl.float32)).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_y, b_sum, mask=m)
        b_x = b_sum.to(tl.float32)
    b_n, _, b_w = _normal(b_x, p_weight, o_d, m_d, eps, SIZE, ONE_PLUS)
    tl.store(p_y + o_y, (b_n * b_w).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "blocks"])
def norm_backward_kernel(
    p_x,
    p_weight,
    p_dy,  # [rows, SIZE], contiguous
    p_dx,  # [rows, SIZE], contiguous
    p_dw,  # [programs, SIZE] float32, or None
    p_add,  # [rows, SIZE]: added to dx; or None
    p_y,  # [rows, SIZE]: the forward pass's output, made again; or None
    rows,
    blocks,  # of rows, for each program
    heads,
    stride,
    eps,
    SIZE: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `blocks` blocks of rows, and the sum of their gradients of the weight."""
    program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < SIZE
    b_dw = tl.zeros([BLOCK_D], tl.float32)
    for block in range(0, blocks):
        o_r = ((program * blocks + block) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        m = (o_r < rows)[:, None] & m_d[None, :]
        o_x = (o_r // heads * stride + o_r % heads * SIZE)[:, None] + o_d[None, :]
        o_y = o_r[:, None] * SIZE + o_d[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_y, mask=m, other=0.0).to(tl.float32)
        b_n, b_r, b_w = _normal(b_x, p_weight, o_d, m_d, eps, SIZE, ONE_PLUS)
        b_slope = b_dy * b_w
        b_mean = tl.sum(b_slope * b_n, 1, keep_dims=True) / SIZE
        b_dx = b_r * (b_slope - b_n * b_mean)
        if p_add is not None:
            b_dx += tl.load(p_add + o_y, mask=m, other=0.0).to(tl.float32)
        if p_y is not None:
            tl.store(p_y + o_y, (b_n * b_w).to(p_y.dtype.element_ty), mask=m)
        tl.store(p_dx + o_y, b_dx.to(p_dx.dtype.element_ty), mask=m)
        b_dw += tl.sum(b_dy * b_n, 0)
    if p_dw is not None:
        tl.store(p_dw + program * SIZE + o_d, b_dw, mask=m_d)
