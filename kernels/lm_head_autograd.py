"""The autograd side of the LM head: gradients formed ahead of the backward pass, and log-probs formed again in it."""

from __future__ import annotations

import torch
from ilr_kernels.backend import uses_triton
from ilr_kernels.rows import Gate, over_needed_rows, put, take
from ilr_kernels.sweep import Given, Gradients, Head, accumulation_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable


class FormedGradients(torch.autograd.Function):
    """Hangs gradients that are already there onto a value: backward scales them by the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, value, formed, must_be_unscaled: bool) -> Tensor:  # type: ignore[override]
        ctx.formed, ctx.must_be_unscaled = formed, must_be_unscaled
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        formed, ctx.formed = ctx.formed, None
        if formed is None:
            raise RuntimeError("linear_policy_loss: the gradients were used up by an earlier backward()")
        on_cpu = not upstream.is_cuda
        if on_cpu and float(upstream) == 1:
            return *formed, None, None, None
        if ctx.must_be_unscaled:
            if on_cpu:
                raise ValueError(
                    f"weight_grad_VD: dweight was formed for an upstream gradient of 1, not {float(upstream)}"
                )
            upstream = torch.where(upstream == 1, upstream, float("nan"))
        return *(None if g is None else _scaled(g, upstream) for g in formed), None, None, None


class LinearLogprob(torch.autograd.Function):
    """Log-probs and entropies; the backward pass forms the logits again, or uses the softmax that was kept."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, counting, temperature, softcap, with_entropy, keep):  # type: ignore[override]
        ctx.temperature, ctx.softcap, ctx.with_entropy, ctx.kept = temperature, softcap, with_entropy, None
        head = Head(weight_VD, bias_V, temperature, softcap)

        def run(rows: Tensor | None, gate: Gate | None) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
            hidden_ND, target_N = take(hidden_TD, rows), take(target_T, rows)
            if target_N.shape[0] == 0:
                nothing_N = hidden_TD.new_zeros(0, dtype=accumulation_dtype(hidden_TD.dtype))
                return rows, (nothing_N, nothing_N if with_entropy else None)
            if keep and keeps_softmax(hidden_ND, weight_VD):
                from ilr_kernels import softmax_product

                ctx.kept = softmax_product.keep(head, hidden_ND, target_N, with_entropy, gate)
                return rows, (ctx.kept.logp_N, ctx.kept.entropy_N)
            sweep = choose_sweep(hidden_ND, weight_VD)
            return rows, sweep(head, hidden_ND, target_N, None, None, with_entropy=with_entropy, gate=gate)[:2]

        rows, found = over_needed_rows(counting, run)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, rows)
        return tuple(None if x is None else put(x, rows, target_T.shape[0], 0) for x in found)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_T, dentropy_T):  # type: ignore[override]
        hidden_TD, weight_VD, bias_V, target_T, rows = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.temperature, ctx.softcap)
        hidden_ND, target_N = take(hidden_TD, rows), take(target_T, rows)
        grads = make_buffers(head, hidden_ND, ctx.needs_input_grad[0], None)
        if target_N.shape[0] > 0:
            dentropy_N = None if dentropy_T is None or not ctx.with_entropy else take(dentropy_T, rows)
            step = Given(take(dlogp_T, rows), dentropy_N)
            if ctx.kept is None:
                sweep = choose_sweep(hidden_ND, weight_VD)
                sweep(head, hidden_ND, target_N, step, grads, with_entropy=dentropy_N is not None)
            else:
                _spread_kept(ctx, head, hidden_ND, target_N, step, grads)
        dhidden_TD = None if grads.hidden_ND is None else put(grads.hidden_ND, rows, target_T.shape[0], 0)
        dweight_VD, dbias_V = (None if g is None else g.to(weight_VD.dtype) for g in (grads.weight_VD, grads.bias_V))
        return dhidden_TD, dweight_VD, dbias_V, None, None, None, None, None, None


def _spread_kept(ctx, head: Head, hidden_ND: Tensor, target_N: Tensor, step: Given, grads: Gradients) -> None:
    """The gradients of a softmax that was kept, once: they are made in its place."""
    from ilr_kernels import softmax_product

    kept, ctx.kept = ctx.kept, ()
    if not kept:
        raise RuntimeError("linear_logprob: keep_softmax allows one backward(); leave it out to call backward() again")
    softmax_product.spread(head, hidden_ND, target_N, kept, step, grads)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in place; on a GPU a factor of 1 costs next to nothing, and nobody has to wait to see it."""
    if not x.is_cuda or x.dtype == torch.float64 or not x.is_contiguous():
        return x.mul_(factor)
    from ilr_kernels.scaling import scale

    return scale(x, factor)


def make_buffers(head: Head, hidden_ND: Tensor, dhidden: bool, weight_grad_VD: Tensor | None) -> Gradients:
    """Room for the gradients that are wanted; dweight adds up in its own dtype on a GPU, else in float32 at least."""
    dtype = accumulation_dtype(hidden_ND.dtype)
    dweight_VD, fresh = weight_grad_VD, False
    if dweight_VD is None and head.weight_VD.requires_grad:
        fresh = uses_triton(hidden_ND) and hidden_ND.shape[0] > 0
        make = torch.empty_like if fresh else torch.zeros_like
        dweight_VD = make(head.weight_VD, dtype=head.weight_VD.dtype if hidden_ND.is_cuda else dtype)
    return Gradients(
        torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if dhidden else None,
        dweight_VD,
        torch.zeros_like(head.bias_V, dtype=dtype) if head.bias_V is not None and head.bias_V.requires_grad else None,
        fresh,
    )


def differentiates(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, weight_grad_VD: Tensor | None) -> bool:
    """Whether anything that a call is given wants a gradient, and gradients are on."""
    if not torch.is_grad_enabled():
        return False
    return weight_grad_VD is not None or any(x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias_V))


def choose_sweep(hidden_ND: Tensor, weight_VD: Tensor):
    """The sweep of the backend that takes this tensor; Triton is imported only where it is used."""
    if keeps_softmax(hidden_ND, weight_VD):
        from ilr_kernels import softmax_product

        return softmax_product.sweep
    if uses_triton(hidden_ND):
        from ilr_kernels import lm_head_triton

        return lm_head_triton.sweep
    from ilr_kernels import lm_head_torch

    return lm_head_torch.sweep


def keeps_softmax(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether the softmax comes out of the product itself: exponentials need bfloat16's range of exponents.

    Rows must start at multiples of 16 bytes, in a head that is its own.
    """
    aligned = weight_VD.stride(1) == 1 and weight_VD.stride(0) % 8 == 0 and weight_VD.data_ptr() % 16 == 0
    return hidden_ND.dtype == torch.bfloat16 and hidden_ND.shape[1] % 8 == 0 and aligned and uses_triton(hidden_ND)
