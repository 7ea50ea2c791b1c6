"""The trainer's forward pass by the engine's own kernels: hidden states are equal to vLLM's, bit for bit.

vLLM in its batch-invariant mode gives a token the same hidden state whatever shares its batch, decoded or in a prompt.
Here the layers of vLLM's model are run as they are on the trainer's packed tokens: its products (over fused matrices),
norms with the residual added, RoPE, SwiGLU, and attention over keys and values in pages as in its cache. Weights are
shared, so there is one copy of them. Gradients are those of the ordinary formulas of the same functions.

    forward = ExactForward(model, engine_model, "agents.ada")
    hidden_TD = forward(model, packed.tokens_T, packed.positions_T, packed.plan)

With the same log-prob of the same hidden states on both sides (`linear_logprob`, whose sums do not depend on the batch
either) the trainer's log-probs of sampled tokens are the engine's. Prefixes are not shared between sequences here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from ilr_kernels.gated import gated_backward_
from ilr_kernels.norm import rms_norm
from ilr_kernels.rotary import rotary
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilr_fast.attention import AttentionSettings, TreePlan, base_model_of, tree_attention
from ilr_fast.errors import UserError

CHECKED_ROWS = (1, 7, 16, 48, 64, 100, 200, 400, 800, 1600, 3200, 6400)
PAGE = 16  # tokens, as in the engine's cache: the kernel's tiles follow from it
FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Pages(NamedTuple):
    """Where the packed tokens' keys and values go: T tokens of S sequences in pages of a cache."""

    slot_T: Tensor  # int64, row of the cache
    table_SP: Tensor  # int32, each sequence's pages
    starts_S1: Tensor  # int32, where each sequence begins in the row, and T
    lengths_S: Tensor  # int32
    longest: int
    rows: int

    @classmethod
    def of(cls, plan: TreePlan, device: torch.device) -> Pages:
        """Sequences one after the other, each from a page of its own on."""
        starts = np.append(np.flatnonzero(plan.positions_T == 0), len(plan.positions_T))
        lengths = np.diff(starts)
        pages = -(-lengths // PAGE)
        first = np.cumsum(pages) - pages
        table = np.minimum(first[:, None] + np.arange(pages.max()), pages.sum() - 1)
        slots = np.repeat(first * PAGE, lengths) + plan.positions_T
        return cls(
            torch.as_tensor(slots, device=device),
            torch.as_tensor(table, dtype=torch.int32, device=device),
            torch.as_tensor(starts, dtype=torch.int32, device=device),
            torch.as_tensor(lengths, dtype=torch.int32, device=device),
            int(lengths.max()),
            int(pages.sum()) * PAGE,
        )

    def laid_out(self, rows_TKD: Tensor) -> Tensor:
        """[T, K, D] → [pages, page, K, D]."""
        cache = rows_TKD.new_zeros(self.rows, *rows_TKD.shape[1:])
        return cache.index_copy_(0, self.slot_T, rows_TKD).unflatten(0, (-1, PAGE))


class ExactForward:
    """`packed_forward` by the layers of `engine_model`; UserError for a family whose layers are not known here.

    `attend` stands for vLLM's flash attention where there is none (tests on the CPU).
    """

    def __init__(self, model: Any, engine_model: Any, where: str, attend: Callable[..., Tensor] | None = None):
        kind = type(engine_model).__name__
        if kind not in FAMILIES:
            known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
            raise UserError(f"no exact forward pass for {kind}", f"{where}.engine.exact", f"it is there for {known}")
        self._decoder, self._engine = base_model_of(model), engine_model.model
        self._product = _product if _products_agree(self._engine.layers[0]) else _own_product
        self._attend = attend or _attention_in_pages

    def __call__(self, model: nn.Module, tokens_T: Tensor, positions_T: Tensor, plan: TreePlan) -> Tensor:
        """Final hidden states [T, D] of one packed row; differentiable in the model's weights."""
        assert not plan.shares_prefixes, "sequences are packed one after the other where the engine is exact"
        decoder: Any = self._decoder
        given = (positions_T, Pages.of(plan, tokens_T.device), plan)
        hidden_TD, residual_TD = decoder.embed_tokens(tokens_T[None])[0], None
        again = decoder.training and getattr(decoder, "gradient_checkpointing", False) and torch.is_grad_enabled()
        for own, layer in zip(decoder.layers, self._engine.layers, strict=True):
            if again:
                state = checkpoint(self._layer, own, layer, hidden_TD, residual_TD, *given, use_reentrant=False)
            else:
                state = self._layer(own, layer, hidden_TD, residual_TD, *given)
            hidden_TD, residual_TD = state
        return _add_norm(self._engine.norm, decoder.norm, hidden_TD, residual_TD)[0]

    def _layer(
        self,
        own: Any,
        layer: Any,
        hidden_TD: Tensor,
        residual_TD: Tensor | None,
        positions_T: Tensor,
        pages: Pages,
        plan: TreePlan,
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer; what is added to the residual comes out beside it, as in vLLM."""
        hidden_TD, residual_TD = _add_norm(layer.input_layernorm, own.input_layernorm, hidden_TD, residual_TD)
        hidden_TD = self._self_attention(own.self_attn, layer.self_attn, hidden_TD, positions_T, pages, plan)
        norms = layer.post_attention_layernorm, own.post_attention_layernorm
        hidden_TD, residual_TD = _add_norm(*norms, hidden_TD, residual_TD)
        gate_up = self._linear(layer.mlp.gate_up_proj, hidden_TD, own.mlp.gate_proj, own.mlp.up_proj)
        gated = _Gated.apply(layer.mlp.act_fn, gate_up)
        return self._linear(layer.mlp.down_proj, gated, own.mlp.down_proj), residual_TD

    def _self_attention(
        self, own: Any, layer: Any, hidden_TD: Tensor, positions_T: Tensor, pages: Pages, plan: TreePlan
    ) -> Tensor:
        qkv = self._linear(layer.qkv_proj, hidden_TD, own.q_proj, own.k_proj, own.v_proj)
        q, k, v = (x.unflatten(1, (-1, layer.head_dim)) for x in qkv.split([layer.q_size, *[layer.kv_size] * 2], 1))
        if hasattr(layer, "q_norm"):
            q, k = _norm(layer.q_norm, own.q_norm, q), _norm(layer.k_norm, own.k_norm, k)
        rope = layer.rotary_emb

        def turn(q_THD: Tensor, k_TKD: Tensor) -> tuple[Tensor, Tensor]:
            turned = rope(positions_T, q_THD.flatten(1).clone(), k_TKD.flatten(1).clone())  # in place
            return turned[0].view_as(q_THD), turned[1].view_as(k_TKD)

        cos_TD, sin_TD = (x.repeat(1, 2) for x in rope.cos_sin_cache[positions_T].to(q.dtype).chunk(2, 1))
        q, k = _as_computed(turn, partial(rotary, cos_TD=cos_TD, sin_TD=sin_TD), q, k)
        settings = AttentionSettings(layer.scaling)

        def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            return self._attend(layer.attn, q_THD, k_TKD, v_TKD, pages)

        def attend_formula(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            query, key, value = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
            return tree_attention(plan, query, key, value, settings)[0]

        attended = _as_computed(attend, attend_formula, q, k, v).flatten(1)
        return self._linear(layer.o_proj, attended, own.o_proj)

    def _linear(self, module: Any, x_TD: Tensor, *parts: nn.Linear) -> Tensor:
        """The product with a fused matrix, whose parts are the trainer's."""
        biases = [part.bias for part in parts if part.bias is not None]
        return _Linear.apply(self._product, module, len(parts), x_TD, *(part.weight for part in parts), *biases)


class _Computed(torch.autograd.Function):
    """kernel(*inputs), with the gradient of `formula`, which is the same function up to its rounding."""

    @staticmethod
    def forward(ctx, kernel, formula, *inputs):  # type: ignore[no-untyped-def]
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    def backward(ctx, *upstream):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[2:]
        inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            outputs = ctx.formula(*inputs)
        found = iter(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream))
        return None, None, *(next(found) if w else None for w in wanted)


class _Gated(torch.autograd.Function):
    """SwiGLU of a product's [T, 2F] by vLLM's module."""

    @staticmethod
    def forward(ctx, module, gate_up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        return module(gate_up)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        gradient = ctx.saved_tensors[0].clone()
        gated_backward_(*gradient.chunk(2, 1), upstream.clone(memory_format=torch.contiguous_format), "silu")
        return None, gradient


class _Linear(torch.autograd.Function):
    """The product with a fused matrix [O, D], whose parts' weights, then biases, are the last arguments."""

    @staticmethod
    def forward(ctx, product, module, parts, x_TD, *parameters):  # type: ignore[no-untyped-def]
        ctx.module, ctx.sizes = module, [len(w) for w in parameters[:parts]]
        ctx.save_for_backward(x_TD)
        return product(module, x_TD)

    @staticmethod
    def backward(ctx, upstream_TO):  # type: ignore[no-untyped-def]
        (x_TD,) = ctx.saved_tensors
        dx_TD = upstream_TO @ ctx.module.weight if ctx.needs_input_grad[3] else None
        found: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
        if any(ctx.needs_input_grad[4:]):
            grads = [(upstream_TO.t() @ x_TD).split(ctx.sizes)]
            if len(found) > len(ctx.sizes):
                grads.append(upstream_TO.sum(0).split(ctx.sizes))
            found = [g for parts in grads for g in parts]
        return None, None, None, dx_TD, *found


def _own_product(module: Any, x_TD: Tensor) -> Tensor:
    return module(x_TD)[0]


def _product(module: Any, x_TD: Tensor) -> Tensor:
    """By cuBLAS, the bias added to what is rounded already, as vLLM's own does it."""
    y_TO = x_TD @ module.weight.t()
    return y_TO if module.bias is None else y_TO + module.bias


@torch.no_grad()
def _products_agree(layer: Any) -> bool:
    """Whether cuBLAS gives the bits of vLLM's products, as it does where no sum is split; it is faster."""
    attention, mlp = layer.self_attn, layer.mlp
    for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
        weight = module.weight
        if not weight.is_cuda:
            return False
        draw = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(max(CHECKED_ROWS), weight.shape[1], device=weight.device, generator=draw).to(weight.dtype)
        wanted = _own_product(module, x)
        if not all(torch.equal(_product(module, x[:rows]), wanted[:rows]) for rows in CHECKED_ROWS):
            return False
    return True


def _as_computed(kernel: Callable[..., Any], formula: Callable[..., Any], *inputs: Tensor) -> Any:
    return _Computed.apply(kernel, formula, *inputs)


def _norm(module: Any, own: Any, x: Tensor) -> Tensor:
    epsilon = module.variance_epsilon
    return _as_computed(lambda x, _: module(x), lambda x, w: rms_norm(x, w, epsilon), x, own.weight)


def _add_norm(module: Any, own: Any, hidden_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum."""
    if residual_TD is None:
        return _norm(module, own, hidden_TD), hidden_TD
    epsilon = module.variance_epsilon

    def kernel(hidden_TD: Tensor, residual_TD: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return module(hidden_TD.clone(), residual_TD.clone())  # in place

    def formula(hidden_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        sum_TD = hidden_TD + residual_TD
        return rms_norm(sum_TD, weight_D, epsilon), sum_TD

    return _as_computed(kernel, formula, hidden_TD, residual_TD, own.weight)


def _attention_in_pages(attn: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pages: Pages) -> Tensor:
    """What vLLM's backend does with prompts in its batch-invariant mode: keys and values in pages, in one split."""
    given: dict[str, Any] = {
        "q": q_THD.contiguous(),
        "k": pages.laid_out(k_TKD),
        "v": pages.laid_out(v_TKD),
        "cu_seqlens_q": pages.starts_S1,
        "max_seqlen_q": pages.longest,
        "seqused_k": pages.lengths_S,
        "max_seqlen_k": pages.longest,
        "softmax_scale": attn.impl.scale,
        "causal": True,
        "window_size": attn.impl.sliding_window,
        "block_table": pages.table_SP,
        "softcap": 0.0,
    }
    if hasattr(attn.impl, "vllm_flash_attn_version"):
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        return flash_attn_varlen_func(**given, fa_version=attn.impl.vllm_flash_attn_version, num_splits=1)
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out_THD = torch.empty_like(given["q"])
    none = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    unified_attention(**given, out=out_THD, **none, use_td=attn.impl.use_td)
    return out_THD
