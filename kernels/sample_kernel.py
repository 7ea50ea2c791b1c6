"""Triton kernels that sample a token of every row of logits and give its log-prob, in one reading of the logits.

By inverting the distribution function, in two steps of one random number each: the pieces of a row that follow from the
vocabulary alone are weighed, one of them is drawn by its weight, and a token of that piece by its own. So a row's token
does not depend on the rows beside it, and nearly all elements cost an exponential and no random number.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)  # below every logit; finite, so that the difference of two is


@triton.jit
def weigh_pieces_kernel(
    p_logits,  # float32 [N, V], `stride` apart
    p_slot,  # int32 or int64 [N]: where a row's temperature is
    p_temperature,  # float32 [slots]; 0: the largest logit
    p_max,  # float32 [N, pieces]: of logits / temperature
    p_sum,  # float32 [N, pieces]: Σ exp(logit / temperature − max)
    stride,
    V,
    S: tl.constexpr,
):
    """A piece of a row: its largest logit and the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    o_v = piece * S + tl.arange(0, S)
    scale = scale_of(row, p_slot, p_temperature)
    b_x = tl.load(p_logits + row * stride + o_v, mask=o_v < V, other=float("-inf")) * scale
    top = tl.maximum(tl.max(b_x, 0), LOW)
    place = row * tl.num_programs(1) + piece
    tl.store(p_max + place, top)
    tl.store(p_sum + place, tl.sum(tl.exp(b_x - top), 0))


@triton.jit
def draw_kernel(
    p_logits,  # see above
    p_slot,
    p_temperature,
    p_seed,  # int64 [slots]
    p_position,  # int64 [N]: with the seed, the row's random numbers
    p_max,
    p_sum,
    p_sampled,  # int64 [N]
    p_logp,  # float32 [N]
    stride,
    V,
    pieces,
    P: tl.constexpr,
    S: tl.constexpr,
):
    """A row's pieces together: the token sampled and its log-prob, float32, in nats."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slot + row)
    noisy = tl.load(p_temperature + slot) > 0
    scale = scale_of(row, p_slot, p_temperature)
    r_0, r_1, _, _ = tl.randint4x(tl.load(p_seed + slot), tl.load(p_position + row).to(tl.int32))
    o_p = tl.arange(0, P)
    b_max = tl.load(p_max + row * pieces + o_p, mask=o_p < pieces, other=LOW)
    top = tl.max(b_max, 0)
    b_w = tl.load(p_sum + row * pieces + o_p, mask=o_p < pieces, other=0.0) * tl.exp(b_max - top)
    total = tl.sum(b_w, 0)
    piece = tl.where(noisy, drawn(b_w, r_0, P), tl.argmax(b_max, 0))
    o_v = piece * S + tl.arange(0, S)
    b_x = tl.load(p_logits + row * stride + o_v, mask=o_v < V, other=float("-inf")) * scale
    b_e = tl.exp(b_x - tl.load(p_max + row * pieces + piece))
    lane = tl.where(noisy, drawn(b_e, r_1, S), tl.argmax(b_x, 0))
    logit = tl.sum(tl.where(tl.arange(0, S) == lane, b_x, 0.0), 0)
    tl.store(p_sampled + row, tl.minimum(piece * S + lane, V - 1).to(tl.int64))
    tl.store(p_logp + row, logit - top - tl.log(total))


@triton.jit
def scale_of(row, p_slot, p_temperature):
    """1 / temperature; 1 where greedy."""
    temperature = tl.load(p_temperature + tl.load(p_slot + row))
    return 1 / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def drawn(b_w, r, B: tl.constexpr):
    """The first place up to which the weights add up to more than the part of their sum that 32 random bits say.

    Of places with a weight, 0 where there are none. The part is less than 1 and the sum the largest of those up to a
    place, so that no rounding leaves the last place, which may be next to impossible.
    """
    u = tl.minimum((r.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    o_b = tl.arange(0, B)
    b_sum = tl.cumsum(b_w, 0)
    first = tl.min(tl.where((b_sum > tl.max(b_sum, 0) * u) & (b_w > 0), o_b, B), 0)
    last = tl.max(tl.where(b_w > 0, o_b, 0), 0)
    return tl.where(first < B, first, last)
