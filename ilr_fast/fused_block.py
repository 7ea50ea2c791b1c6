"""A whole decoder layer as one step of autograd: norm → attention → norm → MLP, with as few launches as it takes.

    n = norm(x)   q, k, v = rotate(n Wqkvᵀ + b)   r = x + attention(q, k, v) Woᵀ
    m = norm(r)   g, u = m Wguᵀ                   y = r + (act(g) · u) Wdᵀ

Products are rounded before the residual is added, as in transformers' modules and in vLLM; the norm in the middle adds
it in the same pass. In the backward pass norms add gradients, and form their own output again for the weight's. Kept
for a token are x, q, k, v, the attention's output, r, g and u (with `recompute` not g and u). It is for layers of this
shape whose weights are all trained or all frozen; others run module by module (fused_layers.py). Python's own time a
layer falls from the sum of some thirty autograd steps to two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ilr_kernels.gated import gated, gated_backward_
from ilr_kernels.norm import add_norm_forward, norm_backward, norm_forward
from ilr_kernels.rotary import rotate
from torch import Tensor

from ilr_fast.flash_attention import RaggedKernel
from ilr_fast.products import add_gradient, add_products, add_sums, whole_of
from ilr_fast.segments import Segments


class Norm(NamedTuple):
    """A norm's weight [D] and what it computes: see ilr_kernels.norm."""

    weight: Any
    eps: float
    one_plus: bool

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → the same."""
        return norm_forward(x, *self)

    def forward_of_sum(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(the norm of the sum, the sum)."""
        return add_norm_forward(x_TD, residual_TD, *self)

    def backward(self, x: Tensor, dy: Tensor, add: Tensor | None = None, output: bool = False) -> tuple[Tensor, Any]:
        """dx (with `add` added) and, if asked for, the output again; dweight goes to `.grad`."""
        trained = self.weight.requires_grad
        weight, *kind = self
        found = norm_backward(x, weight, dy, *kind, weight_gradient=trained, add=add, output=output)
        if trained:
            add_gradient(weight, found.dw)
        return found.dx, found.y


class Block(NamedTuple):
    """The parameters of one layer: q, k, v (with biases or None) and gate, up as groups, and how it computes."""

    first: Norm
    second: Norm
    qkv: tuple[Any, ...]
    biases: tuple[Any, ...]
    output: Any
    gate_up: tuple[Any, ...]
    down: Any
    query_norm: Norm | None
    key_norm: Norm | None
    rotated: bool
    activation: str
    size: int  # of a head
    scale: float
    window: int | None
    recompute: bool

    def parameters(self) -> list[Any]:
        """All of them, so that autograd knows that the output depends on them."""
        norms = [n.weight for n in (self.first, self.second, self.query_norm, self.key_norm) if n is not None]
        biases = [b for b in self.biases if b is not None]
        return [*norms, *self.qkv, *biases, self.output, *self.gate_up, self.down]

    def heads(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        queries, keys, values = (len(w) // self.size for w in self.qkv)
        return queries, keys, values


class Surroundings(NamedTuple):
    """What a micro-batch gives to every layer."""

    cos_TD: Tensor
    sin_TD: Tensor
    segments: Segments
    kernel: RaggedKernel
    longest: int


def block_forward(x_TD: Tensor, block: Block, around: Surroundings) -> Tensor:
    """One layer on T packed tokens [T, D] → the same; gradients of its weights go to their `.grad`."""
    return _Block.apply(x_TD, block, around, *block.parameters())


class Kept(NamedTuple):
    """What a layer's backward pass reads: tensors, of which `both` is overwritten, and the attention kernel's state."""

    x: Tensor
    qkv: Tensor
    q_normed: Tensor | None
    k_normed: Tensor | None
    out: Tensor
    lse: Tensor
    r: Tensor
    both: Tensor | None
    state: Any


def layer_forward(x: Tensor, block: Block, around: Surroundings) -> tuple[Tensor, Kept]:
    """[T, D] → the same, without autograd, and what `layer_backward` takes."""
    qkv = F.linear(block.first.forward(x), whole_of(block.qkv), _bias(block))
    q, k, v = _rotated(qkv, block, around)
    out, lse, state = _attend(q, k, v, block, around)
    m, r = block.second.forward_of_sum(F.linear(out.flatten(1), block.output), x)
    both = F.linear(m, whole_of(block.gate_up))
    y = F.linear(gated(*both.chunk(2, -1), block.activation), block.down).add_(r)
    q_normed, k_normed = (q, k) if block.query_norm is not None else (None, None)
    return y, Kept(x, qkv, q_normed, k_normed, out, lse, r, None if block.recompute else both, state)


def layer_backward(dy: Tensor, kept: Kept, block: Block, around: Surroundings) -> Tensor:
    """dx [T, D]; gradients of the layer's weights are added to their `.grad`."""
    dy = dy.contiguous()
    dr = _mlp_backward(dy, kept.r, kept.both, block)
    dout = (dr @ block.output).view(kept.out.shape)
    add_products((block.output,), dr, kept.out.flatten(1))
    q, k, v = _parts(kept.qkv, block)
    if kept.q_normed is not None and kept.k_normed is not None:
        q, k = kept.q_normed, kept.k_normed
    keys, values = around.segments.gather(k), around.segments.gather(v)
    found = around.kernel.backward(
        dout, q, keys, values, kept.out, kept.lse, kept.state, around.segments, block.scale, _window(block, around)
    )
    dqkv = _rotated_backward(found[0], *around.segments.add_up(*found[1:]), kept.qkv, block, around)
    dx, n = block.first.backward(kept.x, dqkv @ whole_of(block.qkv), add=dr, output=True)
    add_products(block.qkv, dqkv, n)
    add_sums(block.biases, dqkv)
    return dx


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, around, *parameters):  # type: ignore[no-untyped-def]
        y, kept = layer_forward(x, block, around)
        ctx.save_for_backward(*kept[:-1])
        ctx.rest = block, around, kept.state
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        block, around, state = ctx.rest
        dx = layer_backward(dy, Kept._make([*ctx.saved_tensors, state]), block, around)
        return dx, None, None, *(None for _ in block.parameters())


def _mlp_backward(dy: Tensor, r: Tensor, both: Tensor | None, block: Block) -> Tensor:
    """The gradient of r, that of the residual included."""
    weights = whole_of(block.gate_up)
    both = F.linear(block.second.forward(r), weights) if both is None else both
    inner = dy @ block.down
    gated_backward_(*both.chunk(2, -1), inner, block.activation)
    add_products((block.down,), dy, inner)
    del inner
    dr, m = block.second.backward(r, both @ weights, add=dy, output=True)
    add_products(block.gate_up, both, m)
    return dr


def _bias(block: Block) -> Tensor | None:
    return None if block.biases[0] is None else whole_of(block.biases)


def _parts(qkv_TN: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_TN.view(len(qkv_TN), -1, block.size).split(block.heads(), dim=1)
    return q, k, v


def _rotated(qkv: Tensor, block: Block, around: Surroundings) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as they meet: rotated in place, in copies where norms keep what they read."""
    q, k, v = _parts(qkv, block)
    if block.query_norm is not None and block.key_norm is not None:
        q, k = block.query_norm.forward(q), block.key_norm.forward(k)
    if block.rotated:
        rotate(q, k, around.cos_TD, around.sin_TD, q, k, backward=False)
    return q, k, v


def _rotated_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, block: Block, around: Surroundings) -> Tensor:
    """The gradient of the product of q, k and v [T, N]."""
    whole = torch.empty_like(qkv)
    into_q, into_k, into_v = _parts(whole, block)
    into_v.copy_(dv)
    if block.query_norm is not None and block.key_norm is not None:
        q, k, _ = _parts(qkv, block)
        if block.rotated:
            rotate(dq, dk, around.cos_TD, around.sin_TD, dq, dk, backward=True)
        into_q.copy_(block.query_norm.backward(q, dq)[0])
        into_k.copy_(block.key_norm.backward(k, dk)[0])
    elif block.rotated:
        rotate(dq, dk, around.cos_TD, around.sin_TD, into_q, into_k, backward=True)
    else:
        into_q.copy_(dq)
        into_k.copy_(dk)
    return whole


def _window(block: Block, around: Surroundings) -> int | None:
    return None if block.window is None or block.window >= around.longest else block.window


def _attend(q: Tensor, k: Tensor, v: Tensor, block: Block, around: Surroundings) -> tuple[Tensor, Tensor, Any]:
    keys, values = around.segments.gather(k), around.segments.gather(v)
    return around.kernel.forward(q, keys, values, around.segments, block.scale, _window(block, around))
