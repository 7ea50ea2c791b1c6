"""The Triton kernel that adds up a loss and its statistics (`policy_loss.sum_stats`, `mean_stats`)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def stats_kernel(
    p_weight,
    p_advantage,
    p_value,
    p_entropy,
    p_kl,
    p_clipped,
    p_truncated,
    p_out,  # [11]: the loss; the six sums in `stats_triton.SUMS`' order; the four means in `MEANS`'
    rows,
    BLOCK: tl.constexpr,
):
    """One program: adds up all rows, always in the same order."""
    b_value = tl.zeros([BLOCK], tl.float32)
    b_tokens = tl.zeros([BLOCK], tl.float32)
    b_entropy = tl.zeros([BLOCK], tl.float32)
    b_kl = tl.zeros([BLOCK], tl.float32)
    b_policy = tl.zeros([BLOCK], tl.float32)
    b_clipped = tl.zeros([BLOCK], tl.float32)
    b_truncated = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        m_r = o_r < rows
        counted = m_r & (tl.load(p_weight + o_r, mask=m_r, other=0.0) != 0.0)
        b_acts = (counted & (tl.load(p_advantage + o_r, mask=m_r, other=0.0) != 0.0)).to(tl.float32)
        b_value += tl.load(p_value + o_r, mask=m_r, other=0.0)
        b_tokens += counted.to(tl.float32)
        b_entropy += tl.load(p_entropy + o_r, mask=counted, other=0.0)
        b_kl += tl.load(p_kl + o_r, mask=counted, other=0.0)
        b_policy += b_acts
        b_clipped += b_acts * tl.load(p_clipped + o_r, mask=m_r, other=0.0)
        b_truncated += b_acts * tl.load(p_truncated + o_r, mask=m_r, other=0.0)
    tokens, policy = tl.sum(b_tokens, 0), tl.sum(b_policy, 0)
    entropy, kl = tl.sum(b_entropy, 0), tl.sum(b_kl, 0)
    clipped, truncated = tl.sum(b_clipped, 0), tl.sum(b_truncated, 0)
    tl.store(p_out, tl.sum(b_value, 0))
    tl.store(p_out + 1, tokens)
    tl.store(p_out + 2, entropy)
    tl.store(p_out + 3, kl)
    tl.store(p_out + 4, policy)
    tl.store(p_out + 5, clipped)
    tl.store(p_out + 6, truncated)
    tl.store(p_out + 7, entropy / tokens)
    tl.store(p_out + 8, kl / tokens)
    tl.store(p_out + 9, clipped / policy)
    tl.store(p_out + 10, truncated / policy)
