"""The policy loss of one token as a Triton function: `policy_loss.token_loss` without the losses over whole turns.

Every variant is a constexpr here and nowhere else. The formulas and choices are those of `policy_loss.py`.
"""

import triton
import triton.language as tl


@triton.jit
def token_loss(
    logp,
    entropy,
    weight,
    advantage,
    old,  # None where the step is on-policy
    ref,  # None without a reference
    behavior,  # None without importance weights
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    beta,
    entropy_coef,
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
):
    """(value, dlogp, dentropy, clipped, kl, truncated) of one token, times its weight where `TokenLoss` says so."""
    ratio = tl.where(logp == logp, 1.0, 1.0)  # of one row or of a block, as logp is
    if old is not None:
        ratio = tl.exp(logp - old)
    policy, dpolicy, clipped = _policy(
        logp, ratio, advantage, clip_low, clip_high, dual_clip, OBJECTIVE=OBJECTIVE, DUAL_CLIP=DUAL_CLIP
    )
    importance, truncated = 1.0, 0.0
    if behavior is not None:
        importance = tl.exp(old - behavior) if old is not None else tl.exp(logp - behavior)
        truncated = tl.where(importance > importance_cap, 1.0, 0.0)
        above = importance_cap if IMPORTANCE_MODE == "truncate" else 0.0
        importance = tl.where(importance > importance_cap, above, importance)
    value = importance * policy - entropy_coef * entropy
    dlogp = importance * dpolicy
    kl = 0.0
    if ref is not None:
        d = ref - logp
        growth, k3 = _growth(d)
        kl = ratio * k3
        if KL == "k3":
            value += beta * ratio * k3
            dlogp -= beta * ratio * growth
        else:
            value += beta * ratio * 0.5 * d * d
            dlogp -= beta * ratio * d
    return weight * value, weight * dlogp, -entropy_coef * weight, clipped, kl, truncated


@triton.jit
def row_derivatives(
    row,  # one row or a block of them, `inside` where it is one
    inside,
    logp,
    entropy,
    p_dlogp,  # read for STEP "given", written for "policy"
    p_dentropy,  # read for "given"; None: 0
    p_weight,  # from here on for "policy" alone
    p_advantage,
    p_old,
    p_ref,
    p_behavior,
    p_value,
    p_clipped,
    p_kl,
    p_truncated,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    beta,
    entropy_coef,
    STEP: tl.constexpr,  # "statistics", "given" or "policy"
    OBJECTIVE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
):
    """(dL/dlog π, dL/dH): as they were given, or of the policy loss, whose parts are then stored."""
    dlogp, dentropy = 0.0, 0.0
    if STEP == "given":
        dlogp = tl.load(p_dlogp + row, mask=inside, other=0.0)
        if p_dentropy is not None:
            dentropy = tl.load(p_dentropy + row, mask=inside, other=0.0)
    if STEP == "policy":
        value, dlogp, dentropy, clipped, kl, truncated = token_loss(
            logp,
            entropy,
            tl.load(p_weight + row, mask=inside, other=0.0),
            tl.load(p_advantage + row, mask=inside, other=0.0),
            None if p_old is None else tl.load(p_old + row, mask=inside, other=0.0),
            None if p_ref is None else tl.load(p_ref + row, mask=inside, other=0.0),
            None if p_behavior is None else tl.load(p_behavior + row, mask=inside, other=0.0),
            clip_low,
            clip_high,
            dual_clip,
            importance_cap,
            beta,
            entropy_coef,
            OBJECTIVE=OBJECTIVE,
            DUAL_CLIP=DUAL_CLIP,
            KL=KL,
            IMPORTANCE_MODE=IMPORTANCE_MODE,
        )
        tl.store(p_value + row, value, mask=inside)
        tl.store(p_dlogp + row, dlogp, mask=inside)
        tl.store(p_clipped + row, clipped, mask=inside)
        tl.store(p_kl + row, kl, mask=inside)
        tl.store(p_truncated + row, truncated, mask=inside)
    return dlogp, dentropy


@triton.jit
def _policy(logp, ratio, advantage, clip_low, clip_high, dual_clip, OBJECTIVE: tl.constexpr, DUAL_CLIP: tl.constexpr):
    """The policy term, its derivative by log π, and 1 where the clip acts."""
    above = ratio > 1.0 + clip_high
    below = ratio < 1.0 - clip_low
    bounded = tl.where(above, 1.0 + clip_high, tl.where(below, 1.0 - clip_low, ratio))
    if OBJECTIVE == "cispo":
        value = -bounded * advantage * logp
        derivative = -bounded * advantage
        clipped = (above | below) & (advantage != 0.0)
    else:
        value = tl.maximum(-ratio * advantage, -bounded * advantage)
        clipped = ((advantage > 0.0) & above) | ((advantage < 0.0) & below)
        if DUAL_CLIP:
            value = tl.where(advantage < 0.0, tl.minimum(value, -dual_clip * advantage), value)
            clipped = clipped | ((advantage < 0.0) & (ratio > dual_clip))
        derivative = tl.where(clipped, 0.0, -advantage * ratio)
    return value, derivative, tl.where(clipped, 1.0, 0.0)


@triton.jit
def _growth(d):
    """exp(d) − 1 and exp(d) − 1 − d, by their series near 0, where the differences would cancel."""
    curve = 0.5 * d * d * (1.0 + d / 3.0 * (1.0 + d / 4.0 * (1.0 + d / 5.0 * (1.0 + d / 6.0))))
    k3 = tl.where(tl.abs(d) < 0.25, curve, tl.exp(d) - 1.0 - d)
    return k3 + d, k3
