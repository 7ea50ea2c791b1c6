"""A gated MLP as one step of autograd, and its gated unit alone where adapters stand around its layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ilr_kernels.gated import gated, gated_backward_

from ilr_fast.products import add_products, whole_of


class GatedMLP(torch.autograd.Function):
    """down(act(gate x) · up x); the product of gate and up is kept, or formed again, and then overwritten."""

    @staticmethod
    def forward(ctx, x, activation, recompute, gate, up, down):  # type: ignore[no-untyped-def]
        both = F.linear(x, whole_of((gate, up)))
        ctx.save_for_backward(x, None if recompute else both)
        ctx.rest = activation, gate, up, down
        return F.linear(gated(*both.chunk(2, -1), activation), down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x, both), (activation, gate, up, down) = ctx.saved_tensors, ctx.rest
        whole = whole_of((gate, up))
        both = F.linear(x, whole) if both is None else both
        out = dy @ down
        gated_backward_(*both.chunk(2, -1), out, activation)
        add_products((down,), dy, out)
        del out
        add_products((gate, up), both, x)
        return both @ whole if ctx.needs_input_grad[0] else None, None, None, None, None, None


class Gated(torch.autograd.Function):
    """act(gate) · up, between layers that are not plain."""

    @staticmethod
    def forward(ctx, gate, up, activation):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        gate, up = (x.clone() for x in ctx.saved_tensors)
        gated_backward_(gate, up, dout.clone(), ctx.activation)
        return gate, up, None
