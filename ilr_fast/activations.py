"""Bytes that a forward and backward pass over T packed tokens holds beside weights and gradients.

    saved       what every layer keeps for its backward pass, all layers together, and the final hidden states; with
                recomputation a layer keeps its input alone
    passing     what one layer's backward pass makes while it runs: with recomputation all that the layer keeps first;
                `mlp` recomputes gate and up

The LM head's logits are there when all is saved and nothing passes yet, so the worst moment has the larger of the two.

By token and layer, in numbers of the weights' precision s (h hidden, q and k widths of the query and key heads,
i intermediate), and 4 bytes a head for the log-sum-exp of attention:

    plain     transformers' layers: norms compute in float32 and keep 4 bytes a number beside their output
              2 (4/s + 1) h  +  2h residuals  +  3q + 2k  +  4i
    modules   fused one by one, with adapters: norms' inputs and outputs, q, k, v, the output, gate, up, their product
              4h  +  2q + 2k  +  3i
    block     a layer as one step (fused_block.py): x, q, k, v, the output, r, gate and up
              2h  +  2q + 2k  +  2i

tests/test_fused_layers.py holds the last two against what autograd keeps of a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ilr_fast.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes."""

    saved: int
    passing: int


How = Literal["plain", "modules", "block"]
Recompute = bool | Literal["mlp"]


def layer_bytes(shape: ModelShape, size: int, how: How = "plain", recompute: Recompute = False) -> int:
    """What one layer keeps for its backward pass, by token; `size` bytes a number. With `mlp`, gate and up are not."""
    h, q, k = shape.hidden, shape.query, shape.key
    inner = 0 if recompute == "mlp" else shape.intermediate
    kept = {"plain": 4 * h + 3 * q + 2 * k + 4 * inner, "modules": 4 * h + 2 * q + 2 * k + 3 * inner,
            "block": 2 * h + 2 * q + 2 * k + 2 * inner}[how]  # fmt: skip
    return size * kept + (8 * h if how == "plain" else 0) + 4 * shape.heads


def passing_bytes(shape: ModelShape, size: int, how: How = "plain", recompute: Recompute = False) -> int:
    """What one layer's backward pass makes while it runs, by token: gradients of the widest products."""
    if how == "plain":
        return size * (3 * shape.intermediate + 2 * shape.hidden) + 4 * shape.hidden
    made = {"modules": 2, "block": 1}[how] + (2 if recompute == "mlp" else 0)  # gate and up are overwritten
    return size * (made * shape.intermediate + shape.hidden)


def activations(
    shape: ModelShape, tokens: int, *, size: int, recompute: Recompute, how: How = "plain"
) -> Activations:
    """Of a micro-batch of `tokens` packed tokens whose numbers take `size` bytes."""
    layer, passing = layer_bytes(shape, size, how, recompute), passing_bytes(shape, size, how, recompute)
    saved = size * shape.hidden * shape.layers if recompute is True else layer * shape.layers
    stream = size * 3 * shape.hidden
    return Activations(tokens * (saved + stream), tokens * (passing + (layer if recompute is True else 0)))


def forward_bytes(shape: ModelShape, tokens: int, *, size: int, adapters: bool = False) -> int:
    """A forward pass over `tokens` tokens without gradients: the widest moment of a layer, and the stream.

    Of the MLP gate, up and their product are there; with `adapters` gate, and up with two of its adapter's outputs.
    """
    return tokens * size * ((4 if adapters else 3) * shape.intermediate + 6 * shape.hidden + 2 * shape.query)
