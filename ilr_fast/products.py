"""Linear layers whose weight gradients are added up by the product itself, several layers as one product.

autograd forms each micro-batch's weight gradient and then adds it to `.grad`: a third of a step's traffic on small
models. Here the product adds to `.grad` as it writes. Layers with the same input (q, k, v; gate, up) are one product
where their weights lie one after another in memory, as vLLM's fused weights do, or are moved there.

    y_TN = linear(x_TD, (q_proj, k_proj, v_proj))      # the outputs side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(*layers: Any) -> bool:
    """Whether all are ordinary linear layers, not adapters around them."""
    return all(type(layer) is nn.Linear for layer in layers)


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor over all rows, without a copy; None where they do not lie one after another."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach()
    place = first.data_ptr()
    for x in tensors:
        if not x.is_contiguous() or x.data_ptr() != place or x.dtype != first.dtype or x.shape[1:] != first.shape[1:]:
            return None
        if x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += x.numel() * x.element_size()
    rows = sum(len(x) for x in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def move_together(layers: Sequence[nn.Linear]) -> None:
    """Gives the layers' weights (and biases, where all have one) one place in memory, one after another.

    Those that are part of something larger already, an engine's weights, stay where they are.
    """
    for name in ("weight", "bias"):
        given = [getattr(layer, name) for layer in layers]
        if any(x is None or x.untyped_storage().nbytes() != x.nbytes for x in given):
            continue
        whole = torch.cat([x.detach() for x in given])
        for parameter, part in zip(given, whole.split([len(x) for x in given]), strict=True):
            parameter.data = part


def linear(x_TD: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """[T, D] → [T, N], the outputs side by side; gradients of trained weights go to `.grad` in the backward pass."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return _Linear.apply(x_TD, len(layers), *weights, *biases)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, number, *parameters):  # type: ignore[no-untyped-def]
        weights, biases = parameters[:number], parameters[number:]
        ctx.save_for_backward(x)
        ctx.layers = weights, biases
        whole = joined(weights)
        bias = None if biases[0] is None else whole_of(biases)
        return F.linear(x, whole if whole is not None else torch.cat(weights), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,), (weights, biases) = ctx.saved_tensors, ctx.layers
        dx = dy @ whole_of(weights) if ctx.needs_input_grad[0] else None
        add_products(weights, dy, x)
        add_sums(biases, dy)
        return dx, None, *(None for _ in (*weights, *biases))


def whole_of(tensors: Sequence[Tensor]) -> Tensor:
    """All rows: a view, or a copy where they lie apart."""
    found = joined(tensors)
    return found if found is not None else torch.cat([x.detach() for x in tensors])


def add_products(weights: Sequence[Any], dy_TN: Tensor, x_TD: Tensor) -> None:
    """Adds dyᵀ x to the `.grad` of weights whose rows are the columns of dy."""
    if not any(w.requires_grad for w in weights):
        return
    if all(w.grad is None for w in weights):
        whole = dy_TN.t() @ x_TD
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.grad = part
        return
    gradients = [w.grad for w in weights]
    whole_grad = None if any(g is None for g in gradients) else joined(gradients)
    if whole_grad is not None:
        whole_grad.addmm_(dy_TN.t(), x_TD)
        return
    # Made apart: by autograd itself, in a micro-batch that went through the layers module by module.
    for weight, dy in zip(weights, dy_TN.split([len(w) for w in weights], dim=1), strict=True):
        if weight.grad is None:
            weight.grad = dy.t() @ x_TD
        else:
            weight.grad.addmm_(dy.t(), x_TD)


def add_sums(biases: Sequence[Any], dy_TN: Tensor) -> None:
    """Adds the sums of dy's columns to the `.grad` of biases."""
    if biases[0] is None or not any(b.requires_grad for b in biases):
        return
    sums = dy_TN.sum(0)
    whole = None if biases[0].grad is None else joined([b.grad for b in biases])
    if whole is not None:
        whole.add_(sums)
        return
    for bias, part in zip(biases, sums.split([len(b) for b in biases]), strict=True):
        add_gradient(bias, part)


def add_gradient(parameter: Any, gradient: Tensor) -> None:
    """Adds to `.grad`, or makes it."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
