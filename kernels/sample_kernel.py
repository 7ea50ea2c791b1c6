"""Triton kernels that sample a token of every row of logits and give its log-prob, in one reading of the logits.

Gumbel's way (argmax of x + g is a sample of softmax(x), g = −log E, E exponential), its maximum found beside that of
the log-softmax and its sum. A row is cut into parts, so that few rows fill the GPU too.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)  # below every logit; finite, so that the difference of two is


@triton.jit
def sample_parts_kernel(
    p_logits,  # float32 [N, V], `stride` apart
    p_slot,  # int32 [N]: where a row's temperature and seed are
    p_temperature,  # float32 [slots]; 0: the largest logit
    p_seed,  # int64 [slots]
    p_position,  # int64 [N]: with the seed, the row's random numbers
    p_max,  # float32 [N, parts], and all others
    p_sum,
    p_best,
    p_logit,
    p_token,  # int32 [N, parts]
    stride,
    V,
    part_size,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(p_slot + row)
    temperature = tl.load(p_temperature + slot)
    noisy = temperature > 0
    scale = 1 / tl.where(noisy, temperature, 1.0)
    key = tl.randint(tl.load(p_seed + slot), tl.load(p_position + row).to(tl.int32)).to(tl.int64) & 0xFFFFFFFF
    first = part * part_size
    end = tl.minimum(first + part_size, V)
    o_b = tl.arange(0, B)
    b_max = tl.full([B], LOW, tl.float32)
    b_sum = tl.zeros([B], tl.float32)
    b_best = tl.full([B], float("-inf"), tl.float32)
    b_logit = tl.zeros([B], tl.float32)
    b_token = tl.full([B], 0, tl.int32) + first
    for start in range(first, end, 4 * B):
        r_0, r_1, r_2, r_3 = tl.randint4x(key, start + o_b)
        for n in tl.static_range(4):
            r_b = r_0 if n == 0 else (r_1 if n == 1 else (r_2 if n == 2 else r_3))
            o_v = start + n * B + o_b
            m_v = o_v < end
            b_x = tl.load(p_logits + row * stride + o_v, mask=m_v, other=float("-inf")) * scale
            b_new = tl.maximum(b_max, b_x)
            b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_x - b_new)
            b_max = b_new
            b_noisy = tl.where(noisy, b_x - tl.log(exponential(r_b)), b_x)
            better = b_noisy > b_best
            b_best = tl.where(better, b_noisy, b_best)
            b_logit = tl.where(better, b_x, b_logit)
            b_token = tl.where(better, o_v, b_token)
    top = tl.max(b_max, 0)
    place = row * tl.num_programs(1) + part
    tl.store(p_max + place, top)
    tl.store(p_sum + place, tl.sum(b_sum * tl.exp(b_max - top), 0))
    lane = tl.argmax(b_best, 0)
    tl.store(p_best + place, tl.max(b_best, 0))
    tl.store(p_logit + place, tl.sum(tl.where(o_b == lane, b_logit, 0.0), 0))
    tl.store(p_token + place, tl.sum(tl.where(o_b == lane, b_token, 0), 0))


@triton.jit
def exponential(r):
    """Exponentially distributed numbers of 32 random bits: −log(1 − u), exact also near 0, which decides who wins."""
    u = (r.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u / 7))))))
    return tl.where(u < 0.1, series, -tl.log(1 - tl.minimum(u, 0.99999994)))


@triton.jit
def sample_whole_kernel(
    p_max,  # [N, parts]: see above
    p_sum,
    p_best,
    p_logit,
    p_token,
    p_sampled,  # int64 [N]
    p_logp,  # float32 [N]
    parts,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, B)
    place = row * parts + o_b
    m_b = o_b < parts
    b_max = tl.load(p_max + place, mask=m_b, other=LOW)
    top = tl.max(b_max, 0)
    total = tl.sum(tl.load(p_sum + place, mask=m_b, other=0.0) * tl.exp(b_max - top), 0)
    lane = tl.argmax(tl.load(p_best + place, mask=m_b, other=float("-inf")), 0)
    tl.store(p_sampled + row, tl.load(p_token + row * parts + lane).to(tl.int64))
    tl.store(p_logp + row, tl.load(p_logit + row * parts + lane) - top - tl.log(total))
