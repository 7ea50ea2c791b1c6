"""RMSNorm over the last dimension, fused: one read of x forward, one of x and dy backward; x is all that is kept.

    y = x / √(mean(x²) + eps) · w          (Zhang and Sennrich, 2019)      `one_plus`: · (1 + w), as in Gemma

Rounded to x's dtype once, at the end, as vLLM does it (Llama's and Qwen's modules round the quotient too).

    y = rms_norm(x, weight, 1e-6)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from ilr_kernels.backend import on_device, uses_triton
from torch import Tensor

PROGRAMS = 264  # of the backward pass, each with a row of the weight's gradient: two for each processor of an H100
ELEMENTS = 2048  # in a block


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, one_plus: bool = False) -> Tensor:
    """x [..., D] of any float dtype, contiguous rows → y like x; differentiable in x and the weight.

    Leading dimensions are [T] or [T, H], where rows of a token may lie apart from the next token's (a slice of a wider
    matrix). Raises ValueError for a wrong shape.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"weight_D must be [{x.shape[-1]}], the last dimension of x, not {tuple(weight_D.shape)}")
    return _RMSNorm.apply(x, weight_D, eps, one_plus)


class Gradient(NamedTuple):
    """What a backward pass gives: dx, dw in the weight's dtype (None where not asked for), and y made again."""

    dx: Tensor
    dw: Tensor | None
    y: Tensor | None


def norm_forward(x: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """`rms_norm` without a gradient; a row's bits do not depend on the other rows."""
    if not uses_triton(x):
        n, _, w = _parts(x, weight_D, eps, one_plus)
        return (n * w).to(x.dtype)
    return _launched(x, None, weight_D, eps, one_plus)[0]


def add_norm_forward(x: Tensor, add: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    """(the norm of x + add, x + add), in one pass: the sum is rounded to x's dtype, then normed. Both contiguous."""
    if not uses_triton(x):
        summed = x + add
        return norm_forward(summed, weight_D, eps, one_plus), summed
    y, total = _launched(x.contiguous(), add.contiguous(), weight_D, eps, one_plus)
    assert total is not None
    return y, total


def _launched(
    x: Tensor, add: Tensor | None, weight_D: Tensor, eps: float, one_plus: bool
) -> tuple[Tensor, Tensor | None]:
    from ilr_kernels.launch import launch
    from ilr_kernels.norm_kernel import norm_forward_kernel

    x, rows, heads, stride = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if add is None else torch.empty_like(y)
    block_r, block_d = _blocks(x.shape[-1])
    constants = x.shape[-1], one_plus, block_r, block_d
    arguments = (x, weight_D, y, add, total, rows, heads, stride, eps)
    with on_device(x):
        launch(norm_forward_kernel, (-(-rows // block_r),), arguments, constants, num_warps=_warps(block_d))
    return y, total


def norm_backward(
    x: Tensor, weight_D: Tensor, dy: Tensor, eps: float, one_plus: bool, *,
    weight_gradient: bool = True, add: Tensor | None = None, output: bool = False,
) -> Gradient:  # fmt: skip
    """Gradients from x alone; `add` (contiguous, like x) is added to dx, `output` makes y again in the same pass."""
    if not uses_triton(x):
        n, r, w = _parts(x, weight_D, eps, one_plus)
        slope = dy.to(n.dtype) * w
        dx = r * (slope - n * (slope * n).mean(-1, keepdim=True))
        dw = (dy.to(n.dtype) * n).flatten(0, -2).sum(0).to(weight_D.dtype) if weight_gradient else None
        dx = dx if add is None else dx + add
        return Gradient(dx.to(x.dtype), dw, (n * w).to(x.dtype) if output else None)
    from ilr_kernels.launch import launch
    from ilr_kernels.norm_kernel import norm_backward_kernel

    x, rows, heads, stride = _rows(x)
    dy, size = dy.contiguous(), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(dx) if output else None
    block_r, block_d = _blocks(size)
    blocks = -(-rows // (block_r * PROGRAMS))
    programs = -(-rows // (block_r * blocks))
    dw = x.new_empty(programs, size, dtype=torch.float32) if weight_gradient else None
    arguments = (x, weight_D, dy, dx, dw, add, y, rows, blocks, heads, stride, eps)
    constants = size, one_plus, block_r, block_d
    with on_device(x):
        launch(norm_backward_kernel, (programs,), arguments, constants, num_warps=_warps(block_d))
    return Gradient(dx, None if dw is None else dw.sum(0).to(weight_D.dtype), y)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, one_plus):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.options = eps, one_plus
        return norm_forward(x, weight, eps, one_plus)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        found = norm_backward(x, weight, dy, *ctx.options, weight_gradient=ctx.needs_input_grad[1])
        return found.dx, found.dw, None, None


def _parts(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, 1/rms and the factor, in float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w = x.to(wide), weight.to(wide) + (1 if one_plus else 0)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * r, r, w


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x such that its rows lie at token · stride + head · D, their number, heads a token, stride."""
    size = x.shape[-1]
    if x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == size:
        return x, x.shape[0] * x.shape[1], x.shape[1], x.stride(0)
    x = x.contiguous()
    return x, x.numel() // size, 1, size


def _blocks(size: int) -> tuple[int, int]:
    block_d = max(16, 1 << (size - 1).bit_length())
    return max(1, ELEMENTS // block_d), block_d


def _warps(block_d: int) -> int:
    return min(16, max(4, block_d // 512))
