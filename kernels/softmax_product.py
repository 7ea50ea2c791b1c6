"""The sweep over the LM head on a GPU in bfloat16: three products, and next to nothing between them.

The first product is ours and leaves exponentials instead of logits, with their sums (`softmax_product_kernel.py` has
the formulas); cuBLAS makes the other two from the exponentials E and a factor f for each row:

    dhidden = f · (E W), the product in float32      dweight = Eᵀ (f · hidden)

Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
from ilr_kernels import softmax_rows_kernel as kernels
from ilr_kernels.backend import on_device
from ilr_kernels.chunks import balanced, gpu_chunk
from ilr_kernels.launch import aligned_vectors, launch
from ilr_kernels.rows import Gate
from ilr_kernels.scaling import add_scaled_rows, scale_rows
from ilr_kernels.softmax_fill import Block, Softmax, cut, fill, tile_width
from ilr_kernels.step_arguments import step_constants, step_scalars, step_vectors
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
    n = hidden_ND.shape[0]
    chunk, blocks = _room(head, hidden_ND, grads, chunk)
    whole = _vectors(hidden_ND, with_entropy, blocks)
    vectors: dict[str, Tensor | None] = {}
    losses = None
    with on_device(hidden_ND):
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            softmax = whole.at(rows)
            hidden_CD, target_C = cut(hidden_ND, rows), cut(target_N, rows)
            fill(head, hidden_CD, target_C, softmax, slope=not _entropy_counts(step), gate=gate)
            if start == 0:  # the GPU is busy from here on
                gate = None
                vectors, losses = step_vectors(step, whole.logp_N)
            _apply(head, hidden_CD, target_C, softmax, step, vectors, grads, rows)
    return Swept(whole.logp_N, whole.entropy_N, losses)


def keep(head: Head, hidden_ND: Tensor, target_N: Tensor, with_entropy: bool, gate: Gate | None = None) -> Softmax:
    """One pass over N rows that keeps all exponentials, for `spread` to make gradients of."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    vocabulary = len(head.weight_VD)
    blocks = (Block(0, vocabulary, _slab(hidden_ND, len(hidden_ND), vocabulary)),)
    softmax = _vectors(hidden_ND, with_entropy, blocks)
    with on_device(hidden_ND):
        fill(head, hidden_ND, target_N, softmax, slope=not with_entropy, gate=gate)
    return softmax


def spread(head: Head, hidden_ND: Tensor, target_N: Tensor, softmax: Softmax, step: Given, grads: Gradients) -> None:
    """The gradients of rows whose exponentials were kept, which are overwritten."""
    hidden_ND, target_N = _laid_out(hidden_ND, target_N)
    vectors, _ = step_vectors(step, softmax.logp_N)
    with on_device(hidden_ND):
        _apply(head, hidden_ND, target_N, softmax, step, vectors, grads, slice(0, len(hidden_ND)))


def _room(head: Head, hidden_ND: Tensor, grads: Gradients | None, chunk: int | None) -> tuple[int, tuple[Block, ...]]:
    """Rows of a chunk, and where their exponentials go."""
    n, vocabulary = hidden_ND.shape[0], head.weight_VD.shape[0]
    if grads is None:
        return balanced(n, chunk or STATISTICS_ROWS, tile=128), (Block(0, vocabulary, None),)
    most = chunk or gpu_chunk(vocabulary, hidden_ND.shape[1])
    if chunk is None and n > most:
        blocks = _within_dweight(head, hidden_ND, grads, most * vocabulary)
        if blocks is not None:
            return n, blocks
    chunk = balanced(n, most, tile=128)
    return chunk, (Block(0, vocabulary, _slab(hidden_ND, chunk, vocabulary)),)


def _within_dweight(head: Head, hidden_ND: Tensor, grads: Gradients, most: int) -> tuple[Block, Block] | None:
    """Room for all rows at once, where dweight is new and spares enough of it; None elsewhere.

    Until dweight is formed its memory is free: the exponentials of the last tokens lie in the first tokens' rows of it.
    dweight of the last tokens is formed first, which leaves those rows alone; then that of the first, over them. So
    dweight is written once, and not read and written again for a second chunk. `most` elements may lie elsewhere.
    """
    if not grads.fresh or grads.weight_VD is None or not grads.weight_VD.is_contiguous():
        return None
    n, (vocabulary, depth) = hidden_ND.shape[0], head.weight_VD.shape
    room = depth * grads.weight_VD.element_size() // 2  # elements of a token's row
    tile = tile_width(hidden_ND, head)
    last = (vocabulary * room - 64 * n) // (n + room)
    first = -(-(vocabulary - last) // tile) * tile
    if last <= 0 or first >= vocabulary or n * first > most:
        return None
    width = vocabulary - first
    padded = width + -width % 64
    spare = grads.weight_VD[:first].view(torch.bfloat16).view(-1)[: n * padded].view(n, padded)[:, :width]
    return Block(0, first, _slab(hidden_ND, n, first)), Block(first, vocabulary, spare)


def _apply(
    head: Head,
    hidden_CD: Tensor,
    target_C: Tensor,
    softmax: Softmax,
    step: Step,
    vectors: dict[str, Tensor | None],
    grads: Gradients | None,
    rows: slice,
) -> None:
    """Losses of a chunk's rows, and its gradients: `softmax` is the chunk's, `vectors` and `grads` are of all rows."""
    if step is None:
        return
    n = softmax.logp_N.shape[0]
    entropy = _entropy_counts(step)
    own = {name: None if x is None else cut(x, rows) for name, x in vectors.items()}
    factor_C = torch.empty_like(softmax.logp_N)
    first, more = (*softmax.blocks, None)[:2]
    exps_CV, more_CV = first.exps_NV, None if more is None else more.exps_NV
    strides = (0 if x is None else x.stride(0) for x in (exps_CV, more_CV))
    finish = (float(head.softcap or 0.0), float(head.temperature))
    softcap = head.softcap is not None
    found = (softmax.target_x_N, softmax.shift_N, softmax.others_N, softmax.logp_N, softmax.entropy_N)
    arguments = (exps_CV, more_CV, target_C, *found, factor_C, *own.values(), n, *strides, first.end, *finish)
    constants = (grads is not None, entropy, softcap, 128, *step_constants(step))
    launch(kernels.factors_kernel, (-(-n // 128),), (*arguments, *step_scalars(step)), constants, num_warps=4)
    if grads is None:
        return
    if entropy:
        for block in softmax.blocks:
            vectors_C = (softmax.shift_N, softmax.others_N, softmax.target_x_N, softmax.entropy_N)
            tensors = (block.kept_NV, block.target(target_C), *vectors_C, own["p_dlogp"], own["p_dentropy"])
            width = block.end - block.first
            arguments = (*tensors, width, block.kept_NV.stride(0), *finish)
            launch(kernels.entropy_kernel, (n, -(-width // 4096)), arguments, (softcap, 4096), num_warps=8)
    multiply_out(head, hidden_CD, softmax.blocks, factor_C, grads, rows)


def multiply_out(
    head: Head, hidden_CD: Tensor, blocks: tuple[Block, ...], factor_C: Tensor, grads: Gradients, rows: slice
) -> None:
    """dhidden, dweight and dbias of a chunk from its exponentials and its rows' factors.

    The last block's dweight is formed first: its exponentials may lie where the first's dweight goes.
    """
    if grads.hidden_ND is not None:
        product_CD = _wide_product(blocks, head.weight_VD)
        scale_rows(product_CD, factor_C, out=cut(grads.hidden_ND, rows))
        del product_CD
    if grads.bias_V is not None:
        for block in blocks:
            add_scaled_rows(block.kept_NV, factor_C, grads.bias_V[block.first : block.end])
    if grads.weight_VD is not None:
        scaled_CD = scale_rows(hidden_CD, factor_C, out=hidden_CD.new_empty(hidden_CD.shape))
        for block in reversed(blocks):
            into = grads.weight_VD[block.first : block.end]
            add_product(into, block.kept_NV.t(), scaled_CD, overwrite=grads.fresh and rows.start == 0)


def _wide_product(blocks: tuple[Block, ...], weight_VD: Tensor) -> Tensor:
    """exps @ weight in float32."""
    first, *others = ((block.kept_NV, weight_VD[block.first : block.end]) for block in blocks)
    if not weight_VD.is_cuda:
        return sum((a.float() @ b.float() for a, b in others), first[0].float() @ first[1].float())
    product_CD = torch.mm(*first, out_dtype=torch.float32)
    for pair in others:
        add_product(product_CD, *pair)
    return product_CD


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


def _vectors(hidden_ND: Tensor, with_entropy: bool, blocks: tuple[Block, ...]) -> Softmax:
    logp_N, entropy_N, target_x_N, shift_N, others_N = aligned_vectors(5, hidden_ND.shape[0], hidden_ND)
    return Softmax(logp_N, entropy_N if with_entropy else None, target_x_N, shift_N, others_N, blocks)
