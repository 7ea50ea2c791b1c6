"""Where the gradients of the two largest matrices go: buffers that live as long as an update.

The LM head's gradient is added straight into its buffer by `linear_policy_loss`. The embedding's is added row by row,
for the tokens that were read: autograd would make a new [V, D] of zeros for a few hundred rows and then add all of it.
Where both are one tensor (tied embeddings) they share one buffer. Buffers are float32 for 16-bit weights too.

    sinks.clear()
    with sinks.open():
        hidden_TD = packed_forward(...)      # the embedding's backward adds to the buffer
        loss, _ = linear_policy_loss(..., weight_grad_VD=sinks.head)
        loss.backward()
    optimizer.step(step, sinks=sinks.buffers)
    sinks.release()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class GradientSinks:
    """The buffers of one model: of its LM head where that is trained, of its embedding where rows can be told apart."""

    def __init__(self, embedding: nn.Module, head_weight: Tensor):
        self.embedding = embedding
        self.buffers: dict[Any, Tensor] = {}
        self._head = head_weight if head_weight.requires_grad else None
        self._scale = _row_scale(embedding)

    @property
    def head(self) -> Tensor | None:
        """The LM head's buffer [V, D], None where the head is frozen."""
        return None if self._head is None else self.buffers[self._head]

    def clear(self) -> None:
        """Sets every buffer to 0; makes those that are not there."""
        for buffer in self.buffers.values():
            buffer.zero_()
        for weight in self._wanted():
            if weight not in self.buffers:
                self.buffers[weight] = torch.zeros_like(weight, dtype=torch.float32)

    def release(self) -> None:
        """Gives the buffers' memory back, until `clear`."""
        self.buffers.clear()

    def _wanted(self) -> Iterator[Any]:
        """The weights that have a buffer; a tied one comes twice."""
        if self._head is not None:
            yield self._head
        if self._scale is not None:
            yield self.embedding.weight

    @contextmanager
    def open(self) -> Iterator[None]:
        """Redirects the embedding's gradient while open."""
        if self._scale is None:
            yield
            return
        handle = self.embedding.register_forward_hook(self._redirect)
        try:
            yield
        finally:
            handle.remove()

    def _redirect(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        weight = module.weight
        return _Rows.apply(weight, output.detach(), inputs[0], self.buffers[weight], self._scale, module.padding_idx)


class _Rows(torch.autograd.Function):
    """Passes `output` on; its gradient is added to the rows `ids` of `buffer` instead of becoming weight's gradient."""

    @staticmethod
    def forward(ctx, weight, output, ids, buffer, scale, padding_idx):  # type: ignore[no-untyped-def]
        ctx.where = ids, buffer, scale, padding_idx
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        ids, buffer, scale, padding_idx = ctx.where
        rows = gradient.flatten(0, -2).float() * scale
        if padding_idx is not None:  # as nn.Embedding does it: the padding row is not trained
            rows = rows.masked_fill(ids.flatten()[:, None] == padding_idx, 0)
        buffer.index_add_(0, ids.flatten(), rows)
        return None, None, None, None, None, None


@torch.no_grad()
def _row_scale(embedding: nn.Module) -> float | None:
    """s where the module computes s · weight[ids] and its weight is trained; None where it is anything else."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or weight is None or not weight.requires_grad or embedding.max_norm:
        return None
    scale = float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))
    scale = float(torch.tensor(scale, dtype=weight.dtype))  # as the forward pass rounds it
    ids = torch.linspace(0, len(weight) - 1, 16, device=weight.device).long()
    return scale if torch.allclose(embedding(ids), weight[ids] * scale, rtol=1e-2, atol=0) else None
