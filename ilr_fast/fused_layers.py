"""Norms, attention, MLPs and layers of transformers' models with few passes over memory, in place of their own code.

    norms        one kernel forward, one backward; only the input is kept
    attention    q, k, v as one product, rotated in one kernel, in the layout that flash attention reads
    MLPs         gate and up as one product; the gated output is formed again in the backward pass, in place
    layers       all of these as one step of autograd, where every weight is trained itself (fused_block.py)

The modules stay: names, parameters and checkpoints are the same, adapters (peft) and shared weights keep working.
Attention and layers are known by the name of their class; a norm's formula and an MLP's activation by what they
compute for a probe. What is not known runs as it is.

    fuse(model)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from ilr_kernels.norm import rms_norm
from ilr_kernels.rotary import rotary, rotated_split
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilr_fast.config import AgentConfig
from ilr_fast.flash_attention import RaggedKernel, flash_attention, torch_kernel, usable
from ilr_fast.fused_block import Block, Norm, Surroundings, block_forward
from ilr_fast.fused_mlp import Gated, GatedMLP
from ilr_fast.model_shape import BLOCKS
from ilr_fast.products import is_plain, linear, move_together
from ilr_fast.tree_plan import TreePlan

# Attention modules of transformers whose forward is q, k, v → (norms) → rotation → attention → o.
ATTENTION = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "SmolLM3")
PROBE_ERROR = 1e-4


def fused(config: AgentConfig, device: str) -> bool:
    """Whether an agent's layers are fused on a device (its type)."""
    return config.fused_layers == "on" or (config.fused_layers == "auto" and device == "cuda")


def fuse_layers(model: Any, config: AgentConfig, kernel: RaggedKernel | None = None) -> None:
    """What the config says of an agent's layers: fused or not, MLPs kept or computed again.

    `kernel`: the engine's attention, where it has one for the trainer too.
    """
    again = config.gradient_checkpointing == "mlp" and config.train != "none"
    if fused(config, model.device.type):
        fuse(model, recompute_mlp=again, kernel=kernel)
    if again:
        for module in list(model.modules()):
            if type(module).__name__.endswith("MLP") and not isinstance(module.forward, _Bound):
                _replace(module, partial(_again, own=module.forward))


def _again(module: nn.Module, x: Tensor, *, own: Callable) -> Any:
    return checkpoint(own, x, use_reentrant=False) if torch.is_grad_enabled() else own(x)


def fuse(model: nn.Module, *, recompute_mlp: bool = False, kernel: RaggedKernel | None = None) -> None:
    """Changes the forward of every module that is known, in place.

    Weights with the same input are given one place in memory, unless an engine holds them. `recompute_mlp`: gate and up
    are computed again in the backward pass instead of kept. `kernel`: attention in place of torch's own.
    """
    norms: dict[type, bool | None] = {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
            if type(module) not in norms:
                norms[type(module)] = _one_plus(module)
            one_plus = norms[type(module)]
            if one_plus is not None:  # rounded once, as vLLM does it, where transformers may round twice
                _replace(module, partial(_norm, eps=_eps(module), one_plus=one_plus))
        elif kind.removesuffix("Attention") in ATTENTION and kind.endswith("Attention"):
            if is_plain(module.q_proj, module.k_proj, module.v_proj):
                move_together([module.q_proj, module.k_proj, module.v_proj])
            _replace(module, partial(_attention, own=module.forward, kernel=kernel))
        elif kind.endswith("MLP") and (activation := _activation_of(module)) is not None:
            if is_plain(module.gate_proj, module.up_proj):
                move_together([module.gate_proj, module.up_proj])
            _replace(module, partial(_mlp, activation=activation, recompute=recompute_mlp))
    for module in modules:
        kind = type(module).__name__
        if kind.removesuffix("DecoderLayer") in BLOCKS and kind.endswith("DecoderLayer"):
            _replace(module, partial(_layer, own=module.forward, kernel=kernel))


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
def _one_plus(module: Any) -> bool | None:
    """Whether a norm multiplies by 1 + its weight, by what it computes; None for another formula."""
    probe = copy.deepcopy(module).to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator))
    x = torch.randn(64, len(probe.weight), generator=generator)
    wanted = probe(x)
    for one_plus in (False, True):
        y = rms_norm(x, probe.weight, _eps(module), one_plus=one_plus)
        if float((y - wanted).norm() / wanted.norm()) < PROBE_ERROR:
            return one_plus
    return None


def _norm(module: Any, x: Tensor, *, eps: float, one_plus: bool) -> Tensor:
    rows = x if x.dim() == 3 and x.shape[0] != 1 else x.reshape(-1, x.shape[-1])
    return rms_norm(rows, module.weight, eps, one_plus=one_plus).view(x.shape)


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
        return GatedMLP.apply(rows, activation, recompute, *weights).view(x.shape)
    if recompute and torch.is_grad_enabled():
        return checkpoint(_adapted_mlp, module, rows, activation, use_reentrant=False).view(x.shape)
    return _adapted_mlp(module, rows, activation).view(x.shape)


def _adapted_mlp(module: Any, x_TD: Tensor, activation: str) -> Tensor:
    return module.down_proj(Gated.apply(module.gate_proj(x_TD), module.up_proj(x_TD), activation))


def _layer(
    module: Any,
    hidden_states: Tensor,
    *arguments: Any,
    own: Callable,
    kernel: RaggedKernel | None,
    position_embeddings: Any = None,
    **named: Any,
) -> Tensor:
    """A layer as one step where it can be; else module by module."""
    plan, attention = named.get("ilr_plan"), module.self_attn
    checkpointed = getattr(module, "gradient_checkpointing", False) and module.training
    x_TD = hidden_states[0]
    if checkpointed or not _packed(plan, x_TD, attention.head_dim, None, 0.0, kernel):
        return own(hidden_states, *arguments, position_embeddings=position_embeddings, **named)
    block = block_of(module)
    if block is None:
        return own(hidden_states, *arguments, position_embeddings=position_embeddings, **named)
    cos, sin = position_embeddings
    segments = plan.segments(x_TD.device)
    around = Surroundings(cos[0], sin[0], segments, kernel or torch_kernel(), plan.longest())
    return block_forward(x_TD, block, around)[None]


def block_of(module: Any) -> Block | None:
    """The layer's parameters as they are now; None where an adapter, a bias or an unknown part is among them."""
    attention, mlp = module.self_attn, module.mlp
    layers = [getattr(attention, f"{n}_proj") for n in "qkvo"] + [
        getattr(mlp, f"{n}_proj", None) for n in ("gate", "up", "down")
    ]
    first, second = _norm_of(module.input_layernorm), _norm_of(module.post_attention_layernorm)
    query_norm, key_norm = (_norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
    activation = _bound(mlp, _mlp)
    if not is_plain(*layers) or attention.o_proj.bias is not None or first is None or second is None:
        return None
    if activation is None or (query_norm is None) != (getattr(attention, "q_norm", None) is None):
        return None
    q, k, v, output, gate, up, down = layers
    return Block(
        first, second, (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias), output.weight,
        (gate.weight, up.weight), down.weight, query_norm, key_norm, getattr(attention, "use_rope", True),
        activation["activation"], attention.head_dim, attention.scaling, _window_of(attention),
        activation["recompute"],
    )  # fmt: skip


def _norm_of(module: Any) -> Norm | None:
    options = _bound(module, _norm)
    return None if options is None else Norm(module.weight, **options)


def _bound(module: Any, forward: Callable) -> dict[str, Any] | None:
    """The options that a module was given for one of the forwards here."""
    found = None if module is None else vars(module).get("forward")
    if not isinstance(found, _Bound) or not isinstance(found.forward, partial) or found.forward.func is not forward:
        return None
    return found.forward.keywords


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    *rest: Any,
    own: Callable,
    kernel: RaggedKernel | None,
    **named: Any,
) -> tuple[Tensor, None]:
    """The packed path for a TreePlan that the flash kernel fits; else what the module does itself."""
    plan, softcap = named.get("ilr_plan"), getattr(module, "attn_logit_softcapping", None)
    x_TD, size = hidden_states[0], module.head_dim
    if not _packed(plan, x_TD, size, softcap, module.attention_dropout, kernel):
        return own(hidden_states, position_embeddings, attention_mask, *rest, **named)
    q_THD, k_TKD, v_TKD = _query_key_value(module, x_TD, position_embeddings)
    window = plan.window(_window_of(module))
    out_THD = flash_attention(q_THD, k_TKD, v_TKD, plan.segments(x_TD.device), module.scaling, window, kernel)
    out_TD = out_THD.flatten(1)
    return (linear(out_TD, [module.o_proj]) if is_plain(module.o_proj) else module.o_proj(out_TD))[None], None


def _packed(
    plan: Any, x: Tensor, size: int, softcap: float | None, dropout: float, kernel: RaggedKernel | None
) -> TypeGuard[TreePlan]:
    """Whether this is a packed row that a flash kernel fits."""
    return isinstance(plan, TreePlan) and usable(plan, x, size, softcap, dropout, kernel)


def _query_key_value(module: Any, x_TD: Tensor, rotation: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, D] each, normed and rotated as the module does it."""
    layers, size = [module.q_proj, module.k_proj, module.v_proj], module.head_dim
    cos_TD, sin_TD = (x[0] for x in rotation)
    normed, rotated = getattr(module, "q_norm", None) is not None, getattr(module, "use_rope", True)
    if is_plain(*layers):
        heads, key_heads, _ = (layer.out_features // size for layer in layers)
        both = linear(x_TD, layers)
        if rotated and not normed:
            return rotated_split(both, cos_TD, sin_TD, heads=heads, key_heads=key_heads)
        q, k, v = _Split.apply(both.unflatten(1, (-1, size)), [heads, key_heads, key_heads])
    else:
        q, k, v = (layer(x_TD).unflatten(-1, (-1, size)) for layer in layers)
    if normed:
        q, k = module.q_norm(q), module.k_norm(k)
    return (*(rotary(q, k, cos_TD, sin_TD) if rotated else (q, k)), v)


class _Split(torch.autograd.Function):
    """Parts of dimension 1; the gradient is put together in one copy."""

    @staticmethod
    def forward(ctx, x, sizes):  # type: ignore[no-untyped-def]
        return tuple(x.split(sizes, dim=1))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        return torch.cat(gradients, dim=1), None


def _window_of(module: Any) -> int | None:
    """Mistral's modules read their window from the config."""
    if hasattr(module, "sliding_window") or type(module).__name__ != "MistralAttention":
        return getattr(module, "sliding_window", None)
    return getattr(module.config, "sliding_window", None)
