"""Rotary position embeddings of queries and keys (Su et al., 2021), in the layout of transformers' models:

y₁ = x₁ cos₁ − x₂ sin₁     y₂ = x₂ cos₂ + x₁ sin₂         (halves of each head)

q, k, v = rotated_split(qkv_TN, cos_TD, sin_TD, heads=12, key_heads=2)     # in place
q, k = rotary(q_THD, k_TKD, cos_TD, sin_TD)
"""

from __future__ import annotations

import torch
from ilr_kernels.backend import on_device, uses_triton
from torch import Tensor


def rotary(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated copies; computed in float32 or float64, differentiable in q and k. D is even.

    A token's heads are contiguous, tokens may lie apart (slices of one matrix). Raises ValueError for a wrong shape.
    """
    _check(q_THD, k_TKD, cos_TD, sin_TD)
    return _Rotary.apply(q_THD, k_TKD, cos_TD.contiguous(), sin_TD.contiguous())


def rotated_split(
    qkv_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D] rotated, and values [T, K, D]: parts of `qkv_TN`, which is overwritten.

    N is H + 2K heads of size D. Differentiable; what made `qkv_TN` must not need its values in its own backward pass (a
    product does not). Raises ValueError for a wrong shape.
    """
    size = cos_TD.shape[-1]
    if qkv_TN.dim() != 2 or qkv_TN.shape[1] != (heads + 2 * key_heads) * size or not qkv_TN.is_contiguous():
        raise ValueError(f"qkv_TN must be contiguous [T, {(heads + 2 * key_heads) * size}], not {tuple(qkv_TN.shape)}")
    return _RotatedSplit.apply(qkv_TN, cos_TD.contiguous(), sin_TD.contiguous(), heads, key_heads)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        outs = (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device),
        )
        rotate(q, k, cos, sin, *outs, backward=False)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
        outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq, dk))  # heads side by side
        rotate(dq, dk, *ctx.saved_tensors, *outs, backward=True)
        return *outs, None, None


class _RotatedSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, key_heads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.parts = heads, key_heads, key_heads
        q, k, v = qkv.view(len(qkv), -1, cos.shape[-1]).split(ctx.parts, dim=1)
        rotate(q, k, cos, sin, q, k, backward=False)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        whole = dq.new_empty(len(dq), sum(ctx.parts), dq.shape[-1])
        q, k, v = whole.split(ctx.parts, dim=1)
        rotate(dq, dk, cos, sin, q, k, backward=True)
        v.copy_(dv)
        return whole.flatten(1), None, None, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, *, backward: bool) -> None:
    """Into `q_out` and `k_out`, which may be q and k themselves."""
    if not uses_triton(q):
        q_out.copy_(_written_out(q, cos, sin, backward))
        k_out.copy_(_written_out(k, cos, sin, backward))
        return
    _launched(q, k, cos, sin, None, q_out, k_out, backward)


def rotate_by_table(q_THD: Tensor, k_TKD: Tensor, table_PD: Tensor, positions_T: Tensor) -> None:
    """Rotates in place, by the rows of a table for each position: cos, then sin, of half the size, as in vLLM."""
    _check(q_THD, k_TKD, table_PD, table_PD)
    cos_PH, sin_PH = table_PD.chunk(2, -1)
    if not uses_triton(q_THD):
        cos_TD, sin_TD = (x[positions_T].repeat(1, 2) for x in (cos_PH, sin_PH))
        rotate(q_THD, k_TKD, cos_TD, sin_TD, q_THD, k_TKD, backward=False)
        return
    _launched(q_THD, k_TKD, cos_PH, sin_PH, positions_T, q_THD, k_TKD, backward=False)


def _launched(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, q_out: Tensor, k_out: Tensor,
    backward: bool,
) -> None:  # fmt: skip
    from ilr_kernels.launch import launch
    from ilr_kernels.rotary_kernel import rotary_kernel

    size = q.shape[-1]
    q, k = (x if x.stride(2) == 1 and x.stride(1) == size else x.contiguous() for x in (q, k))
    heads, half = q.shape[1] + k.shape[1], size // 2
    strides = q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0)
    arguments = (q, k, cos, sin, positions, q_out, k_out, len(q), q.shape[1], k.shape[1], *strides)
    second = half if positions is None else 0
    blocks = 1 << (heads - 1).bit_length(), max(16, 1 << (half - 1).bit_length())
    with on_device(q):
        launch(rotary_kernel, (len(q),), arguments, (size, half, second, backward, *blocks), num_warps=4)


def _written_out(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, -1)
    c1, c2 = cos.to(wide)[:, None].chunk(2, -1)
    s1, s2 = sin.to(wide)[:, None].chunk(2, -1)
    if backward:
        return torch.cat([x1 * c1 + x2 * s2, x2 * c2 - x1 * s1], -1).to(x.dtype)
    return torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2], -1).to(x.dtype)


def _check(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    sizes = {x.shape[-1] for x in (q_THD, k_TKD, cos_TD, sin_TD)}
    if len(sizes) > 1 or q_THD.shape[-1] % 2:
        raise ValueError("q_THD, k_TKD, cos_TD and sin_TD must have one last dimension, an even one")
