"""Norms, attention and MLPs of transformers' models with few passes over memory, in place of the modules' own code.

    norms        one kernel forward, one backward; only the input is kept
    attention    q, k, v as one product, rotated in one kernel, in the layout that flash attention reads
    MLPs         gate and up as one product; the gated output is formed again in the backward pass, in place

The modules stay: names, parameters and checkpoints are the same, adapters (peft) and shared weights keep working. A
module is changed only where its own code is known or, for norms and activations, where a probe shows that it computes
what the kernel does. What is not known runs as it is.

    fuse(model)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ilr_kernels.gated import gated, gated_backward_
from ilr_kernels.norm import rms_norm
from ilr_kernels.rotary import rotary
from torch import Tensor, nn

from ilr_fast.flash_attention import flash_attention, usable
from ilr_fast.products import add_products, is_plain, linear, move_together, whole_of
from ilr_fast.tree_plan import TreePlan

# Attention modules of transformers whose forward is q, k, v → (norms) → rotation → attention → o.
ATTENTION = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "SmolLM3")
PROBE_ERROR = 1e-2


def fuse(model: nn.Module, *, recompute_mlp: bool = False) -> None:
    """Changes the forward of every module that is known, in place.

    Weights with the same input are given one place in memory, unless an engine holds them. `recompute_mlp`: gate and up
    are computed again in the backward pass instead of kept.
    """
    norms: dict[tuple, tuple[bool, bool] | None] = {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
            found = norms.setdefault((type(module), _eps(module)), _norm_kind(module))
            if found is not None:
                _replace(module, partial(_norm, eps=_eps(module), one_plus=found[0], rounds_first=found[1]))
        elif kind.removesuffix("Attention") in ATTENTION and kind.endswith("Attention"):
            if is_plain(module.q_proj, module.k_proj, module.v_proj):
                move_together([module.q_proj, module.k_proj, module.v_proj])
            _replace(module, partial(_attention, own=module.forward))
        elif kind.endswith("MLP") and (activation := _activation_of(module)) is not None:
            if is_plain(module.gate_proj, module.up_proj):
                move_together([module.gate_proj, module.up_proj])
            _replace(module, partial(_mlp, activation=activation, recompute=recompute_mlp))


def _replace(module: Any, forward: Callable) -> None:
    """`forward(module, …)` becomes the module's; a copy of the module gets one of its own."""
    module.forward = _Bound(forward, module)


class _Bound:
    """A forward bound to its module, which copies of the model copy along."""

    def __init__(self, forward: Callable, module: nn.Module):
        self.forward, self.module = forward, module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.forward(self.module, *arguments, **named)


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0)


@torch.no_grad()
def _norm_kind(module: Any) -> tuple[bool, bool] | None:
    """(one_plus, rounds_first) of a norm, by what it computes in bfloat16; None for another formula."""
    probe = copy.deepcopy(module).to("cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator))
    x = torch.randn(64, len(probe.weight), generator=generator).bfloat16()
    wanted = probe(x).double()
    found = {}
    for kind in ((False, True), (False, False), (True, False), (True, True)):
        y = rms_norm(x, probe.weight, _eps(module), one_plus=kind[0], rounds_first=kind[1]).double()
        found[kind] = float((y - wanted).norm() / wanted.norm())
    best = min(found, key=found.__getitem__)
    return best if found[best] < PROBE_ERROR else None


def _norm(module: Any, x: Tensor, *, eps: float, one_plus: bool, rounds_first: bool) -> Tensor:
    rows = x if x.dim() == 3 and x.shape[0] != 1 else x.reshape(-1, x.shape[-1])
    return rms_norm(rows, module.weight, eps, one_plus=one_plus, rounds_first=rounds_first).view(x.shape)


@torch.no_grad()
def _activation_of(module: Any) -> str | None:
    """The activation of a gated MLP without biases; None for anything else."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
    if not is_plain(*bases) or any(base.bias is not None for base in bases) or not hasattr(module, "act_fn"):
        return None
    x = torch.linspace(-4, 4, 101)
    y = module.act_fn(x)
    known = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    return next((name for name, wanted in known.items() if torch.allclose(y, wanted, atol=1e-6)), None)


def _mlp(module: Any, x: Tensor, *, activation: str, recompute: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if is_plain(module.gate_proj, module.up_proj, module.down_proj):
        weights = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        return _MLP.apply(rows, activation, recompute, *weights).view(x.shape)
    out = _Gated.apply(module.gate_proj(rows), module.up_proj(rows), activation)
    return module.down_proj(out).view(x.shape)


class _MLP(torch.autograd.Function):
    """down(act(gate x) · up x); the product of gate and up is kept, or formed again, and then overwritten."""

    @staticmethod
    def forward(ctx, x, activation, recompute, gate, up, down):  # type: ignore[no-untyped-def]
        both = F.linear(x, whole_of((gate, up)))
        ctx.save_for_backward(x)
        ctx.both = None if recompute else both
        ctx.rest = activation, gate, up, down
        return F.linear(gated(*both.chunk(2, -1), activation), down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,), (activation, gate, up, down) = ctx.saved_tensors, ctx.rest
        whole = whole_of((gate, up))
        both = F.linear(x, whole) if ctx.both is None else ctx.both
        ctx.both = None
        out = dy @ down
        gated_backward_(*both.chunk(2, -1), out, activation)
        add_products((down,), dy, out)
        del out
        add_products((gate, up), both, x)
        return both @ whole if ctx.needs_input_grad[0] else None, None, None, None, None, None


class _Gated(torch.autograd.Function):
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


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    *rest: Any,
    own: Callable,
    **named: Any,
) -> tuple[Tensor, None]:
    """The packed path for a TreePlan that the flash kernel fits; else what the module does itself."""
    plan, softcap = named.get("ilr_plan"), getattr(module, "attn_logit_softcapping", None)
    x_TD, size = hidden_states[0], module.head_dim
    if not isinstance(plan, TreePlan) or not usable(plan, x_TD, size, softcap, module.attention_dropout):
        return own(hidden_states, position_embeddings, attention_mask, *rest, **named)
    q_THD, k_TKD, v_TKD = _query_key_value(module, x_TD, size)
    if getattr(module, "q_norm", None) is not None:
        q_THD, k_TKD = module.q_norm(q_THD), module.k_norm(k_TKD)
    if getattr(module, "use_rope", True):
        cos, sin = position_embeddings
        q_THD, k_TKD = rotary(q_THD, k_TKD, cos[0], sin[0])
    window = plan.window(_window_of(module))
    out_THD = flash_attention(q_THD, k_TKD, v_TKD, plan.segments(x_TD.device), module.scaling, window)
    out_TD = out_THD.flatten(1)
    return (linear(out_TD, [module.o_proj]) if is_plain(module.o_proj) else module.o_proj(out_TD))[None], None


def _query_key_value(module: Any, x_TD: Tensor, size: int) -> tuple[Tensor, ...]:
    layers = [module.q_proj, module.k_proj, module.v_proj]
    if not is_plain(*layers):
        return tuple(layer(x_TD).unflatten(-1, (-1, size)) for layer in layers)
    widths = [layer.out_features for layer in layers]
    return tuple(part.unflatten(-1, (-1, size)) for part in _Split.apply(linear(x_TD, layers), widths))


class _Split(torch.autograd.Function):
    """Columns; the gradient is put together in one copy."""

    @staticmethod
    def forward(ctx, x, widths):  # type: ignore[no-untyped-def]
        return tuple(x.split(widths, dim=-1))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        return torch.cat(gradients, dim=-1), None


def _window_of(module: Any) -> int | None:
    """Mistral's modules read their window from the config."""
    if hasattr(module, "sliding_window") or type(module).__name__ != "MistralAttention":
        return getattr(module, "sliding_window", None)
    return getattr(module.config, "sliding_window", None)
