"""The Triton kernel that adds rows up: the gradient of taking some rows several times, in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def row_sums_kernel(
    p_one,  # [N, WIDTH], contiguous
    p_two,
    p_one_out,  # [T, WIDTH], contiguous rows
    p_two_out,
    p_starts,  # [T + 1] int32: where a row's places begin in p_places
    p_places,  # [N] int32
    one_stride,
    two_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of one of the two."""
    t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    first, end = tl.load(p_starts + t), tl.load(p_starts + t + 1)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(1) == 0:
        for i in range(first, end):
            place = tl.load(p_places + i).to(tl.int64)
            b_sum += tl.load(p_one + place * WIDTH + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_one_out + t * one_stride + o, b_sum.to(p_one_out.dtype.element_ty), mask=m)
    else:
        for i in range(first, end):
            place = tl.load(p_places + i).to(tl.int64)
            b_sum += tl.load(p_two + place * WIDTH + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_two_out + t * two_stride + o, b_sum.to(p_two_out.dtype.element_ty), mask=m)
