"""A sweep's step as the Triton kernels take it: vectors by the kernel's argument names and in its order, scalars and
constants in its order."""

from __future__ import annotations

from ilr_kernels.launch import aligned_vectors
from ilr_kernels.policy_loss import PolicyLoss, TokenLoss
from ilr_kernels.sweep import Given, Policy, Step
from torch import Tensor

VECTORS = ("p_dlogp", "p_dentropy", "p_weight", "p_advantage", "p_old", "p_ref", "p_behavior")
OUTPUTS = ("p_value", "p_clipped", "p_kl", "p_truncated")
NO_LOSS = PolicyLoss()


def step_vectors(step: Step, like_N: Tensor) -> tuple[dict[str, Tensor | None], TokenLoss | None]:
    """The vectors a kernel reads and writes for a step, and the record whose fields it fills (float32)."""
    vectors: dict[str, Tensor | None] = dict.fromkeys(VECTORS + OUTPUTS)
    if isinstance(step, Given):
        vectors["p_dlogp"] = step.dlogp_N.float().contiguous()
        vectors["p_dentropy"] = None if step.dentropy_N is None else step.dentropy_N.float().contiguous()
    if not isinstance(step, Policy):
        return vectors, None
    t = step.inputs
    given_N = (t.weight_N, t.advantage_N, t.old_logp_N, t.ref_logp_N, t.behavior_logp_N)
    for name, x_N in zip(VECTORS[2:], given_N, strict=True):
        vectors[name] = None if x_N is None else x_N.contiguous()
    if step.loss.importance == "none":
        vectors["p_behavior"] = None
    value_N, dlogp_N, clipped_N, kl_N, truncated_N = aligned_vectors(5, like_N.shape[0], like_N)
    vectors |= dict(zip(OUTPUTS, (value_N, clipped_N, kl_N, truncated_N), strict=True)) | {"p_dlogp": dlogp_N}
    if step.loss.entropy_coef != 0:
        vectors["p_dentropy"] = t.weight_N * -step.loss.entropy_coef
    return vectors, TokenLoss(value_N, dlogp_N, vectors["p_dentropy"], clipped_N, kl_N, truncated_N)


def step_scalars(step: Step) -> tuple[float, ...]:
    """The scalars of a step's loss, from `clip_low` to `entropy_coef`."""
    loss = step.loss if isinstance(step, Policy) else NO_LOSS
    clips = (float(loss.clip_low), float(loss.clip_high), float(loss.dual_clip or 0.0))
    return (*clips, float(loss.importance_cap), float(loss.beta), float(loss.entropy_coef))


def step_constants(step: Step) -> tuple:
    """The constants by which a kernel tells the step and its loss, from STEP to IMPORTANCE_MODE."""
    loss = step.loss if isinstance(step, Policy) else NO_LOSS
    kind = "policy" if isinstance(step, Policy) else "statistics" if step is None else "given"
    return kind, loss.objective, loss.dual_clip is not None, loss.kl, loss.importance_mode
