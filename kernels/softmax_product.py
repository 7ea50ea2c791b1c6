"""The sweep over the LM head on a GPU in bfloat16: three products, and next to nothing between them.

The first product is ours and leaves exponentials instead of logits, with their sums (`softmax_product_kernel.py` has
the formulas); cuBLAS makes the other two from the exponentials E and a factor f for each row:

    dhidden = f · (E W), the product in float32      dweight = Eᵀ (f · hidden)

Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from ilr_kernels import softmax_product_kernel as kernels
from ilr_kernels.backend import on_device
from ilr_kernels.product_plan import Plan, plan
from ilr_kernels.step_arguments import step_constants, step_vectors
from ilr_kernels.sweep import Given, Gradients, Head, Policy, Step, Swept, add_product
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Exponentials held at once: 1.25 GiB; for large heads, whose dweight each chunk reads and writes, up to two heads.
CHUNK_ELEMENTS = 5 * 2**27, 2**30
STATISTICS_ROWS = 2**15  # rows at once where nothing is held but their sums
LOG2E = 1.4426950408889634


class Softmax(NamedTuple):
    """What one pass over N rows leaves: float32 vectors, and the exponentials where they were wanted."""

    logp_N: Tensor
    entropy_N: Tensor | None
    target_x_N: Tensor
    shift_N: Tensor
    others_N: Tensor
    exps_NV: Tensor | None

    def at(self, rows: slice) -> Softmax:
        """The same of some rows; exponentials are those of a chunk and stay whole."""
        entropy_N = None if self.entropy_N is None else self.entropy_N[rows]
        vectors = (self.target_x_N[rows], self.shift_N[rows], self.others_N[rows])
        return Softmax(self.logp_N[rows], entropy_N, *vectors, self.exps_NV)


def sweep(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    step: Step,
    grads: Gradients | None,
    chunk: int | None = None,
    with_entropy: bool = True,
) -> Swept:
    """Log-probs and entropies of N rows, and into `grads` the gradients that `step` asks for (see `sweep.py`)."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    n, vocabulary = len(hidden_ND), len(head.weight_VD)
    default = STATISTICS_ROWS if grads is None else default_chunk(vocabulary, hidden_ND.shape[1])
    chunk = balanced(n, chunk or default, tile=128)
    slab_CV = None if grads is None else _slab(hidden_ND, chunk, vocabulary)
    whole = _vectors(hidden_ND, n, with_entropy)
    vectors: dict[str, Tensor | None] = {}
    losses = None
    with on_device(hidden_ND):
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            softmax = whole.at(rows)._replace(exps_NV=None if slab_CV is None else slab_CV[: rows.stop - start])
            fill(head, hidden_ND[rows], target_N[rows], softmax, slope=not _entropy_counts(step))
            if start == 0:  # the GPU is busy from here on
                vectors, losses = step_vectors(step, whole.logp_N)
            _apply(head, hidden_ND, target_N, softmax, step, vectors, grads, rows)
    return Swept(whole.logp_N, whole.entropy_N, losses)


def keep(head: Head, hidden_ND: Tensor, target_N: Tensor, with_entropy: bool) -> Softmax:
    """One pass over N rows that keeps all exponentials, for `spread` to make gradients of."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    softmax = _vectors(hidden_ND, len(hidden_ND), with_entropy)
    softmax = softmax._replace(exps_NV=_slab(hidden_ND, len(hidden_ND), len(head.weight_VD)))
    with on_device(hidden_ND):
        fill(head, hidden_ND, target_N, softmax, slope=not with_entropy)
    return softmax


def spread(head: Head, hidden_ND: Tensor, target_N: Tensor, softmax: Softmax, step: Given, grads: Gradients) -> None:
    """The gradients of rows whose exponentials were kept, which are overwritten."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    vectors, _ = step_vectors(step, softmax.logp_N)
    with on_device(hidden_ND):
        _apply(head, hidden_ND, target_N, softmax, step, vectors, grads, slice(0, len(hidden_ND)))


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in place, for a contiguous x and a scalar on the same GPU."""
    programs = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count
    with on_device(x):
        kernels.scale_kernel[(min(programs, triton.cdiv(x.numel(), 4096)),)](
            x, factor, x.numel(), PROGRAMS=programs, BLOCK=4096, num_warps=8
        )
    return x


def default_chunk(vocabulary: int, depth: int) -> int:
    """Rows whose exponentials are held at once."""
    least, most = CHUNK_ELEMENTS
    return max(128, min(max(2 * vocabulary * depth, least), most) // vocabulary)


def balanced(n: int, most: int, tile: int) -> int:
    """Rows of a chunk: as few chunks as `most` allows, of equal size, in whole tiles where that fits."""
    chunks = -(-n // min(n, most))
    rows = -(-n // chunks)
    return min(rows + -rows % tile, most) if most >= tile else rows


def fill(head: Head, hidden_CD: Tensor, target_C: Tensor, softmax: Softmax, slope: bool) -> None:
    """Computes a chunk's softmax into `softmax`; the last four launches do nothing unless a sum overflowed."""
    rows, vocabulary = len(hidden_CD), len(head.weight_VD)
    chosen = plan(hidden_CD, head.weight_VD, head.softcap is not None)
    tiles = triton.cdiv(vocabulary, chosen.block_n)
    total, moment = softmax.logp_N.new_empty(2, tiles, rows)
    redo = softmax.logp_N.new_empty(1, dtype=torch.int32)
    softcap = {"softcap": float(head.softcap or 0.0), "SOFTCAP": head.softcap is not None}
    kernels.target_kernel[(rows,)](
        hidden_CD,
        head.weight_VD,
        head.bias_V,
        target_C,
        softmax.target_x_N,
        softmax.shift_N,
        redo,
        hidden_CD.shape[1],
        hidden_CD.stride(0),
        head.weight_VD.stride(0),
        temperature=float(head.temperature),
        BLOCK_D=min(2048, triton.next_power_of_2(hidden_CD.shape[1])),
        num_warps=4,
        enable_fp_fusion=True,
        **softcap,
    )

    def product(peak: bool, redo: Tensor | None) -> None:
        exps_CV = None if peak else softmax.exps_NV
        kernels.product_kernel[(min(chosen.programs, tiles * triton.cdiv(rows, chosen.block_m)),)](
            *_operands(chosen, hidden_CD, head.weight_VD, exps_CV),
            head.bias_V,
            target_C,
            softmax.shift_N,
            total,
            moment,
            redo,
            rows,
            vocabulary,
            hidden_CD.shape[1],
            hidden_CD.stride(0),
            head.weight_VD.stride(0),
            0 if exps_CV is None else exps_CV.stride(0),
            scale=LOG2E / head.temperature,
            SLOPE=slope,
            MOMENT=softmax.entropy_N is not None and not peak,
            PEAK=peak,
            TMA=chosen.tma,
            FLATTEN=chosen.flatten,
            HALVES=chosen.halves,
            WIDEN=not hidden_CD.is_cuda,
            PROGRAMS=chosen.programs,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            GROUP=chosen.group,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
            **softcap,
        )

    def sums(again: bool) -> None:
        kernels.sums_kernel[(triton.cdiv(rows, 32),)](
            total,
            moment,
            softmax.target_x_N,
            softmax.shift_N,
            softmax.others_N,
            softmax.logp_N,
            softmax.entropy_N,
            redo,
            rows,
            tiles,
            REDO=again,
            BLOCK_R=32,
            BLOCK_T=32,
            num_warps=4,
        )

    product(peak=False, redo=None)
    sums(again=False)
    product(peak=True, redo=redo)
    kernels.peaks_kernel[(triton.cdiv(rows, 32),)](
        total, softmax.shift_N, softmax.others_N, redo, rows, tiles, BLOCK_R=32, BLOCK_T=32, num_warps=4
    )
    product(peak=False, redo=redo)
    sums(again=True)


def _operands(chosen: Plan, hidden_CD: Tensor, weight_VD: Tensor, exps_CV: Tensor | None) -> list[object]:
    """hidden, weight and exponentials as the kernel takes them: descriptors for the copy engine, or tensors."""
    operands: list[object] = [hidden_CD, weight_VD, exps_CV]
    if not chosen.tma:
        return operands
    width = chosen.block_n // 2 if chosen.halves else chosen.block_n
    blocks = ([chosen.block_m, chosen.block_k], [chosen.block_n, chosen.block_k], [chosen.block_m, width])
    return [
        None if x is None else TensorDescriptor(x, list(x.shape), list(x.stride()), block)
        for x, block in zip((hidden_CD, weight_VD, exps_CV), blocks, strict=True)
    ]


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
        vocabulary = exps_CV.shape[1]
        kernels.bias_kernel[(triton.cdiv(vocabulary, 256),)](
            exps_CV, factor_C, grads.bias_V, len(exps_CV), vocabulary, exps_CV.stride(0), BLOCK_R=32, BLOCK_V=256
        )


def scale_rows(x_CD: Tensor, factor_C: Tensor, out: Tensor) -> Tensor:
    """out ← factor · x, row by row, rounded once; rows of x may be strided, those of `out` are not."""
    if not x_CD.is_cuda:  # the interpreter rounds to bfloat16 towards zero
        return torch.mul(x_CD, factor_C[:, None], out=out)
    depth = x_CD.shape[1]
    kernels.scale_rows_kernel[(len(x_CD), triton.cdiv(depth, 2048))](
        x_CD, factor_C, out, depth, x_CD.stride(0), BLOCK_D=min(2048, triton.next_power_of_2(depth)), num_warps=4
    )
    return out


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
