"""Bytes that a forward and backward pass over T packed tokens holds beside weights and gradients.

    saved       what every layer keeps for its backward pass, all layers together; with recomputation a layer keeps its
                input alone, and one layer at a time has all of its own
    passing     what one layer's backward pass makes while it runs
    stream      the residual stream, its gradient and the final hidden states

By token and layer, in numbers of the weights' precision s, as transformers' decoder layers keep them (h hidden, q and k
widths of the query and key heads, i intermediate; norms compute in float32 and keep 4 bytes a number):

    two norms    2 · (4 + s) h          attention   s (2q + 2k)          output projection   s q
    residuals and projections' inputs   2 s h         SwiGLU and its products   4 s i
    and 4 bytes a head for the log-sum-exp of attention
"""

from __future__ import annotations

from dataclasses import dataclass

from ilr_fast.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes; `peak` is what all of them take together at the worst moment."""

    saved: int
    passing: int
    stream: int

    @property
    def peak(self) -> int:
        return self.saved + self.passing + self.stream


def layer_bytes(shape: ModelShape, size: int) -> int:
    """What one layer keeps for its backward pass, by token; `size` bytes a number."""
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.intermediate
    norms = 2 * (4 + size) * h
    return norms + size * (2 * h + 3 * q + 2 * k + 4 * i) + 4 * shape.heads


def passing_bytes(shape: ModelShape, size: int) -> int:
    """What one layer's backward pass makes while it runs, by token: gradients of the widest products."""
    return size * (3 * shape.intermediate + 2 * shape.hidden) + 4 * shape.hidden


def activations(shape: ModelShape, tokens: int, *, size: int, recompute: bool) -> Activations:
    """Of a micro-batch of `tokens` packed tokens whose numbers take `size` bytes."""
    layer, passing = layer_bytes(shape, size), passing_bytes(shape, size)
    saved = size * shape.hidden * shape.layers if recompute else layer * shape.layers
    stream = size * 3 * shape.hidden
    return Activations(tokens * saved, tokens * (passing + (layer if recompute else 0)), tokens * stream)


def forward_bytes(shape: ModelShape, tokens: int, *, size: int) -> int:
    """A forward pass over `tokens` tokens without gradients: the widest moment of a layer, and the stream."""
    return tokens * size * (3 * shape.intermediate + 6 * shape.hidden + 2 * shape.query)
