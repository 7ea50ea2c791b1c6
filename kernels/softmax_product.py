"""The sweep over the LM head on a GPU in bfloat16: three products, and next to nothing between them.

The first product is ours and leaves exponentials instead of logits, with their sums (`softmax_product_kernel.py` has
the formulas); cuBLAS makes the other two from the exponentials E and a factor f for each row:

    dhidden = f · (E W), the product in float32      dweight = Eᵀ (f · hidden)

Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from ilr_kernels import softmax_product_kernel as kernels
from ilr_kernels.backend import on_device
from ilr_kernels.chunks import balanced, gpu_chunk
from ilr_kernels.rows import Gate
from ilr_kernels.scaling import add_scaled_rows, scale_rows
from ilr_kernels.softmax_fill import Softmax, fill
from ilr_kernels.step_arguments import step_constants, step_vectors
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Step, Swept, add_product
from torch import Tensor

STATISTICS_ROWS = 2**15  # rows at once where nothing is held but their sums


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
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    default = STATISTICS_ROWS if grads is None else gpu_chunk(vocabulary, hidden_ND.shape[1])
    chunk = balanced(n, chunk or default, tile=128)
    slab_CV = None if grads is None else _slab(hidden_ND, chunk, vocabulary)
    whole = _vectors(hidden_ND, n, with_entropy)
    vectors: dict[str, Tensor | None] = {}
    losses = None
    with on_device(hidden_ND):
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            softmax = whole.at(rows)._replace(exps_NV=None if slab_CV is None else slab_CV[: rows.stop - start])
            fill(head, hidden_ND[rows], target_N[rows], softmax, slope=not _entropy_counts(step), gate=gate)
            if start == 0:  # the GPU is busy from here on
                gate = None
                vectors, losses = step_vectors(step, whole.logp_N)
            _apply(head, hidden_ND, target_N, softmax, step, vectors, grads, rows)
    return Swept(whole.logp_N, whole.entropy_N, losses)


def keep(
    head: Head, hidden_ND: Tensor, target_N: Tensor, with_entropy: bool, gate: Gate | None = None
) -> Softmax:
    """One pass over N rows that keeps all exponentials, for `spread` to make gradients of."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    softmax = _vectors(hidden_ND, len(hidden_ND), with_entropy)
    softmax = softmax._replace(exps_NV=_slab(hidden_ND, len(hidden_ND), len(head.weight_VD)))
    with on_device(hidden_ND):
        fill(head, hidden_ND, target_N, softmax, slope=not with_entropy, gate=gate)
    return softmax


def spread(head: Head, hidden_ND: Tensor, target_N: Tensor, softmax: Softmax, step: Given, grads: Gradients) -> None:
    """The gradients of rows whose exponentials were kept, which are overwritten."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    vectors, _ = step_vectors(step, softmax.logp_N)
    with on_device(hidden_ND):
        _apply(head, hidden_ND, target_N, softmax, step, vectors, grads, slice(0, len(hidden_ND)))


def _apply(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    softmax: Softmax,
    step: Step,
    vectors: dict[str, Tensor | None],
    grads: Gradients | None,
    rows: slice,
) -> None:
    """Losses of a chunk's rows, and its gradients: `softmax` is the chunk's, `vectors` and `grads` are of all rows."""
    if step is None:
        return
    n = len(softmax.logp_N)
    entropy = _entropy_counts(step)
    own = {name: None if x is None else x[rows] for name, x in vectors.items()}
    factor_C = torch.empty_like(softmax.logp_N)
    exps_CV = softmax.exps_NV
    stride = 0 if exps_CV is None else exps_CV.stride(0)
    finish = {
        "softcap": float(head.softcap or 0.0),
        "temperature": float(head.temperature),
        "SOFTCAP": head.softcap is not None,
    }
    kernels.factors_kernel[(triton.cdiv(n, 128),)](
        exps_CV,
        target_N[rows],
        softmax.target_x_N,
        softmax.shift_N,
        softmax.others_N,
        softmax.logp_N,
        softmax.entropy_N,
        factor_C,
        **own,
        rows=n,
        exps_stride=stride,
        GRADIENT=grads is not None,
        ENTROPY=entropy,
        BLOCK_R=128,
        num_warps=4,
        enable_fp_fusion=True,
        **step_constants(step),
        **finish,
    )
    if grads is None:
        return
    assert exps_CV is not None
    if entropy:
        kernels.entropy_kernel[(n, triton.cdiv(exps_CV.shape[1], 4096))](
            exps_CV,
            target_N[rows],
            softmax.shift_N,
            softmax.others_N,
            softmax.target_x_N,
            softmax.entropy_N,
            own["p_dlogp"],
            own["p_dentropy"],
            exps_CV.shape[1],
            stride,
            BLOCK_V=4096,
            num_warps=8,
            enable_fp_fusion=True,
            **finish,
        )
    multiply_out(head, hidden_ND[rows], exps_CV, factor_C, grads, rows)


def multiply_out(
    head: Head, hidden_CD: Tensor, exps_CV: Tensor, factor_C: Tensor, grads: Gradients, rows: slice
) -> None:
    """dhidden, dweight and dbias of a chunk from its exponentials and its rows' factors."""
    if grads.hidden_ND is not None:
        product_CD = _wide_product(exps_CV, head.weight_VD)
        scale_rows(product_CD, factor_C, out=grads.hidden_ND[rows])
        del product_CD
    if grads.weight_VD is not None:
        scaled_CD = scale_rows(hidden_CD, factor_C, out=hidden_CD.new_empty(hidden_CD.shape))
        add_product(grads.weight_VD, exps_CV.t(), scaled_CD, overwrite=grads.fresh and rows.start == 0)
    if grads.bias_V is not None:
        add_scaled_rows(exps_CV, factor_C, grads.bias_V)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _entropy_counts(step: Step) -> bool:
    """Whether the entropy has a gradient."""
    if isinstance(step, Policy):
        return step.loss.entropy_coef != 0
    return step is not None and step.dentropy_N is not None


def _laid_out(hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same with hidden states in contiguous, aligned rows, as the head's are (`lm_head_autograd.keeps_softmax`)."""
    if hidden_ND.stride(1) != 1 or hidden_ND.stride(0) % 8 != 0 or hidden_ND.data_ptr() % 16 != 0:
        hidden_ND = hidden_ND.clone(memory_format=torch.contiguous_format)
    return hidden_ND, target_N.contiguous()


def _slab(hidden_ND: Tensor, rows: int, vocabulary: int) -> Tensor:
    """Room for exponentials; every row starts at a multiple of 128 bytes."""
    return hidden_ND.new_empty(rows, vocabulary + -vocabulary % 64)[:, :vocabulary]


def _vectors(hidden_ND: Tensor, n: int, with_entropy: bool) -> Softmax:
    logp_N, entropy_N, target_x_N, shift_N, others_N = hidden_ND.new_empty(5, n, dtype=torch.float32)
    return Softmax(logp_N, entropy_N if with_entropy else None, target_x_N, shift_N, others_N, None)
