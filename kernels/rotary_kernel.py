"""The Triton kernel of rotary position embeddings, forward or backward, on queries and keys in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    p_q,  # [T, H, SIZE], heads contiguous
    p_k,  # [T, K, SIZE]
    p_cos,  # [T, SIZE], or rows of a table where there are positions
    p_sin,
    p_positions,  # [T]: each token's row of cos and sin; or None: the tokens' own
    p_q_out,  # [T, H, SIZE], heads contiguous; may be what is read
    p_k_out,
    tokens,
    heads,
    key_heads,
    q_stride,
    k_stride,
    q_out_stride,
    k_out_stride,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,  # SIZE / 2
    SECOND: tl.constexpr,  # where the second half's cos and sin lie behind the first's; 0: they are the same
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H + K, a power of 2
    BLOCK_D: tl.constexpr,  # at least SIZE / 2
):
    """One program: all heads of one token."""
    t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HALF)[None, :]
    row = t
    if p_positions is not None:
        row = tl.load(p_positions + t).to(tl.int64)
    p_c, p_s = p_cos + row * SIZE + o_d, p_sin + row * SIZE + o_d
    b_c1 = tl.load(p_c, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
    b_c2 = tl.load(p_c + SECOND, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
    b_s1 = tl.load(p_s, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
    b_s2 = tl.load(p_s + SECOND, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
    is_q = (o_h < heads)[:, None]
    o_q = t * q_stride + o_h[:, None] * SIZE + o_d[None, :]
    o_k = t * k_stride + (o_h - heads)[:, None] * SIZE + o_d[None, :]
    m_q = is_q & m_d
    m_k = (o_h >= heads)[:, None] & (o_h < heads + key_heads)[:, None] & m_d
    b_x1 = tl.load(p_q + o_q, mask=m_q, other=0.0).to(tl.float32) + tl.load(p_k + o_k, mask=m_k, other=0.0).to(
        tl.float32
    )
    b_x2 = tl.load(p_q + o_q + HALF, mask=m_q, other=0.0).to(tl.float32)
    b_x2 += tl.load(p_k + o_k + HALF, mask=m_k, other=0.0).to(tl.float32)
    if BACKWARD:
        b_y1 = b_x1 * b_c1 + b_x2 * b_s2
        b_y2 = b_x2 * b_c2 - b_x1 * b_s1
    else:
        b_y1 = b_x1 * b_c1 - b_x2 * b_s1
        b_y2 = b_x2 * b_c2 + b_x1 * b_s2
    o_q = t * q_out_stride + o_h[:, None] * SIZE + o_d[None, :]
    o_k = t * k_out_stride + (o_h - heads)[:, None] * SIZE + o_d[None, :]
    out = p_q_out.dtype.element_ty
    tl.store(p_q_out + o_q, b_y1.to(out), mask=m_q)
    tl.store(p_q_out + o_q + HALF, b_y2.to(out), mask=m_q)
    tl.store(p_k_out + o_k, b_y1.to(out), mask=m_k)
    tl.store(p_k_out + o_k + HALF, b_y2.to(out), mask=m_k)
