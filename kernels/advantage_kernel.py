"""Perception Calibration and the group advantage as one Triton kernel (formulas: `advantage.py`)."""

import triton
import triton.language as tl

TILE = 512  # samples that a program has at once, where its groups are small
WHOLE = 1024  # samples up to which a question's groups, those of all agents, stay together


def tiling(agents: int, samples: int) -> tuple[dict[str, int], int]:
    """A program's block of agents, questions and samples, and its warps: groups of thousands fit the registers too."""
    block_g, block_m = triton.next_power_of_2(samples), triton.next_power_of_2(agents)
    if block_m * block_g > WHOLE:
        block_m = 1
    block_q = max(1, TILE // (block_m * block_g))
    warps = min(16, max(1, block_m * block_q * block_g // 256))
    return {"BLOCK_M": block_m, "BLOCK_Q": block_q, "BLOCK_G": block_g}, warps


@triton.jit
def _groups(p_reward, p_mask, o_mqg, m_mqg):
    """Rewards of a block of groups, and which of them are there."""
    if p_mask is not None:
        m_mqg = m_mqg & (tl.load(p_mask + o_mqg, mask=m_mqg, other=0) != 0)
    return tl.load(p_reward + o_mqg, mask=m_mqg, other=0.0).to(tl.float32), m_mqg


@triton.jit
def _statistics(b_x, m_mqg):
    """Mean, maximum, minimum and number of each group's samples, [M, Q, 1]."""
    count = tl.sum(m_mqg.to(tl.float32), 2, keep_dims=True)
    mean = tl.sum(tl.where(m_mqg, b_x, 0.0), 2, keep_dims=True) / tl.maximum(count, 1.0)
    high = tl.max(tl.where(m_mqg, b_x, -float("inf")), 2, keep_dims=True)
    low = tl.min(tl.where(m_mqg, b_x, float("inf")), 2, keep_dims=True)
    return mean, high, low, count


POINTERS = ["p_reward", "p_mask", "p_calibrated", "p_advantage"]


# One compiled kernel serves any number of questions and any address, so that the launcher may keep it.
@triton.jit(do_not_specialize=["questions"], do_not_specialize_on_alignment=POINTERS)
def advantage_kernel(
    p_reward,  # [M, Q, G]
    p_mask,  # the same, bool, or None
    p_calibrated,
    p_advantage,
    questions,
    calibrate_weight,
    eps,
    AGENTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    CALIBRATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program: BLOCK_M agents' groups on BLOCK_Q questions, and one after the other the groups of all peers."""
    o_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None, None]
    o_q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :, None]
    o_g = tl.arange(0, BLOCK_G)[None, None, :]
    m_qg = (o_q < questions) & (o_g < SAMPLES)
    agent_stride = questions.to(tl.int64) * SAMPLES
    o_qg = o_q.to(tl.int64) * SAMPLES + o_g
    o_own = o_m * agent_stride + o_qg
    inside = (o_m < AGENTS) & m_qg
    b_reward, m_own = _groups(p_reward, p_mask, o_own, inside)

    b_calibration = tl.zeros([BLOCK_M, BLOCK_Q, BLOCK_G], tl.float32)
    if CALIBRATE != "none" and AGENTS > 1:
        bound = 1.0 / (AGENTS - 1)
        for peer in range(AGENTS):
            b_peer, m_peer = _groups(p_reward, p_mask, peer * agent_stride + o_qg, m_qg)
            mean, high, low, count = _statistics(b_peer, m_peer)
            b_share = (b_reward - mean) / tl.where(high > low, high - low, 1.0)
            b_limit = tl.where(b_reward > high, bound, tl.where(b_reward < high, -bound, 0.0))
            b_term = tl.where(high > low, tl.minimum(tl.maximum(b_share, -bound), bound), b_limit)
            b_calibration += tl.where((o_m != peer) & (count > 0.0), b_term, 0.0)

    b_calibrated = b_reward
    if CALIBRATE == "reward":
        b_calibrated += b_calibration
    mean, high, low, count = _statistics(b_calibrated, m_own)
    b_advantage = tl.where(m_own, b_calibrated - mean, 0.0)
    if NORMALIZE == "grpo":
        squares = tl.sum(b_advantage * b_advantage, 2, keep_dims=True)
        b_advantage = b_advantage / (tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + eps)
    if NORMALIZE == "rloo":
        b_advantage = b_advantage * (count / tl.maximum(count - 1.0, 1.0))
    b_advantage = tl.where(high > low, b_advantage, 0.0)
    if CALIBRATE == "advantage":
        b_advantage += tl.where(count > 1.0, calibrate_weight * b_calibration, 0.0)

    tl.store(p_calibrated + o_own, tl.where(m_own, b_calibrated, 0.0), mask=inside)
    tl.store(p_advantage + o_own, tl.where(m_own, b_advantage, 0.0), mask=inside)
