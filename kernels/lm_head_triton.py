"""The sweep over the LM head on a GPU in float32 and float16: cuBLAS for the products, one Triton pass in place.

The logits of a chunk are held in the dtype of the hidden states, as the model's own head would round them, and are
overwritten by their gradient. (In bfloat16, whose exponents reach as far as float32's, `softmax_product.py` does with
less.) Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from ilr_kernels.backend import on_device
from ilr_kernels.chunks import gpu_wide_chunk
from ilr_kernels.launch import aligned_vectors, launch
from ilr_kernels.lm_head_kernel import rows_kernel
from ilr_kernels.rows import Gate
from ilr_kernels.step_arguments import step_constants, step_scalars, step_vectors
from ilr_kernels.sweep import Gradients, Head, Step, Swept, chunk_logits, spread_gradients
from torch import Tensor

BLOCK_BYTES = 4096  # of a row's logits, worked on at once
WARPS = 8


def sweep(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    step: Step,
    grads: Gradients | None,
    chunk: int | None = None,
    with_entropy: bool = True,
    gate: Gate | None = None,
) -> Swept:
    """Log-probs and entropies of N rows, and into `grads` the gradients that `step` asks for (see `sweep.py`)."""
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    chunk = min(n, chunk or gpu_wide_chunk(vocabulary))
    logp_N, entropy_N = aligned_vectors(2, n, hidden_ND)
    slab_CV = hidden_ND.new_empty(chunk, vocabulary)
    vectors, losses = step_vectors(step, logp_N)
    target_N = target_N.contiguous()
    if gate is not None:
        gate.wait()
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        logits_CV = chunk_logits(head, hidden_ND[rows], slab_CV)
        _pass(logits_CV, target_N, logp_N, entropy_N, vectors, start, head, step, grads is not None)
        if grads is not None:
            spread_gradients(logits_CV, hidden_ND, head, grads, rows)
    return Swept(logp_N, entropy_N if with_entropy else None, losses)


def read_logits(
    logits_TV: Tensor, target_T: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] of given logits, which are read once; 0 where the target is outside."""
    logp_T, entropy_T = logits_TV.new_empty(2, len(logits_TV), dtype=torch.float32)
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    if len(logits_TV) > 0:
        head = Head(logits_TV, None, temperature, softcap)
        vectors, _ = step_vectors(None, logp_T)
        _pass(logits_TV, target_T.contiguous(), logp_T, entropy_T, vectors, 0, head, None, False)
    return logp_T, entropy_T


def _pass(
    logits_CV: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    entropy_N: Tensor,
    vectors: dict[str, Tensor | None],
    first_row: int,
    head: Head,
    step: Step,
    gradient: bool,
) -> None:
    """The kernel over one chunk of logits; of `head` only what finishes a logit counts."""
    vocabulary = logits_CV.shape[1]
    tensors = (logits_CV, target_N, logp_N, entropy_N, *vectors.values())
    finish = (float(head.softcap or 0.0), float(head.temperature))
    arguments = (*tensors, first_row, vocabulary, logits_CV.stride(0), *finish, *step_scalars(step))
    block = min(BLOCK_BYTES // logits_CV.element_size(), triton.next_power_of_2(vocabulary))
    constants = (gradient, head.softcap is not None, block, *step_constants(step))
    # Fused, softcap · tanh − peak would be the rounding of the peak where it must be 0: entropies near 0 would show it.
    fused = head.softcap is None
    with on_device(logits_CV):
        launch(rows_kernel, (len(logits_CV),), arguments, constants, num_warps=WARPS, enable_fp_fusion=fused)
