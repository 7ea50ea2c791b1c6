"""Triton kernels that multiply by factors: a tensor by one, rows by theirs, and the sum of such rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def add_scaled_rows_kernel(p_x, p_factor, p_total, rows, columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """total += Σ over rows of factor · x, for a block of columns."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        p_block = p_x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        b_x = tl.load(p_block, mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * tl.load(p_factor + o_r, mask=m_r, other=0.0)[:, None], 0)
    tl.store(p_total + o_c, tl.load(p_total + o_c, mask=m_c, other=0.0) + b_sum, mask=m_c)


@triton.jit
def scale_rows_kernel(p_x, p_factor, p_out, depth, stride, BLOCK_D: tl.constexpr):
    """out ← factor · x for a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_x = tl.load(p_x + row * stride + o_d, mask=o_d < depth, other=0.0).to(tl.float32)
    b_x *= tl.load(p_factor + row)
    tl.store(p_out + row * depth + o_d, b_x.to(p_out.dtype.element_ty), mask=o_d < depth)


@triton.jit
def scale_kernel(p_x, p_factor, count, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """x ← x · factor, which where the factor is 1 costs no more than looking."""
    factor = tl.load(p_factor).to(tl.float32)
    if factor == 1.0:
        return
    for start in range(tl.program_id(0) * BLOCK, count, PROGRAMS * BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o, mask=o < count, other=0.0).to(tl.float32)
        tl.store(p_x + o, (b_x * factor).to(p_x.dtype.element_ty), mask=o < count)
