"""The Triton kernel that looks at targets and weights before anything is computed."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def count_kernel(
    p_target,
    p_first,  # factors, or None
    p_second,
    p_counts,  # [3]: targets outside the vocabulary, rows not ignored, rows needed
    p_go,  # [1]: whether all rows are needed, and no target is outside
    rows,
    vocabulary,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: counts over all rows."""
    b_outside = tl.zeros([BLOCK], tl.int32)
    b_valid = tl.zeros([BLOCK], tl.int32)
    b_needed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        m_r = o_r < rows
        b_target = tl.load(p_target + o_r, mask=m_r, other=IGNORED)
        valid = b_target != IGNORED
        b_outside += (valid & ((b_target < 0) | (b_target >= vocabulary))).to(tl.int32)
        b_valid += valid.to(tl.int32)
        if p_first is not None:
            valid = valid & (tl.load(p_first + o_r, mask=m_r, other=0.0) != 0.0)
        if p_second is not None:
            valid = valid & (tl.load(p_second + o_r, mask=m_r, other=0.0) != 0.0)
        b_needed += valid.to(tl.int32)
    outside, needed = tl.sum(b_outside, 0), tl.sum(b_needed, 0)
    tl.store(p_go, ((needed == rows) & (outside == 0)).to(tl.int32))
    tl.store(p_counts, outside.to(tl.int64))
    tl.store(p_counts + 1, tl.sum(b_valid, 0).to(tl.int64))
    tl.store(p_counts + 2, needed.to(tl.int64))
