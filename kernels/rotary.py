"""Rotary position embeddings of queries and keys (Su et al., 2021), in the layout of transformers' models:

y₁ = x₁ cos₁ − x₂ sin₁     y₂ = x₂ cos₂ + x₁ sin₂         (halves of each head)

q, k = rotary(q_THD, k_TKD, cos_TD, sin_TD)
"""

from __future__ import annotations

import torch
from ilr_kernels.backend import on_device, uses_triton
from torch import Tensor


def rotary(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated, contiguous; computed in float32 or float64, differentiable in q and k. D is even.

    A token's heads are contiguous, tokens may lie apart (slices of one matrix). Raises ValueError for a wrong shape.
    """
    if not q_THD.shape[-1] == k_TKD.shape[-1] == cos_TD.shape[-1] == sin_TD.shape[-1] or q_THD.shape[-1] % 2:
        raise ValueError("q_THD, k_TKD, cos_TD and sin_TD must have one last dimension, an even one")
    return _Rotary.apply(q_THD, k_TKD, cos_TD.contiguous(), sin_TD.contiguous())


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
        return *_rotate(dq, dk, *ctx.saved_tensors, backward=True), None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    if not uses_triton(q):
        return _written_out(q, cos, sin, backward), _written_out(k, cos, sin, backward)
    from ilr_kernels.rotary_kernel import rotary_kernel

    size = q.shape[-1]
    q, k = (x if x.stride(2) == 1 and x.stride(1) == size else x.contiguous() for x in (q, k))
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    heads, half = q.shape[1] + k.shape[1], size // 2
    with on_device(q):
        rotary_kernel[(len(q),)](
            q, k, cos, sin, *outs, len(q), q.shape[1], k.shape[1], q.stride(0), k.stride(0), size, half, backward,
            1 << (heads - 1).bit_length(), max(16, 1 << (half - 1).bit_length()), num_warps=4,
        )  # fmt: skip
    return outs[0], outs[1]


def _written_out(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, -1)
    c1, c2 = cos.to(wide)[:, None].chunk(2, -1)
    s1, s2 = sin.to(wide)[:, None].chunk(2, -1)
    if backward:
        return torch.cat([x1 * c1 + x2 * s2, x2 * c2 - x1 * s1], -1).to(x.dtype)
    return torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2], -1).to(x.dtype)
