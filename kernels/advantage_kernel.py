"""Perception Calibration and the group advantage as one Triton kernel (formulas: `advantage.py`)."""

import triton
import triton.language as tl


def warps(block_g: int) -> int:
    """Warps for a block of samples: enough that a group of thousands still fits the registers."""
    return min(16, max(1, block_g // 256))


@triton.jit
def _statistics(b_x, m_g):
    """Mean, maximum, minimum and number of a group's samples."""
    count = tl.sum(m_g.to(tl.float32), 0)
    mean = tl.sum(tl.where(m_g, b_x, 0.0), 0) / tl.maximum(count, 1.0)
    high = tl.max(tl.where(m_g, b_x, -float("inf")), 0)
    low = tl.min(tl.where(m_g, b_x, float("inf")), 0)
    return mean, high, low, count


@triton.jit
def _group(p_reward, p_mask, offset, o_g, samples):
    """A group's rewards and which of them are there."""
    m_g = o_g < samples
    if p_mask is not None:
        m_g = m_g & (tl.load(p_mask + offset + o_g, mask=m_g, other=0) != 0)
    return tl.load(p_reward + offset + o_g, mask=m_g, other=0.0).to(tl.float32), m_g


@triton.jit
def advantage_kernel(
    p_reward,  # [M, Q, G]
    p_mask,  # the same, 8-bit, or None
    p_calibrated,
    p_advantage,
    agents,
    questions,
    samples,
    calibrate_weight,
    eps,
    CALIBRATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program: one agent's group on one question, whose peers' groups it reads as well."""
    question = tl.program_id(0)
    agent = tl.program_id(1)
    o_g = tl.arange(0, BLOCK_G)
    own = (agent * questions + question).to(tl.int64) * samples
    b_reward, m_g = _group(p_reward, p_mask, own, o_g, samples)

    b_calibration = tl.zeros([BLOCK_G], tl.float32)
    if CALIBRATE != "none":
        bound = 1.0 / tl.maximum(agents - 1, 1).to(tl.float32)
        for peer in range(agents):
            b_peer, m_peer = _group(
                p_reward, p_mask, (peer * questions + question).to(tl.int64) * samples, o_g, samples
            )
            mean, high, low, count = _statistics(b_peer, m_peer)
            b_share = (b_reward - mean) / tl.where(high > low, high - low, 1.0)
            b_limit = tl.where(b_reward > high, bound, tl.where(b_reward < high, -bound, 0.0))
            b_term = tl.where(high > low, tl.minimum(tl.maximum(b_share, -bound), bound), b_limit)
            b_calibration += tl.where((peer != agent) & (count > 0.0), b_term, 0.0)

    b_calibrated = b_reward
    if CALIBRATE == "reward":
        b_calibrated += b_calibration
    mean, high, low, count = _statistics(b_calibrated, m_g)
    b_advantage = tl.where(m_g, b_calibrated - mean, 0.0)
    if NORMALIZE == "grpo":
        std = tl.sqrt(tl.sum(b_advantage * b_advantage, 0) / tl.maximum(count - 1.0, 1.0))
        b_advantage = b_advantage / (std + eps)
    if NORMALIZE == "rloo":
        b_advantage = b_advantage * (count / tl.maximum(count - 1.0, 1.0))
    b_advantage = tl.where(high > low, b_advantage, 0.0)
    if CALIBRATE == "advantage":
        b_advantage += tl.where(count > 1.0, calibrate_weight * b_calibration, 0.0)

    inside = o_g < samples
    tl.store(p_calibrated + own + o_g, tl.where(m_g, b_calibrated, 0.0), mask=inside)
    tl.store(p_advantage + own + o_g, tl.where(m_g, b_advantage, 0.0), mask=inside)
