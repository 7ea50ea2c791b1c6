"""The sweep over the LM head on a GPU: cuBLAS for the products, one Triton pass for what stands between them.

The logits of a chunk are held in the dtype of the hidden states, as the model's own head would round them, and are
overwritten by their gradient. Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from ilr_kernels.backend import on_device
from ilr_kernels.lm_head_kernel import rows_kernel
from ilr_kernels.policy_loss import PolicyLoss, TokenLoss
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Swept, chunk_logits, spread_gradients
from torch import Tensor

CHUNK_ELEMENTS = 2**28  # logits held at once: 512 MiB of 16-bit floats
MAX_BLOCK_V = 4096
WARPS = 8


def sweep(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    step: Given | Policy | None,
    grads: Gradients | None,
    chunk: int | None = None,
    with_entropy: bool = True,
) -> Swept:
    """Log-probs and entropies of N rows, and into `grads` the gradients that `step` asks for (see `sweep.py`)."""
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    chunk = min(n, chunk or max(128, CHUNK_ELEMENTS // vocabulary // 128 * 128))
    logp_N, entropy_N = hidden_ND.new_empty(2, n, dtype=torch.float32)
    slab_CV = hidden_ND.new_empty(chunk, vocabulary)
    vectors, constants, losses = _step_arguments(step, logp_N)
    loss = step.loss if isinstance(step, Policy) else PolicyLoss()
    target_N = target_N.contiguous()
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        logits_CV = chunk_logits(head, hidden_ND[rows], slab_CV)
        with on_device(slab_CV):
            rows_kernel[(len(logits_CV),)](
                logits_CV,
                target_N,
                logp_N,
                entropy_N,
                **vectors,
                first_row=start,
                vocabulary=vocabulary,
                stride=logits_CV.stride(0),
                softcap=float(head.softcap or 0.0),
                temperature=float(head.temperature),
                clip_low=float(loss.clip_low),
                clip_high=float(loss.clip_high),
                dual_clip=float(loss.dual_clip or 0.0),
                importance_cap=float(loss.importance_cap),
                beta=float(loss.beta),
                entropy_coef=float(loss.entropy_coef),
                **constants,
                GRADIENT=grads is not None,
                SOFTCAP=head.softcap is not None,
                BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocabulary)),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        if grads is not None:
            spread_gradients(logits_CV, hidden_ND, head, grads, rows)
    return Swept(logp_N, entropy_N if with_entropy else None, losses)


VECTORS = ("p_dlogp", "p_dentropy", "p_weight", "p_advantage", "p_old", "p_ref", "p_behavior")
OUTPUTS = ("p_value", "p_clipped", "p_kl", "p_truncated")


def _step_arguments(
    step: Given | Policy | None, like_N: Tensor
) -> tuple[dict[str, Tensor | None], dict[str, object], TokenLoss | None]:
    """The kernel's vectors and constants for a step, and the record whose fields the kernel fills."""
    vectors: dict[str, Tensor | None] = dict.fromkeys(VECTORS + OUTPUTS)
    loss = step.loss if isinstance(step, Policy) else PolicyLoss()
    constants: dict[str, object] = {
        "STEP": "policy" if isinstance(step, Policy) else "statistics" if step is None else "given",
        "OBJECTIVE": loss.objective,
        "DUAL_CLIP": loss.dual_clip is not None,
        "KL": loss.kl,
        "IMPORTANCE_MODE": loss.importance_mode,
    }
    if isinstance(step, Given):
        vectors["p_dlogp"] = step.dlogp_N.float().contiguous()
        vectors["p_dentropy"] = None if step.dentropy_N is None else step.dentropy_N.float().contiguous()
    if not isinstance(step, Policy):
        return vectors, constants, None
    t = step.inputs
    given_N = (t.weight_N, t.advantage_N, t.old_logp_N, t.ref_logp_N, t.behavior_logp_N)
    for name, x_N in zip(VECTORS[2:], given_N, strict=True):
        vectors[name] = None if x_N is None else x_N.contiguous()
    if loss.importance == "none":
        vectors["p_behavior"] = None
    value_N, dlogp_N, clipped_N, kl_N, truncated_N = torch.empty_like(like_N.expand(5, -1)).contiguous()
    vectors |= dict(zip(OUTPUTS, (value_N, clipped_N, kl_N, truncated_N), strict=True)) | {"p_dlogp": dlogp_N}
    losses = TokenLoss(value_N, dlogp_N, t.weight_N * -loss.entropy_coef, clipped_N, kl_N, truncated_N)
    return vectors, constants, losses
